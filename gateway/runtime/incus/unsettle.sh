# Undoes settle.sh: restores folders, environment and unit, and starts the old site.
#
# Usage:  sh -c "$(cat unsettle.sh)" sh LIVE NEXT NOTE
#   LIVE, NEXT, NOTE  as for settle.sh; without a NOTE there is nothing to undo
# Input:  none.
# Output: only errors.
# Exit:   0 once everything is restored. May be called again, however far it got.
set -eu
live="$1" next="$2" note="$3" unit=/etc/systemd/system/site.service
[ -e "$note" ] || exit 0
if [ -f "$note.moved" ]; then
  while read -r name; do
    if [ -e "$live/$name" ] && [ ! -e "$next/$name" ]; then mv -T "$live/$name" "$next/$name"; fi
  done <"$note.moved"
fi
if [ "$(stat -c %i "$live")" != "$(cat "$note")" ]; then mv --exchange -T "$next" "$live"; fi
if [ -f /etc/site.env.old ]; then mv /etc/site.env.old /etc/site.env; else rm -f /etc/site.env; fi
if [ -f $unit.old ]; then
  cp $unit.old $unit
  systemctl daemon-reload
  systemctl restart site.service
else
  systemctl --quiet disable --now site.service || :
  rm -f $unit
fi
rm -f "$note" "$note.moved" $unit.old
