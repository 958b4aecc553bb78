# Ends a command's whole tree, as `Cgroup.kill` does on the host, where the host's control groups cannot be reached.
#
# Usage:  sh -c "$(cat kill.sh)" sh EXEC GRACE LIMIT
#   EXEC   the command's id
#   GRACE  milliseconds between TERM and KILL; 0 for KILL at once
#   LIMIT  milliseconds to go on with KILL while anything is left
# Input:  none.
# Output: "FOUND KILLED LEFT HOW": how many processes there were, 1 where KILL was needed and else 0, how many are
#         left, and how they were found: "cgroup" or "scan".
# Exit:   means nothing.
tree=/sys/fs/cgroup/unified # where a hybrid host mounts it; a pure one does at the top
[ -d "$tree" ] || tree=/sys/fs/cgroup
group=$tree/gateway/$1
how=cgroup
[ -e "$group/cgroup.procs" ] || how=scan

list() { # EXEC: prints what is in the control group, and what carries the marker in its environment; no zombies
  {
    [ "$how" = scan ] || cat "$group/cgroup.procs" 2>/dev/null
    grep -lsxzF "GATEWAY_EXEC=$1" /proc/[0-9]*/environ | while IFS=/ read -r _ _ pid _; do
      # its state is behind its name, which may be anything
      stat=$(cat "/proc/$pid/stat" 2>/dev/null)
      case ${stat##*') '} in
        Z* | '') ;;
        *) echo "$pid" ;;
      esac
    done
  } | sort -u
}

killed=0
left=$(list "$1")
found=$(printf %s "$left" | wc -w)
# shellcheck disable=SC2086 # a list of numbers
[ "$2" -le 0 ] || [ -z "$left" ] || kill -TERM $left 2>/dev/null
waited=0
while [ -n "$left" ] && [ "$waited" -lt "$2" ]; do
  sleep 0.02
  waited=$((waited + 20))
  left=$(list "$1")
done
waited=0
while [ -n "$left" ] && [ "$waited" -lt "$3" ]; do
  killed=1
  [ "$how" = scan ] || echo 1 2>/dev/null >"$group/cgroup.kill"
  # shellcheck disable=SC2086 # a list of numbers
  kill -KILL $left 2>/dev/null
  sleep 0.02
  waited=$((waited + 20))
  left=$(list "$1")
done
rmdir "$group" 2>/dev/null
# shellcheck disable=SC2046 # words without the blanks that some `wc` print
echo $((found)) "$killed" $(printf %s "$left" | wc -w) "$how"
