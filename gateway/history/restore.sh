# Makes the files of the workspace what they were, as a new commit of the history. What commit.sh recorded just before,
# with the mode of the same name, can be gone back to as well.
#
# Usage:  sh -c "$(cat writing.sh restore.sh)" sh SIDE TURN WAIT MESSAGE
#   SIDE     before: what TURN and turns since have changed, as it was before TURN; what others changed elsewhere stays.
#            after: all as it was right after TURN
#   TURN     a commit of the history
#   WAIT     seconds to wait for another that writes this history
#   MESSAGE  what the commit says
#   GIT_DIR, GIT_WORK_TREE, GIT_AUTHOR_… and GIT_COMMITTER_… in the environment, as for commit.sh
# Input:  none.
# Output: nothing where nothing was to be changed; else a line with the commit and one with the count of what changed.
# Exit:   0; 1 where it could not be done, 65 where something that is not recorded is in the way, 66 where there is no
#         such turn, 67 where nothing was before it, 69 without git, 75 where another still writes.
set -u
side="$1" wait="$3" message="$4"
command -v git >/dev/null || exit 69
cd "$GIT_WORK_TREE" || exit 1
[ -e "$GIT_DIR/HEAD" ] || exit 66
writing "$wait"
indexed || exit 1
of=$(git rev-parse -q --verify "$2^{commit}") && git merge-base --is-ancestor "$of" turns || exit 66
parent=$(git rev-parse turns) || exit 1
if [ "$side" = before ]; then
  to=$(git rev-parse -q --verify "$of^") || exit 67
  paths="$GIT_DIR/turn.paths" index="$GIT_DIR/turn.index"
  { echo "$of" && git log --format='%cn %H' "$of..turns" | sed -n '/^outside /!s/.* //p'; } |
    git diff-tree --stdin --no-commit-id -r -z --no-renames --name-only | sort -zu >"$paths" || exit 1
  rm -f "$index"
  GIT_INDEX_FILE="$index" git read-tree turns || exit 1
  {
    xargs -0 -r printf '0 0000000000000000000000000000000000000000\t%s\0' <"$paths"
    xargs -0 -r git ls-tree --full-tree -r -z "$to" -- <"$paths"
  } | GIT_INDEX_FILE="$index" git update-index -z --index-info && tree=$(GIT_INDEX_FILE="$index" git write-tree) || exit 1
  rm -f "$index"
else
  tree=$(git rev-parse "$of^{tree}") || exit 1
fi
git read-tree -m -u turns "$tree" || exit 65
[ "$tree" != "$(git rev-parse 'turns^{tree}')" ] || exit 0
turn=$(git commit-tree -p "$parent" -m "$message" "$tree") && git update-ref refs/heads/turns "$turn" || exit 1
echo "$turn"
git diff-tree --no-commit-id --no-renames --shortstat "$turn"
