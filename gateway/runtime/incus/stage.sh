# Copies the live site to the folder of the next one, as the site's user, because root would follow links planted by
# the site. Shares blocks if the file system supports it.
#
# Usage:  sh -c "$(cat stage.sh)" sh LIVE NEXT UID
#   LIVE  the workspace
#   NEXT  the folder of the next site, which is recreated
#   UID   the site's user and group
# Input:  none.
# Output: ends with "\ncannot be read: PATH" if the site's user cannot read a file below LIVE.
# Exit:   0 if the copy is complete, else 1.
set -eu
live="$1" next="$2" uid="$3"
rm -rf "$next"
install -d -m 0755 -o "$uid" -g "$uid" "$next"
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"; }
if [ -f /etc/site.env ]; then cp -p /etc/site.env /etc/site-next.env; fi
as_site cp -a --reflink=auto "$live/." "$next/" && exit
file=$(cd "$live" && as_site find . ! -type l '(' ! -readable -o -type d ! -executable ')' -printf %P -quit)
[ -n "$file" ] || exit 1
printf '\ncannot be read: %s' "$file"
exit 1
