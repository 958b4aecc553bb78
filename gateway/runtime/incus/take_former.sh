# Makes a kept site the next one, by a rename without copying.
#
# Usage:  sh -c "$(cat take_former.sh)" sh NEXT KEPT ID
#   NEXT  the folder of the next site, which is replaced
#   KEPT  the folder of the kept sites
#   ID    the site to take; recorded before it is moved, so that clear.sh can put it back
# Input:  none.
# Output: only errors.
# Exit:   0 once it is done; 3 if no such site is kept.
set -eu
next="$1" kept="$2" from="$2/$3"
[ -d "$from/site" ] || exit 3
rm -rf "$next"
printf %s "$3" >"$kept/taken.new"
mv "$kept/taken.new" "$kept/taken"
mv -T "$from/site" "$next"
umask 077
if [ -f "$from/site.env" ]; then cat "$from/site.env"; fi >/etc/site-next.env
