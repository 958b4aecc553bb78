# Copies what the live site wrote since the next one was staged, where it is newer.
#
# Usage:  sh -c "$(cat carry.sh)" sh LIVE NEXT UID
#   LIVE  the workspace
#   NEXT  the folder of the next site
#   UID   the site's user and group
# Input:  paths below LIVE, each with a NUL.
# Output: what could not be copied.
# Exit:   0; what comes or goes meanwhile is nobody's fault.
cd "$1" || exit
setpriv --reuid="$3" --regid="$3" --clear-groups xargs --null --no-run-if-empty \
  cp -a --update --parents --reflink=auto --target-directory="$2" -- || :
