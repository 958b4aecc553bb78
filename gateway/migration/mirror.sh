# Makes a folder what another is, as the site's user and with no more than its rights.
#
# Usage:  sh -c "$(cat mirror.sh)" mirror FROM TO UID WORD…
#   UID   the site's user and group
#   WORD  rsync's, such as --exclude=…
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once TO has all of it, else 1.
#
# Times are compared by nanoseconds: what changed within the second of the last look is seen.
set -eu
from="$1" to="$2" uid="$3"
shift 3
install -d -m 0755 -o "$uid" -g "$uid" "$to"
setpriv --reuid="$uid" --regid="$uid" --clear-groups \
  rsync --recursive --links --perms --times --chmod=ug-s --modify-window=-1 --delete --quiet "$@" \
  -- "$from/" "$to/" || [ $? = 24 ] # 24: something went while it was copied, as in a site that runs
