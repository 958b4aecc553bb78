# Tells a site's services their domain, from their next start until the container's next start, at which Incus tells
# the init process.
#
# Usage:  sh -c "$(cat allow_domain.sh)" sh VARIABLE
#   VARIABLE  NAME=DOMAIN
# Input:  none.
# Output: only errors.
# Exit:   0 once systemd has loaded it.
set -eu
for unit in site site-next; do
  mkdir -p /run/systemd/system/$unit.service.d
  printf '[Service]\nEnvironment="%s"\n' "$1" >/run/systemd/system/$unit.service.d/domain.conf
done
systemctl daemon-reload
