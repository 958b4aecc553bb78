# Installs a site's unit and starts or restarts it.
#
# Usage:  sh -c "$(cat start_service.sh)" sh FILE SIDE UNIT
#   FILE  the unit's file
#   SIDE  "live", or "next", which is gone after the container's next start
#   UNIT  the unit's name
# Input:  the unit.
# Output: only errors.
# Exit:   0 once it has been told to start.
set -eu
cat >"$1"
[ "$2" = next ] || systemctl --quiet --no-reload enable site.service
systemctl daemon-reload
systemctl restart "$3"
