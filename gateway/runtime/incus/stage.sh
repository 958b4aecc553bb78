# Copies the live site to the folder of the next one, as the site's user, because root would follow links planted by
# the site. Shares blocks if the file system supports it.
#
# If only the environment changes, mounts an overlay on the live site's files instead, so that nothing is copied
# however many files there are. Falls back to the copy if the kernel refuses.
#
# Usage:  sh -c "$(cat stage.sh)" sh LIVE NEXT UID HOW
#   LIVE  the workspace
#   NEXT  the folder of the next site, which is recreated; its layers are in NEXT.layers
#   UID   the site's user and group
#   HOW   as for settle.sh
# Input:  none.
# Output: ends with "\ncannot be read: PATH" if the site's user cannot read a file below LIVE.
# Exit:   0 if the copy is complete, else 1.
set -eu
live="$1" next="$2" uid="$3" how="$4" layers="$2.layers"
if [ -d "$layers" ]; then umount "$next" || umount -l "$next" || :; fi 2>/dev/null
rm -rf "$next" "$layers" "$next.copy" "$next.copy.new"
install -d -m 0755 -o "$uid" -g "$uid" "$next"
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"; }
if [ -f /etc/site.env ]; then cp -p /etc/site.env /etc/site-next.env; fi
if [ "$how" = environment ]; then
  mkdir -m 0700 "$layers" "$layers/work"
  install -d -m 0755 -o "$uid" -g "$uid" "$layers/upper"
  over="lowerdir=$live,upperdir=$layers/upper,workdir=$layers/work,userxattr"
  if mount -t overlay -o "$over" overlay "$next" 2>/dev/null; then
    # an overlay that misses a feature of this file system is read-only
    if as_site test -w "$next"; then exit; fi
    umount "$next"
  fi
  rm -rf "$layers"
fi
# what vanishes while it is copied is not missed, and what is replaced is copied once more
vanished=': No such file or directory$' replaced=', as it was replaced while being copied$'
for again in true true false; do
  said=$(as_site env LC_ALL=C cp -a --reflink=auto "$live/." "$next/" 2>&1) && exit
  printf '%s\n' "$said" | grep -qve "$vanished" -e "$replaced" && break
  $again || printf '%s\n' "$said" | grep -qv "$vanished" || exit 0
done
printf '%s\n' "$said"
file=$(cd "$live" && as_site find . ! -type l '(' ! -readable -o -type d ! -executable ')' -printf %P -quit)
[ -n "$file" ] || exit 1
printf '\ncannot be read: %s' "$file"
exit 1
