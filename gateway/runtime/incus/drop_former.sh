# Removes the oldest kept site, to free disk space.
#
# Usage:  sh -c "$(cat drop_former.sh)" sh KEPT
#   KEPT  the folder of the kept sites
# Input:  none.
# Output: only errors.
# Exit:   0 once its space is free; 3 if no site is kept.
set -eu
kept="$1"
[ -s "$kept/list" ] || exit 3
read -r oldest _ <"$kept/list"
if [ -n "$oldest" ]; then rm -rf "${kept:?}/$oldest"; fi
# a full disk has no room for a copy of the list, so it is overwritten in place
rest=$(tail -n +2 "$kept/list")
if [ -n "$rest" ]; then echo "$rest"; fi >"$kept/list"
sync -f "$kept"
