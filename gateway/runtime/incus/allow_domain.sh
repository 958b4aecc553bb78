# Tells a site's services the domain that they are asked by, from their next start on, until the container's: its
# first process is told by Incus.
#
# Usage:  sh -c "$(cat allow_domain.sh)" sh VARIABLE
#   VARIABLE  NAME=DOMAIN
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once systemd has it.
set -eu
for unit in site site-next; do
  mkdir -p /run/systemd/system/$unit.service.d
  printf '[Service]\nEnvironment="%s"\n' "$1" >/run/systemd/system/$unit.service.d/domain.conf
done
systemctl daemon-reload
