# Removes everything of the next site, and what settle.sh kept to take itself back.
#
# Usage:  sh -c "$(cat clear.sh)" sh LIVE NEXT NOTE
#   LIVE, NEXT, NOTE  as for settle.sh
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once the folder and the note are gone. It may be called again.
next="$2" note="$3"
systemctl stop site-next.service 2>/dev/null
rm -f /run/systemd/system/site-next.service /etc/site-next.env /etc/site.env.old \
  /etc/systemd/system/site.service.old
systemctl daemon-reload
rm -rf "$next" "$note" "$note.new"
