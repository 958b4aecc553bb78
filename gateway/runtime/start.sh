# Starts the shell that waits for a command: joins a separate cgroup, becomes the command's user, and continues
# with wait.sh.
#
# Usage:  sh -c "$(cat start.sh)" sh EXEC LOOKS TERMINAL WAIT [NAME [UID GID HOME]]
#   EXEC      the command's id, which names its cgroup and marks its processes
#   LOOKS     number of attempts, 50 ms apart, to find the cgroup tree: systemd mounts it only some 100 ms after a
#             container's start, and a command started before that could be found only by its marker
#   TERMINAL  not empty if standard input is a terminal
#   WAIT      the text of wait.sh
#   NAME …    the user. Without NAME the user is not changed; a NAME without UID is looked up, and a number without
#             an entry is used as its group, too.
# Input:  left to wait.sh.
# Output: on standard error "\001E user" if there is no such user, else the output of wait.sh.
# Exit:   126 if there is no such user, else that of wait.sh.

# A shell exports changes to variables that it inherited, and the operator may set any variable for commands
# (`environment.…` of an instance). So all variables set here and in wait.sh begin with `_gateway_`.
_gateway_looks=$2
while
  _gateway_tree=/sys/fs/cgroup/unified # on a hybrid host; on a pure v2 host the parent folder
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
  # the line must not be echoed, nor cut off at a terminal's limit of 4096 bytes
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
    # The user's own programs, as installed by npm, pip, uv, pnpm and bun, come first in PATH, but only after root's
    # last lookup.
    # shellcheck disable=SC2016 # the user's shell expands it
    exec setpriv "--reuid=$_gateway_uid" "--regid=$_gateway_gid" "$_gateway_groups" -- /bin/sh -c \
      'PATH=$HOME/.local/bin:$HOME/.local/share/pnpm/bin:$HOME/.bun/bin:$PATH
'"$_gateway_wait" sh "$@"
  fi
fi
eval "$_gateway_wait"
