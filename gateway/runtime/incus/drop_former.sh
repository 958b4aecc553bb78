# Removes the oldest of the kept sites, where the disk is short.
#
# Usage:  sh -c "$(cat drop_former.sh)" sh KEPT
#   KEPT  the folder of the kept sites
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once its room can be had; 3 where none is kept.
set -eu
kept="$1"
[ -s "$kept/list" ] || exit 3
read -r oldest _ <"$kept/list"
if [ -n "$oldest" ]; then rm -rf "${kept:?}/$oldest"; fi
# on a full disk there is no room for a copy of the list: it is written over in place
rest=$(tail -n +2 "$kept/list")
if [ -n "$rest" ]; then echo "$rest"; fi >"$kept/list"
sync -f "$kept"
