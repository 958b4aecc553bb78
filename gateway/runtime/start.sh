# Starts the shell that waits for a command: joins a control group of its own, becomes the command's user, and
# goes on with wait.sh.
#
# Usage:  sh -c "$(cat start.sh)" sh EXEC LOOKS TERMINAL WAIT [NAME [UID GID HOME]]
#   EXEC      the command's id, which names its control group and marks its processes
#   LOOKS     how often to look, 50 ms apart, for the tree of control groups: systemd mounts it only some 100 ms
#             after a container's start, and a command that runs before it could only be found by its marker
#   TERMINAL  not empty where standard input is a terminal
#   WAIT      the text of wait.sh
#   NAME …    the user. Without a NAME the user stays; a NAME without UID is looked up, and a number that has no
#             entry is its own group.
# Input:  is left to wait.sh.
# Output: on standard error "\001E user" where there is no such user, else what wait.sh says.
# Exit:   126 where there is no such user, else as wait.sh.
looks=$2
while
  tree=/sys/fs/cgroup/unified # where a hybrid host mounts it; a pure one does at the top
  [ -d "$tree" ] || tree=/sys/fs/cgroup
  [ ! -e "$tree/cgroup.procs" ] && [ "$looks" -gt 0 ]
do
  looks=$((looks - 1))
  sleep 0.05
done
group=$tree/gateway/$1
how=scan
{ mkdir -p "$group" && echo 0 >"$group/cgroup.procs" && how=cgroup; } 2>/dev/null
export GATEWAY_EXEC="$1"

terminal='' modes=''
if [ -n "$3" ]; then
  export TERM=xterm-256color
  modes=$(stty -g) terminal=$(tty)
  # the line must not be echoed, nor end at the 4096 bytes that a terminal takes of one
  stty raw -echo
fi

wait_script=$4 name=$5 uid=$6 gid=$7 home=$8 shell=/bin/bash groups=--init-groups
if [ -n "$name" ] && [ -z "$uid" ]; then
  if entry=$(getent passwd "$name"); then
    IFS=: read -r name _ uid gid _ home shell <<ENTRY
$entry
ENTRY
    shell=${shell:-/bin/sh}
  else
    case $name in
      *[!0-9]*)
        printf '\001E user\n' >&2
        exit 126
        ;;
    esac
    uid=$name gid=$name home=/ shell=/bin/sh groups=--clear-groups
  fi
fi
set -- "$how" "$terminal" "$modes"
if [ -n "$name" ]; then
  export HOME="$home" USER="$name" LOGNAME="$name" SHELL="$shell"
  if [ "$uid" != 0 ]; then
    exec setpriv "--reuid=$uid" "--regid=$gid" "$groups" -- /bin/sh -c "$wait_script" sh "$@"
  fi
fi
eval "$wait_script"
