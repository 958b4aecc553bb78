# Keeps the site that settle.sh has replaced, by a rename, and records which one is live now.
#
# One whose files are still the live ones (see stage.sh) is the copy of copy_former.sh, or copied where that failed.
#
# Usage:  sh -c "$(cat put_former.sh)" sh LIVE NEXT NOTE KEPT ID NOW MOST UID
#   LIVE, NEXT, NOTE  as for settle.sh; without a NOTE there is nothing to keep
#   KEPT              the folder of the kept sites, accessible only to root, since it has their environments
#   ID, NOW           the deployments of the kept site and of the live one
#   MOST              number of sites to keep; older ones are removed
#   UID               the site's user and group
# Input:  none.
# Output: only errors.
# Exit:   0 once it is kept. May be called again, however far it got.
set -eu
live="$1" next="$2" note="$3" kept="$4" id="$5" now="$6" most="$7" uid="$8" unit=/etc/systemd/system/site.service.old
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"; }
[ -e "$note" ] || exit 0
umask 077
mkdir -p "$kept"
systemctl stop site-next.service 2>/dev/null || :
# the site that was taken is live now
if [ -f "$kept/taken" ]; then
  taken=$(cat "$kept/taken")
  rm -f "$kept/taken"
  if [ -n "$taken" ]; then rm -rf "${kept:?}/$taken"; fi
fi
touch "$kept/list"
printf %s "$now" >"$kept/live"
if [ "$most" -gt 0 ] && [ -f "$unit" ]; then
  mkdir -p "$kept/$id"
  if [ -d "$next.layers" ] && [ "$(stat -c %i "$live")" = "$(cat "$note")" ]; then
    umount "$next" 2>/dev/null || umount -l "$next" 2>/dev/null || :
    rm -rf "$next" "$next.copy.new"
    if [ -d "$next.copy" ]; then
      mv -T "$next.copy" "$next"
    else
      install -d -m 0755 -o "$uid" -g "$uid" "$next"
      as_site cp -a --reflink=auto "$live/." "$next/"
    fi
    rm -rf "$next.layers"
  fi
  if [ -d "$next" ]; then
    # no rollback changes what a manifest names, so that is not kept twice; the others, with ./, the former site needs
    if [ -f "$note.lasting" ]; then
      LC_ALL=C sed --null-data '\:^\./:d' "$note.lasting" |
        (cd "$next" && as_site xargs --null --no-run-if-empty rm -rf --) || :
    fi
    for name in .git .gateway; do
      if [ -e "$live/$name" ]; then rm -rf "${next:?}/$name"; fi
    done
    rm -rf "$kept/$id/site"
    mv -T "$next" "$kept/$id/site"
  fi
  if [ -f /etc/site.env.old ]; then mv /etc/site.env.old "$kept/$id/site.env"; fi
  cp "$unit" "$kept/$id/site.service"
fi
# newest last; missing sites are dropped from the list
while read -r known since; do
  if [ "$known" != "$id" ] && [ -d "$kept/$known/site" ]; then echo "$known $since"; fi
done <"$kept/list" >"$kept/list.new"
if [ -d "$kept/$id/site" ]; then echo "$id $(date +%s)" >>"$kept/list.new"; fi
mv "$kept/list.new" "$kept/list"
while [ "$(wc -l <"$kept/list")" -gt "$most" ]; do
  read -r oldest _ <"$kept/list"
  tail -n +2 "$kept/list" >"$kept/list.new"
  mv "$kept/list.new" "$kept/list"
  if [ -n "$oldest" ]; then rm -rf "${kept:?}/$oldest"; fi
done
