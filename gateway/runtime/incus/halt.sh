# Stops the live site and the next one, before they are exchanged: from then on no two servers of one project run.
#
# Usage:  sh -c "$(cat halt.sh)" sh LIVE NOTE
#   LIVE  the workspace
#   NOTE  the file that records which folder was live. It is written first, so that after a crash settle.sh and
#         unsettle.sh can tell whether the exchange has happened, and unsettle.sh starts the live site again.
# Input:  none.
# Output: only errors.
# Exit:   0 once both have ended. May be called again.
set -eu
live="$1" note="$2" unit=/etc/systemd/system/site.service
if [ ! -e "$note" ]; then
  if [ -f $unit ]; then cp $unit $unit.old; fi
  if [ -f /etc/site.env ]; then cp -p /etc/site.env /etc/site.env.old; fi
  stat -c %i "$live" >"$note.new"
  mv "$note.new" "$note"
fi
systemctl stop site-next.service site.service 2>/dev/null || :
