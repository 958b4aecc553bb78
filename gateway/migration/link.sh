# Has the site's old path lead to the workspace, so that what names it by its full path works here too.
#
# Usage:  sh -c "$(cat link.sh)" link WORKSPACE OLD
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once OLD is there; what was there before stays.
set -eu
if [ "$1" = "$2" ] || [ -e "$2" ]; then exit 0; fi
mkdir -p "$(dirname "$2")"
ln -s "$1" "$2"
