# Has systemd take shares of new limits for those of the site.
#
# Usage:  sh -c "$(cat apply_limits.sh)" sh SHARE
#   SHARE  what the site may have of the memory and of the tasks, as 85%
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once they hold, or where there is no site.
#
# Shares are worked out when a unit is read, and those of a site that runs reach the kernel only when they are set
# (systemd 257).
systemctl daemon-reload
[ ! -f /etc/systemd/system/site.service ] ||
  exec systemctl set-property --runtime site.service MemoryMax="$1" TasksMax="$1"
