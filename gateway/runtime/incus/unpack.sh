# Lays an archive over a folder.
#
# Usage:  sh -c "$(cat unpack.sh)" sh FOLDER UID
#   FOLDER  the site's folder
#   UID     the site's user and group, whose all of it becomes
# Input:  a tar.
# Output: what tar says of what fails.
# Exit:   0 once all of it is there.
exec setpriv --reuid="$2" --regid="$2" --clear-groups \
  tar --extract --file=- --no-same-owner --directory="$1"
