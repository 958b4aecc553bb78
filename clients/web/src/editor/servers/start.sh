# Runs a language server of a site, unless it has to be installed first.
# Usage: start.sh NAME FOLDER; NAME is typescript, css, html or json, FOLDER where it is installed, below the home
# Input: the server's. Output: the server's; its errors with lines `language-server: memory KIB` where that changed.
# Exit: the server's, or 69 if there is none.
set -u
name=$1 folder=$HOME/$2

# Where memory is short it ends before the site does, and where processors are short it waits.
echo 900 2>/dev/null >/proc/self/oom_score_adj || :
renice -n 5 -p $$ >/dev/null 2>&1 || :

case $(uname -m) in
  aarch64) machine=arm64 ;;
  *) machine=x64 ;;
esac
if [ "$name" = typescript ]; then
  # the site's own TypeScript, whose rules it is checked by; before version 7 it had no language server
  program=
  for place in node_modules "$folder/node_modules"; do
    found=$(readlink -f "$place/typescript") || continue
    found=${found%/*}/@typescript/typescript-linux-$machine/lib/tsc
    [ ! -x "$found" ] || { program=$found && break; }
  done
  [ -n "$program" ] || exit 69
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null) || limit=max
  case $limit in
    max | '') ;;
    *) export GOMEMLIMIT=$((limit / 3)) ;;
  esac
  set -- "$program" --lsp --stdio
else
  program=$folder/node_modules/vscode-langservers-extracted/bin/vscode-$name-language-server
  [ -e "$program" ] || exit 69
  set -- node --max-old-space-size=192 "$program" --stdio
fi

(
  told=0
  while sleep 2 && now=$(awk '/^VmRSS:/ { print $2 }' /proc/$$/status 2>/dev/null) && [ -n "$now" ]; do
    # each line costs the reader something: only what changed by a tenth
    [ $((now - told)) -gt $((told / 10)) ] || [ $((told - now)) -gt $((told / 10)) ] || continue
    told=$now
    echo "language-server: memory $now" >&2
  done
) </dev/null >/dev/null &
exec "$@"
