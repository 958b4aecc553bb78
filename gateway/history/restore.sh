# Makes the files of the workspace what they were, as a new commit of the history. What commit.sh recorded just before,
# with the mode of the same name, can be gone back to as well.
#
# Usage:  sh -c "$(cat writing.sh restore.sh)" sh SIDE TURN WAIT MESSAGE
#   SIDE     undo: without what TURN changed, and with all that changed since, by a three-way merge of each file (base:
#            after TURN, theirs: before it, ours: now); nothing changes where both changed the same lines.
#            before: what TURN and turns since have changed, as it was before TURN; what others changed elsewhere stays.
#            after: all as it was right after TURN
#   TURN     a commit of the history
#   WAIT     seconds to wait for another that writes this history
#   MESSAGE  what the commit says
#   GIT_DIR, GIT_WORK_TREE, GIT_AUTHOR_… and GIT_COMMITTER_… in the environment, as for commit.sh
# Input:  for undo, the paths that become as they were before TURN if they conflict, each with a NUL.
# Output: nothing if nothing was to be changed; the line `conflicts` and the paths that conflict, each with a NUL; or a
#         line with the commit and one with the count of what changed.
# Exit:   0; 1 if it could not be done, 65 if something that is not recorded is in the way, 66 if there is no such
#         turn, 67 if nothing was before it, 69 without git, 75 if another still writes.
set -u
side="$1" wait="$3" message="$4"
command -v git >/dev/null || exit 69
cd "$GIT_WORK_TREE" || exit 1
[ -e "$GIT_DIR/HEAD" ] || exit 66
writing "$wait"
indexed || exit 1
of=$(git rev-parse -q --verify "$2^{commit}") && git merge-base --is-ancestor "$of" turns || exit 66
parent=$(git rev-parse turns) || exit 1
paths="$GIT_DIR/turn.paths" index="$GIT_DIR/turn.index"
rm -f "$index"

# Prints a tree as `$1`, but with the paths in `$paths`, and all below them, as they are in `$2`.
with() { # TREE TREE
  GIT_INDEX_FILE="$index" git read-tree "$1" || return 1
  {
    xargs -0 -r printf '0 0000000000000000000000000000000000000000\t%s\0' <"$paths"
    xargs -0 -r git --literal-pathspecs ls-tree --full-tree -r -z "$2" -- <"$paths"
  } | GIT_INDEX_FILE="$index" git update-index -z --index-info && GIT_INDEX_FILE="$index" git write-tree || return 1
  rm -f "$index"
}

if [ "$side" != after ]; then
  to=$(git rev-parse -q --verify "$of^") || exit 67
fi
case "$side" in
undo)
  forced="$GIT_DIR/turn.forced" merged="$GIT_DIR/turn.merged"
  sort -zu >"$forced" || exit 1
  # a commit after TURN that takes it back: TURN is where both sides have parted
  theirs=$(git commit-tree -p "$of" -m undo "$to^{tree}") || exit 1
  git -c merge.directoryRenames=false merge-tree --write-tree -z --name-only --no-messages "$parent" "$theirs" >"$merged"
  [ $? -le 1 ] && tree=$(head -z -n 1 "$merged" | tr -d '\0') && [ -n "$tree" ] || exit 1
  # a file that has no room beside a folder of its name is listed as FILE~COMMIT
  tail -z -n +2 "$merged" | sed -z "s/~\($parent\|$theirs\)\(_[0-9]*\)\?\$//" | sort -zu >"$paths"
  if [ -s "$paths" ]; then
    if [ -n "$(comm -z -23 "$paths" "$forced" | head -c 1 | tr '\0' x)" ]; then
      echo conflicts
      comm -z -23 "$paths" "$forced"
      exit 0
    fi
    tail -z -n +2 "$merged" | sort -zu - "$paths" >"$forced" && mv "$forced" "$paths"
    tree=$(with "$tree" "$to") || exit 1
  fi
  ;;
before)
  { echo "$of" && git log --format='%cn %H' "$of..turns" | sed -n '/^outside /!s/.* //p'; } |
    git diff-tree --stdin --no-commit-id -r -z --no-renames --name-only | sort -zu >"$paths" || exit 1
  tree=$(with turns "$to") || exit 1
  ;;
*) tree=$(git rev-parse "$of^{tree}") || exit 1 ;;
esac
[ "$tree" != "$(git rev-parse 'turns^{tree}')" ] || exit 0
turn=$(git commit-tree -p "$parent" -m "$message" "$tree") || exit 1
go "$turn" || exit
echo "$turn"
git diff-tree --no-commit-id --no-renames --shortstat "$turn"
