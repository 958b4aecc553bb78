# Unpacks an archive into a folder.
#
# Usage:  sh -c "$(cat unpack.sh)" sh FOLDER UID
#   FOLDER  the site's folder
#   UID     the site's user and group, who will own the files
# Input:  a tar archive.
# Output: tar's errors.
# Exit:   0 once everything is unpacked.
exec setpriv --reuid="$2" --regid="$2" --clear-groups \
  tar --extract --file=- --no-same-owner --directory="$1"
