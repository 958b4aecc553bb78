# Names what was kept of an earlier switch.
#
# Usage:  sh -c "$(cat kept.sh)" kept PREFIX
#   PREFIX  what the paths begin with, a hyphen and a number behind it
# Input:  none.
# Output: the paths, one a line.
# Exit:   0.
ls -d "$1"-* 2>/dev/null || :
