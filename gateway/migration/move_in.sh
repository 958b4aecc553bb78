# Puts the copy of a site in the place of the workspace, which is an empty mount point or was removed with its disk.
#
# Usage:  sh -c "$(cat move_in.sh)" move_in WORKSPACE COPY
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once COPY is gone. It may be called again.
set -eu
[ -d "$2" ] || exit 0
if [ -d "$1" ]; then rmdir "$1"; fi
mv -T "$2" "$1"
