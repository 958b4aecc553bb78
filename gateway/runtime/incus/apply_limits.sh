# Makes systemd recompute the site's shares of changed limits.
#
# Usage:  sh -c "$(cat apply_limits.sh)" sh SHARE
#   SHARE  the site's share of memory and tasks, such as 85%
# Input:  none.
# Output: only errors.
# Exit:   0 once they are in force, or if there is no site.
#
# Shares are computed when a unit is loaded, and those of a running site reach the kernel only when they are set
# explicitly (systemd 257).
systemctl daemon-reload
[ ! -f /etc/systemd/system/site.service ] ||
  exec systemctl set-property --runtime site.service MemoryMax="$1" TasksMax="$1"
