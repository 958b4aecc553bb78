# Makes the files of the workspace what they were, as a new commit of the history. What commit.sh recorded just before,
# with the mode of the same name, can be gone back to as well.
#
# Usage:  sh -c "$(cat restore.sh)" sh SIDE TURN WAIT MESSAGE
#   SIDE     before or after: as it was before TURN, or right after it
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
exec 9>>"$GIT_DIR.lock"
flock -w "$wait" 9 || exit 75
to=$(git rev-parse -q --verify "$2^{commit}") && git merge-base --is-ancestor "$to" turns || exit 66
if [ "$side" = before ]; then to=$(git rev-parse -q --verify "$to^") || exit 67; fi
git read-tree -m -u turns "$to" || exit 65
tree=$(git rev-parse "$to^{tree}") && parent=$(git rev-parse turns) || exit 1
[ "$tree" != "$(git rev-parse 'turns^{tree}')" ] || exit 0
turn=$(git commit-tree -p "$parent" -m "$message" "$tree") && git update-ref refs/heads/turns "$turn" || exit 1
echo "$turn"
git diff-tree --no-commit-id --no-renames --shortstat "$turn"
