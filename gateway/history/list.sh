# Prints the turns of the history, latest first.
#
# Usage:  sh -c "$(cat list.sh)" sh MOST [BEFORE]
#   MOST    turns to print
#   BEFORE  a commit of the history; those before it are printed
#   GIT_DIR in the environment: the history
# Input:  none.
# Output: for each turn a record separator (0x1e), then commit, kind, agent, subject, seconds since the epoch and message,
#         each with a NUL, then the count of what changed.
# Exit:   0, also where there is no history yet; 69 without git.
command -v git >/dev/null || exit 69
[ -e "$GIT_DIR/HEAD" ] || exit 0
git log -n "$1" --format='%x1e%H%x00%cn%x00%an%x00%ae%x00%at%x00%B%x00' --shortstat --no-renames --end-of-options \
  "${2:-turns}${2:+^}" -- 2>/dev/null || :
