# Runs a site's language server, if it is installed.
# Usage: start.sh NAME FOLDER; NAME is typescript, css, html or json, FOLDER is where it is installed, below the home
# Input: the server's. Output: the server's; its errors, with lines `language-server: memory KIB` when that changes.
# Exit: the server's, or 69 if there is none.
set -u
name=$1 folder=$HOME/$2

# If memory is short it is killed before the site, and if processors are busy it waits.
echo 900 2>/dev/null >/proc/self/oom_score_adj || :
renice -n 5 -p $$ >/dev/null 2>&1 || :

case $(uname -m) in
  aarch64) machine=arm64 ;;
  *) machine=x64 ;;
esac
if [ "$name" = typescript ]; then
  # the site's own TypeScript, by whose rules it is checked, if it is version 7 or later and has a language server
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
    # only changes by a tenth, since each line costs the reader something
    [ $((now - told)) -gt $((told / 10)) ] || [ $((told - now)) -gt $((told / 10)) ] || continue
    told=$now
    echo "language-server: memory $now" >&2
  done
) </dev/null >/dev/null &
exec "$@"
