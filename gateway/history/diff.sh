# Prints what a turn changed.
#
# Usage:  sh -c "$(cat diff.sh)" sh TURN NAMES MOST
#   TURN   a commit of the history
#   NAMES  bytes of the list of files, cut off behind them
#   MOST   bytes of the patch, cut off behind them
#   GIT_DIR in the environment: the history
# Input:  none.
# Output: for each file lines added, lines removed (each `-` for a binary one) and path, by tabs, with a NUL; two NULs; the
#         turn as list.sh prints it; a group separator (0x1d); the patch.
# Exit:   0; 66 where there is no such turn, 69 without git.
command -v git >/dev/null || exit 69
turn=$(git rev-parse -q --verify "$1^{commit}" 2>/dev/null) && git merge-base --is-ancestor "$turn" turns || exit 66
git diff-tree --root --no-commit-id -r -z --numstat --no-renames "$turn" | head -c "$2"
printf '\0\0'
git log -1 --format='%x1e%H%x00%cn%x00%an%x00%ae%x00%at%x00%B%x00' --shortstat --no-renames "$turn" --
printf '\035'
git diff-tree --root --no-commit-id -r -p -M --no-ext-diff --no-textconv --no-color "$turn" | head -c "$3"
