# Makes the next site live: exchanges the folders, installs its environment and unit, and starts it.
#
# Usage:  sh -c "$(cat settle.sh)" sh LIVE NEXT NOTE HOW
#   LIVE  the workspace
#   NEXT  the folder of the next site
#   NOTE  as halt.sh, which was called before, has written it
#   HOW   "update"; "rollback", for which the repository and the gateway's own folder stay with the live site; or
#         "environment", for which no folder is moved
# Input:  the live site's unit.
# Output: only errors.
# Exit:   0 once the site has been told to start. May be called again, however far it got.
set -eu
live="$1" next="$2" note="$3" how="$4" unit=/etc/systemd/system/site.service
new=$(cat; printf .)
if [ "$how" != environment ]; then
  # atomic, so that no request finds the folder missing
  if [ "$(stat -c %i "$live")" = "$(cat "$note")" ]; then mv --exchange -T "$next" "$live"; fi
fi
if [ "$how" = rollback ]; then
  for name in .git .gateway; do
    if [ -e "$next/$name" ]; then
      echo "$name" >>"$note.moved"
      rm -rf "${live:?}/$name"
      mv -T "$next/$name" "$live/$name"
    fi
  done
fi
if [ -f /etc/site-next.env ]; then mv /etc/site-next.env /etc/site.env; fi
printf %s "${new%.}" >$unit
# a reload takes as long as everything else here, so do it only once
systemctl --quiet --no-reload enable site.service
systemctl daemon-reload
systemctl restart site.service
