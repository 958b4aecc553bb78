# Removes paths from a site's folder.
#
# Usage:  sh -c "$(cat discard.sh)" sh FOLDER UID
#   FOLDER  the site's folder
#   UID     the site's user and group
# Input:  paths below FOLDER, each terminated by NUL.
# Output: what could not be removed.
# Exit:   0 once all are gone.
cd "$1" || exit
exec setpriv --reuid="$2" --regid="$2" --clear-groups xargs --null --no-run-if-empty rm -rf --
