# Removes the next site, and what settle.sh saved for undoing it.
#
# A kept site that was taken and did not become live is put back.
#
# Usage:  sh -c "$(cat clear.sh)" sh LIVE NEXT NOTE KEPT UID
#   LIVE, NEXT, NOTE  as for settle.sh
#   KEPT              the folder of the kept sites
#   UID               the site's user and group
# Input:  none.
# Output: only errors.
# Exit:   0 once the folder and the note are gone. May be called again.
next="$2" note="$3" kept="$4" uid="$5"
systemctl stop site-next.service 2>/dev/null
# it has, if it did not end in time
systemctl reset-failed site-next.service 2>/dev/null
rm -f /run/systemd/system/site-next.service /etc/site-next.env /etc/site.env.old \
  /etc/systemd/system/site.service.old
systemctl daemon-reload
if [ -d "$next.layers" ]; then umount "$next" || umount -l "$next"; fi 2>/dev/null
if [ -f "$kept/taken" ]; then
  back="$kept/$(cat "$kept/taken")"
  if [ -d "$next" ] && [ -d "$back" ] && [ ! -e "$back/site" ]; then
    # files copied from the live site do not belong to it
    if [ -f "$note.lasting" ]; then
      (cd "$next" && setpriv --reuid="$uid" --regid="$uid" --clear-groups \
        xargs --null --no-run-if-empty rm -rf --) <"$note.lasting"
    fi
    mv -T "$next" "$back/site"
  fi
  rm -f "$kept/taken"
fi
rm -rf "$next" "$next.layers" "$next.copy" "$next.copy.new" "$note" "$note.new" "$note.moved" "$note.lasting" \
  "$kept/taken.new"
