# Kills a command's whole process tree, like `CommandCgroup.kill` on the host, if the host's cgroups are not accessible.
#
# Usage:  sh -c "$(cat kill.sh)" sh EXEC GRACE LIMIT
#   EXEC   the command's id
#   GRACE  milliseconds between TERM and KILL; 0 to send KILL at once
#   LIMIT  milliseconds to keep sending KILL while anything is left
# Input:  none.
# Output: "FOUND KILLED LEFT HOW": number of processes found, 1 if KILL was needed and 0 if not, number of
#         processes left, and how they were found: "cgroup" or "scan".
# Exit:   undefined.
tree=/sys/fs/cgroup/unified # on a hybrid host; on a pure v2 host the parent folder
[ -d "$tree" ] || tree=/sys/fs/cgroup
group=$tree/gateway/$1
how=cgroup
[ -e "$group/cgroup.procs" ] || how=scan

list() { # EXEC: prints the pids in the cgroup and those with the marker in their environment, except zombies
  {
    [ "$how" = scan ] || cat "$group/cgroup.procs" 2>/dev/null
    grep -lsxzF "GATEWAY_EXEC=$1" /proc/[0-9]*/environ | while IFS=/ read -r _ _ pid _; do
      # the state follows the name, which may contain anything
      stat=$(cat "/proc/$pid/stat" 2>/dev/null)
      case ${stat##*') '} in
        Z* | '') ;;
        *) echo "$pid" ;;
      esac
    done
  } | sort -u
}

seen=none
look() { # EXEC: sets `left`, and `new` to what was not seen before: a process that just becomes a program is not found
  left=$(list "$1")
  new=$(printf %s "$left" | grep -vxFe "$seen" 2>/dev/null) # of too many, as a fork bomb makes them, none is new
  [ -z "$new" ] || seen=$(printf '%s\n%s' "$seen" "$new")
}

killed=0
look "$1"
waited=0
while [ -n "$left" ] && [ "$waited" -lt "$2" ]; do
  # shellcheck disable=SC2086 # a list of numbers
  [ -z "$new" ] || kill -TERM $new 2>/dev/null
  sleep 0.02
  waited=$((waited + 20))
  look "$1"
done
waited=0
while [ -n "$left" ] && [ "$waited" -lt "$3" ]; do
  killed=1
  [ "$how" = scan ] || echo 1 2>/dev/null >"$group/cgroup.kill"
  # shellcheck disable=SC2086 # a list of numbers
  kill -KILL $left 2>/dev/null
  sleep 0.02
  waited=$((waited + 20))
  look "$1"
done
rmdir "$group" 2>/dev/null
# shellcheck disable=SC2046 # splitting removes the blanks that some `wc` print
echo $(printf %s "$seen" | grep -c '[0-9]') "$killed" $(printf %s "$left" | wc -w) "$how"
