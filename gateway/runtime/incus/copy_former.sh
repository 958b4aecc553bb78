# Copies the live site's files for put_former.sh, while an overlay on them serves visitors (see stage.sh).
#
# Usage:  sh -c "$(cat copy_former.sh)" sh LIVE NEXT UID
#   LIVE, NEXT  as for stage.sh; the copy is in NEXT.copy
#   UID         the site's user and group
# Input:  none.
# Output: only errors.
# Exit:   0 once it is complete, or if the next site is a copy itself. May be called again.
set -eu
live="$1" next="$2" uid="$3" copy="$2.copy"
[ -d "$next.layers" ] || exit 0
rm -rf "$copy" "$copy.new"
install -d -m 0755 -o "$uid" -g "$uid" "$copy.new"
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"; }
# again for what was replaced or has vanished while it was copied
as_site cp -a --reflink=auto "$live/." "$copy.new/" || as_site cp -a --reflink=auto "$live/." "$copy.new/"
mv -T "$copy.new" "$copy"
