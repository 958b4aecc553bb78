# Prints the state of a unit. The output is short, whatever the tenant does.
#
# Usage:  sh -c "$(cat unit_status.sh)" sh UNIT
# Input:  none.
# Output: lines NAME=VALUE: systemd's properties, a counter of its cgroup (OomKills), and a Listen for each
#         address on which its processes listen, in the kernel's notation.
# Exit:   undefined.
facts=$(systemctl show \
  --property=ActiveState,SubState,NRestarts,ExecMainStartTimestampMonotonic,ControlGroup "$1") || exit
printf '%s\n' "$facts" | head -c 1000
group=$(printf '%s\n' "$facts" | sed -n 's/^ControlGroup=//p')
[ -n "$group" ] || exit 0

# a single tree, or on hybrid and v1 hosts one tree per controller
tree=/sys/fs/cgroup
for place in "$tree/unified" "$tree/systemd" "$tree"; do
  [ -f "$place$group/cgroup.procs" ] && break
done
sed -n 's/^oom_kill /OomKills=/p' "$tree$group/memory.events" "$tree/memory$group/memory.oom_control" 2>/dev/null

set --
for pid in $(head -n 200 "$place$group/cgroup.procs"); do
  set -- "$@" "/proc/$pid/fd"
done
[ $# -gt 0 ] || exit 0
# listeners come first in the kernel's tables, which limits the work
# shellcheck disable=SC2016 # the program is awk's
timeout 3 find "$@" -lname 'socket:*' -printf '%l\n' 2>/dev/null | timeout 3 awk '
  FILENAME == "-" { gsub(/[^0-9]/, ""); own[$0]; next }
  FNR == 1 { next }
  $4 != "0A" { nextfile }
  $10 in own && ++found <= 64 { print "Listen=" $2 }
' - /proc/net/tcp /proc/net/tcp6 2>/dev/null
exit 0
