# Copies files that the live site has written since the next one was staged, in the place of what that one has written
# there itself; records the paths.
#
# Usage:  sh -c "$(cat carry.sh)" sh LIVE NEXT UID NOTE HOW
#   LIVE  the workspace
#   NEXT  the folder of the next site
#   UID   the site's user and group
#   NOTE  the paths are recorded in this file with ".lasting" appended
#   HOW   as for settle.sh: for "environment" none are copied
# Input:  paths below LIVE, each terminated by NUL.
# Output: what could not be copied.
# Exit:   0; files may appear and vanish meanwhile.
live="$1" next="$2" uid="$3" paths="$4.lasting" how="$5"
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups xargs --null --no-run-if-empty "$@"; }
cat >"$paths" || exit
if [ "$how" != environment ]; then
  cd "$next" || exit
  as_site rm -rf -- <"$paths"
  # a database would replay another's log file, which the live one may lack
  for log in -wal -shm -journal; do sed --null-data "s/\$/$log/" "$paths" | as_site rm -f --; done
  cd "$live" || exit
  as_site cp -a --parents --reflink=auto --target-directory="$next" -- <"$paths" || :
fi
