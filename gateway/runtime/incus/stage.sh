# Copies the live site to the folder of the next one, as the site's user: root would follow what the site puts in
# its way. Where blocks can be shared, none is written twice.
#
# Usage:  sh -c "$(cat stage.sh)" sh LIVE NEXT UID
#   LIVE  the workspace
#   NEXT  the folder of the next site, which is made again
#   UID   the site's user and group
# Input:  none.
# Output: last "\ncannot be read: PATH" for a file below LIVE that the site's user cannot read.
# Exit:   0 for a whole copy, else 1.
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
