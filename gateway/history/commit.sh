# Records what changed in the workspace as one commit of the history, which is a repository of its own: nothing that is
# in the site's, or wrong with it, matters here.
#
# Usage:  sh -c "$(cat writing.sh commit.sh)" sh MODE MOST WAIT MESSAGE [TURN]
#   MODE     all: whatever changed; only: what changed at the paths of the input; but: what changed elsewhere;
#            begin: as but, where the history has nothing yet, also where there is nothing; before, after: what changed
#            at the paths that going back to before TURN, or to right after it, would touch; undo: at those of TURN
#   MOST     bytes; a file that has as many is left out, and where all of them have 32 times as many, each of 256 KiB is
#   WAIT     seconds to wait for another that writes this history
#   MESSAGE  what the commit says
#   GIT_DIR, GIT_WORK_TREE, GIT_AUTHOR_… and GIT_COMMITTER_… in the environment: the history, the workspace, whose turn
#   TURN_TIMES in the environment: when it was at work, as pairs of seconds since the epoch. What changed at other times is
#            a commit of nobody, before. Without it, all is the turn's
#   TURN_LEFT in the environment: the time now, and pairs when others were at work; what changed since, or then, is left
# Input:  for only, but and begin, paths below the workspace, each with a NUL.
# Output: where some changed at other times, a line of `outside` with nobody's commit, and one with the count; nothing where nothing changed; else a line with the commit, one with the count of what changed, and the first
#         of the paths that were left out, each with a NUL.
# Exit:   0; 1 where it could not be recorded, 66 where there is no TURN, 67 where nothing was before it,
#         68 where too much changed, 69 without git, 75 where another still writes.
set -u
mode="$1" most="$2" total=$(($2 * 32)) wait="$3" message="$4"
command -v git >/dev/null || exit 69
cd "$GIT_WORK_TREE" || exit 1
umask 077
[ -d "${GIT_DIR%/*}" ] || mkdir -p "${GIT_DIR%/*}" || exit 1
writing "$wait"
left="$GIT_DIR/turn.left" changed="$GIT_DIR/turn.changed" paths="$GIT_DIR/turn.paths" good="$GIT_DIR/turn.good"

anew() {
  git init -q --template= --object-format=sha1 -b turns && : >"$GIT_DIR/turn.begun" && configure
}

names() {
  # one that is no file would be waited for
  standard=--exclude-standard
  if [ -e .gitignore ] && [ ! -f .gitignore ]; then standard="--exclude-from=$GIT_DIR/info/exclude"; fi
  case "$mode" in
  only | before | after | undo) xargs -0 -r git --literal-pathspecs ls-files -z "$@" "$standard" -- <"$paths" ;;
  but | begin)
    git ls-files -z "$@" "$standard" >"$GIT_DIR/turn.named" &&
      sort -zu "$GIT_DIR/turn.named" | comm -z -23 - "$paths"
    ;;
  *) git ls-files -z "$@" "$standard" ;;
  esac
}

# Prints the bytes of what is to be recorded; what cannot be read, is no file, or too large is left out and keeps the
# state in which it was recorded last.
size() { # LIST
  # shellcheck disable=SC2185 # the names are in a file
  find -files0-from "$1" -maxdepth 0 ! -type l ! '(' -type f -size "-${most}c" -readable ')' \
    -fprint0 "$left" -o -printf '%s\n' 2>/dev/null | awk '{ sum += $1 } END { printf "%.0f", sum }'
}

record() {
  names -m -o >"$changed" || return 1
  if [ -n "${TURN_TIMES-}" ] && [ -s "$changed" ]; then
    rest="$GIT_DIR/turn.rest" found="$GIT_DIR/turn.found"
    : >"$found"
    by_time
    (
      export GIT_AUTHOR_NAME=nobody GIT_AUTHOR_EMAIL=nobody GIT_COMMITTER_NAME=outside
      # shellcheck disable=SC2030 # for this turn alone
      message='Changed outside of turns'
      [ ! -s "$rest" ] || keep "$rest" >"$found"
    )
    [ ! -s "$found" ] || { printf 'outside ' && head -n 2 "$found"; }
    keep "$changed"
  else
    keep "$changed"
  fi
}

# Leaves in the list what changed in TURN_TIMES, by its inode's time, and puts the others into `$rest`. What is gone, or
# came with a folder that was moved, has no such time: there the folders around it say when.
by_time() {
  all="$GIT_DIR/turn.all" older="$GIT_DIR/turn.older"
  folders="$GIT_DIR/turn.folders" around="$GIT_DIR/turn.around"
  # shellcheck disable=SC2086 # a word for each time
  when=$(spans $TURN_TIMES) later="-newerct @${TURN_LEFT%% *} -o $(spans ${TURN_LEFT#* })"
  first="${TURN_TIMES%% *}"
  sort -zu "$changed" >"$all"
  # shellcheck disable=SC2086,SC2185 # the words of an expression, the names are in a file
  find -files0-from "$all" -maxdepth 0 '(' $when ')' -print0 2>/dev/null | sort -zu >"$changed"
  # shellcheck disable=SC2185
  find -files0-from "$all" -maxdepth 0 -newerct "@$first" -print0 2>/dev/null | sort -zu - "$changed" |
    comm -z -23 "$all" - >"$older"
  if [ -s "$older" ]; then
    # shellcheck disable=SC2086,SC2185
    above "$older" | find -files0-from - -maxdepth 0 -fprint0 "$around" '(' $when ')' -print0 2>/dev/null >"$folders"
    {
      xargs -0 -r git --literal-pathspecs ls-files -z -o -d -- <"$folders"
      # shellcheck disable=SC2086
      if [ -n "$(find . -maxdepth 0 '(' $when ')')" ]; then
        xargs -0 -r git --literal-pathspecs ls-files -z -d -- <"$around" | sort -zu >"$rest"
        git ls-files -z -d | sort -zu | comm -z -23 - "$rest"
      fi
    } | sort -zu | comm -z -12 "$older" - | sort -zu - "$changed" >"$good"
    mv "$good" "$changed"
  fi
  # what changed just now, or is another's, is left: it is known by then whose it is
  # shellcheck disable=SC2086,SC2185
  above "$all" | find -files0-from - -maxdepth 0 '(' $later ')' -print0 2>/dev/null >"$folders"
  {
    cat "$changed"
    # shellcheck disable=SC2086,SC2185
    find -files0-from "$all" -maxdepth 0 '(' $later ')' -print0 2>/dev/null
    xargs -0 -r git --literal-pathspecs ls-files -z -d -- <"$folders"
    # shellcheck disable=SC2086
    [ -z "$(find . -maxdepth 0 '(' $later ')')" ] || git ls-files -z -d -- ':(top,glob)*'
  } | sort -zu | comm -z -23 "$all" - >"$rest"
}

# Prints what `find` takes for a time within pairs of times.
spans() { # [SINCE UNTIL]…
  printf %s -false
  while [ $# -gt 1 ]; do
    printf ' -o -newerct @%s ! -newerct @%s' "$1" "$2"
    shift 2
  done
}

# Commits what has changed of a list.
keep() { # LIST
  good="$GIT_DIR/turn.good"
  [ -s "$1" ] || [ "$mode" = begin ] || return 0
  if [ "$(size "$1")" -gt "$total" ]; then
    most=262144 # what people write themselves has room then
    [ "$(size "$1")" -le "$total" ] || return 2
  fi
  if [ -s "$left" ]; then
    # shellcheck disable=SC2185
    find -files0-from "$1" -maxdepth 0 '(' -type l -o -type f -size "-${most}c" -readable ')' \
      -print0 >"$good" 2>/dev/null
    names -d | sort -zu >"$good.gone" || return 1
    sort -zu "$1" | comm -z -12 - "$good.gone" >>"$good"
  else
    good="$1"
  fi
  if ! git update-index -z --add --remove --replace --stdin <"$good" 2>/dev/null; then
    beyond "$good" && git update-index -z --add --remove --replace --stdin <"$good" || return 1
  fi
  tree=$(git write-tree) || return 1
  parent='' before=''
  # shellcheck disable=SC2046 # two words
  if set -- $(git rev-parse -q turns 'turns^{tree}' -- 2>/dev/null) && [ $# = 3 ]; then parent="$1" before="$2"; fi
  [ "$tree" != "$before" ] || return 0
  # shellcheck disable=SC2031
  turn=$(git commit-tree ${parent:+-p "$parent"} -m "$message" "$tree") || return 1
  git update-ref refs/heads/turns "$turn" || return 1
  echo "$turn"
  git diff-tree --root --no-commit-id --no-renames --shortstat "$turn"
  [ ! -s "$left" ] || head -c 2000 "$left"
}

# Takes what is beyond a link out of a list, and out of the index: a folder was there before.
beyond() { # LIST
  gone="$GIT_DIR/turn.gone"
  # shellcheck disable=SC2185
  above "$1" | find -files0-from - -maxdepth 0 -type l -print0 2>/dev/null |
    xargs -0 -r git --literal-pathspecs ls-files -z -- | sort -zu >"$gone"
  sort -zu "$1" | comm -z -23 - "$gone" >"$gone.not" || return 1
  sort -zu "$1" | comm -z -12 - "$gone" | xargs -0 -r printf '0 0000000000000000000000000000000000000000\t%s\0' |
    git update-index -z --index-info && mv "$gone.not" "$1"
}

if [ -e "$GIT_DIR/HEAD" ]; then
  [ "$mode" != begin ] || exit 0
else
  anew || exit 1
fi
indexed
whole=$?
: >"$left"
case "$mode" in
only | but | begin)
  # what was written through a linked folder is where that leads
  cat >"$good"
  # shellcheck disable=SC2094 # both read it
  xargs -0 -r realpath -z -m --relative-to=. -- <"$good" 2>/dev/null | grep -zv '^\.\./' |
    sort -zu - "$good" >"$paths"
  ;;
before | after | undo)
  to=$(git rev-parse -q --verify "$5^{commit}") || exit 66
  if [ "$mode" = undo ]; then
    git rev-parse -q --verify "$to^" >/dev/null || exit 67
    git diff-tree --no-commit-id -r -z --no-renames --name-only "$to" >"$paths" || exit 1
    # a file that is in the place of a folder
    # shellcheck disable=SC2185
    above "$paths" |
      find -files0-from - -maxdepth 0 ! -type d -print0 2>/dev/null >"$GIT_DIR/turn.above"
    cat "$GIT_DIR/turn.above" >>"$paths"
    rm -f "$GIT_DIR/turn.above"
  elif [ "$mode" = before ]; then
    git rev-parse -q --verify "$to^" >/dev/null || exit 67
    # as in restore.sh
    { echo "$to" && git log --format='%cn %H' "$to..turns" | sed -n '/^outside /!s/.* //p'; } |
      git diff-tree --stdin --no-commit-id -r -z --no-renames --name-only >"$paths" || exit 1
  else
    git diff-tree -r -z --no-renames --name-only "$to" turns >"$paths" || exit 1
    git ls-files -z -m >>"$paths"
  fi
  ;;
esac
if [ "$whole" = 0 ]; then
  record
  case $? in
  0) exit ;;
  2) exit 68 ;;
  esac
fi
# what a killed git, or the tenant, left is mended
mend && indexed && record && exit
# where that cannot be read either, the history begins again, and the broken one is kept for whoever wants to look
! git ls-tree -r turns >/dev/null 2>&1 || exit 1
rm -rf "$GIT_DIR.broken"
mv "$GIT_DIR" "$GIT_DIR.broken" || exit 1
mode=all
anew && record
