# Copies what the live site wrote since the next one was staged, where it is newer; notes what that may be.
#
# Usage:  sh -c "$(cat carry.sh)" sh LIVE NEXT UID NOTE HOW
#   LIVE  the workspace
#   NEXT  the folder of the next site
#   UID   the site's user and group
#   NOTE  where the paths are noted, with ".lasting" behind it
#   HOW   as for settle.sh: of a "rollback" the next site's own are removed before, of an "environment" none is
#         copied
# Input:  paths below LIVE, each with a NUL.
# Output: what could not be copied.
# Exit:   0; what comes or goes meanwhile is nobody's fault.
live="$1" next="$2" uid="$3" paths="$4.lasting" how="$5"
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups xargs --null --no-run-if-empty "$@"; }
cat >"$paths" || exit
if [ "$how" = rollback ]; then
  # a database's log that is older than the database would be played back into it
  cd "$next" || exit
  as_site rm -rf -- <"$paths"
fi
if [ "$how" != environment ]; then
  cd "$live" || exit
  as_site cp -a --update --parents --reflink=auto --target-directory="$next" -- <"$paths" || :
fi
