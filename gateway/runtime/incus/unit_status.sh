# Tells how a unit does. All that is printed is short, whatever the tenant does.
#
# Usage:  sh -c "$(cat unit_status.sh)" sh UNIT
# Input:  none.
# Output: NAME=VALUE, one a line: what systemd says of it, what its control group counts (OomKills, Computed), and
#         Listen for each address where its processes listen, as the kernel writes it.
# Exit:   means nothing.
facts=$(systemctl show \
  --property=ActiveState,SubState,NRestarts,ExecMainStartTimestampMonotonic,ControlGroup "$1") || exit
printf '%s\n' "$facts" | head -c 1000
group=$(printf '%s\n' "$facts" | sed -n 's/^ControlGroup=//p')
[ -n "$group" ] || exit 0

# one tree of all, or (hybrid, and the old one) a tree for each of these
tree=/sys/fs/cgroup
for place in "$tree/unified" "$tree/systemd" "$tree"; do
  [ -f "$place$group/cgroup.procs" ] && break
done
sed -n 's/^oom_kill /OomKills=/p' "$tree$group/memory.events" "$tree/memory$group/memory.oom_control" 2>/dev/null
sed -n 's/^usage_usec /Computed=/p' "$place$group/cpu.stat" 2>/dev/null

set --
for pid in $(head -n 200 "$place$group/cgroup.procs"); do
  set -- "$@" "/proc/$pid/fd"
done
[ $# -gt 0 ] || exit 0
# listeners come first in the kernel's tables
# shellcheck disable=SC2016 # the program is awk's
timeout 3 find "$@" -lname 'socket:*' -printf '%l\n' 2>/dev/null | timeout 3 awk '
  FILENAME == "-" { gsub(/[^0-9]/, ""); own[$0]; next }
  FNR == 1 { next }
  $4 != "0A" { nextfile }
  $10 in own && ++found <= 64 { print "Listen=" $2 }
' - /proc/net/tcp /proc/net/tcp6 2>/dev/null
exit 0
