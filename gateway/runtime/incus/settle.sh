# Makes the next site the live one: exchanges their folders, puts its environment and unit in place, starts it.
#
# Usage:  sh -c "$(cat settle.sh)" sh LIVE NEXT NOTE HOW
#   LIVE  the workspace
#   NEXT  the folder of the next site
#   NOTE  the file that says which of the two was the live one. It is written before they are exchanged, so that
#         after a crash both this and unsettle.sh know whether they were.
#   HOW   "update"; "rollback", where the repository and the gateway's own folder stay with the live site; or
#         "environment", where all folders stay where they are
# Input:  the live site's unit.
# Output: nothing but what fails.
# Exit:   0 once the site was told to start. It may be called again, however far it came.
set -eu
live="$1" next="$2" note="$3" how="$4" unit=/etc/systemd/system/site.service
new=$(cat; printf .)
if [ ! -e "$note" ]; then
  if [ -f $unit ]; then cp $unit $unit.old; fi
  if [ -f /etc/site.env ]; then cp -p /etc/site.env /etc/site.env.old; fi
  stat -c %i "$live" >"$note.new"
  mv "$note.new" "$note"
fi
if [ "$how" != environment ]; then
  # in one step: no request ever finds the folder missing
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
# each reload takes as long as all else here: one is enough
systemctl --quiet --no-reload enable site.service
systemctl daemon-reload
systemctl restart site.service
