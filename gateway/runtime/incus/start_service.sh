# Puts a site's unit in place and starts it, or starts it again.
#
# Usage:  sh -c "$(cat start_service.sh)" sh FILE SIDE UNIT
#   FILE  where the unit is kept
#   SIDE  "live", or "next" for one that is gone after the container's next start
#   UNIT  its name
# Input:  the unit.
# Output: nothing but what fails.
# Exit:   0 once it was told to start.
set -eu
cat >"$1"
# right after a container's start its systemd does not listen yet
for _ in $(seq 400); do
  [ -S /run/systemd/private ] && break
  sleep 0.05
done
[ "$2" = next ] || systemctl --quiet --no-reload enable site.service
systemctl daemon-reload
systemctl restart "$3"
