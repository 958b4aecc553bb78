# Tells a site's services their domain, from their next start until the container's next start, at which Incus tells
# the init process.
#
# Usage:  sh -c "$(cat allow_domain.sh)" sh VARIABLE
#   VARIABLE  NAME=DOMAIN
# Input:  none.
# Output: only errors.
# Exit:   0 once systemd has loaded it.
set -eu
told=$(printf '[Service]\nEnvironment="%s"' "$1") changed=
for unit in site site-next; do
  file=/run/systemd/system/$unit.service.d/domain.conf
  if [ -f $file ] && [ "$(cat $file)" = "$told" ]; then continue; fi
  changed=yes
  mkdir -p ${file%/*}
  printf '%s\n' "$told" >$file
done
# a reload takes as long as the start of a small site
if [ -n "$changed" ]; then systemctl daemon-reload; fi
