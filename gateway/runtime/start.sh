# Starts the shell that waits for a command: joins a separate control group, becomes the command's user, and
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

# A shell hands on what it sets of a variable that it was given, and whoever runs the host may give any name to
# commands (`environment.…` of an instance): so all that this and wait.sh set begins with `_gateway_`.
_gateway_looks=$2
while
  _gateway_tree=/sys/fs/cgroup/unified # where a hybrid host mounts it; a pure one does at the top
  [ -d "$_gateway_tree" ] || _gateway_tree=/sys/fs/cgroup
  [ ! -e "$_gateway_tree/cgroup.procs" ] && [ "$_gateway_looks" -gt 0 ]
do
  _gateway_looks=$((_gateway_looks - 1))
  sleep 0.05
done
_gateway_group=$_gateway_tree/gateway/$1
_gateway_how=scan
{ mkdir -p "$_gateway_group" && echo 0 >"$_gateway_group/cgroup.procs" && _gateway_how=cgroup; } 2>/dev/null
export GATEWAY_EXEC="$1"

_gateway_terminal='' _gateway_modes=''
if [ -n "$3" ]; then
  export TERM=xterm-256color
  _gateway_modes=$(stty -g) _gateway_terminal=$(tty)
  # the line must not be echoed, nor end at the 4096 bytes that a terminal takes of one
  stty raw -echo
fi

_gateway_wait=$4 _gateway_name=$5 _gateway_uid=$6 _gateway_gid=$7 _gateway_home=$8
_gateway_shell=/bin/bash _gateway_groups=--init-groups
if [ -n "$_gateway_name" ] && [ -z "$_gateway_uid" ]; then
  if _gateway_entry=$(getent passwd "$_gateway_name"); then
    IFS=: read -r _gateway_name _ _gateway_uid _gateway_gid _ _gateway_home _gateway_shell <<ENTRY
$_gateway_entry
ENTRY
    _gateway_shell=${_gateway_shell:-/bin/sh}
  else
    case $_gateway_name in
      *[!0-9]*)
        printf '\001E user\n' >&2
        exit 126
        ;;
    esac
    _gateway_uid=$_gateway_name _gateway_gid=$_gateway_name _gateway_home=/
    _gateway_shell=/bin/sh _gateway_groups=--clear-groups
  fi
fi
set -- "$_gateway_how" "$_gateway_terminal" "$_gateway_modes"
if [ -n "$_gateway_name" ]; then
  export HOME="$_gateway_home" USER="$_gateway_name" LOGNAME="$_gateway_name" SHELL="$_gateway_shell"
  if [ "$_gateway_uid" != 0 ]; then
    # Programs that the user installed, where npm, pip, uv, pnpm and bun put them, come first, but only once root
    # has looked up its last.
    # shellcheck disable=SC2016 # the user's shell expands it
    exec setpriv "--reuid=$_gateway_uid" "--regid=$_gateway_gid" "$_gateway_groups" -- /bin/sh -c \
      'PATH=$HOME/.local/bin:$HOME/.local/share/pnpm/bin:$HOME/.bun/bin:$PATH
'"$_gateway_wait" sh "$@"
  fi
fi
eval "$_gateway_wait"
