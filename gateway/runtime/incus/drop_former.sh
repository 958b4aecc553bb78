# Removes the oldest kept site, to free disk space.
#
# Usage:  sh -c "$(cat drop_former.sh)" sh KEPT LEAST
#   KEPT   the folder of the kept sites
#   LEAST  how many stay
# Input:  none.
# Output: only errors.
# Exit:   0 once its space is free; 3 if no more are kept, or while one is being rolled back to.
set -eu
kept="$1" least="$2"
[ -s "$kept/list" ] || exit 3
[ ! -f "$kept/taken" ] || exit 3
[ "$(wc -l <"$kept/list")" -gt "$least" ] || exit 3
read -r oldest _ <"$kept/list"
if [ -n "$oldest" ]; then rm -rf "${kept:?}/$oldest"; fi
# a full disk has no room for a copy of the list, so it is overwritten in place
rest=$(grep -v "^$oldest " "$kept/list" || :)
if [ -n "$rest" ]; then echo "$rest"; fi >"$kept/list"
sync -f "$kept"
