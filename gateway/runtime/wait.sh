# Waits for a command and becomes it.
#
# Usage:  sh -c "$(cat wait.sh)" sh HOW TERMINAL MODES
#   HOW       how the command's processes can be found: "cgroup" or "scan"
#   TERMINAL  the terminal on standard input, or empty
#   MODES     the terminal's modes (`stty -g`) before it became raw, or empty
# Input:  one line, built by `launcher.command_line`: it calls `enter`, exports the environment, prints "\001K" to
#         standard error, and becomes the command. The rest of a long line is read by `head`, because `read` makes
#         a system call per byte. The command's own input must not be sent before "\001K" was printed.
# Output: on standard error "\001R PID HOW TERMINAL" once it is ready; "\001E cwd", "\001E 127" (program not found)
#         or "\001E 126" (not executable) if the command cannot start, which distinguishes these from the
#         program's own exit codes.
# Exit:   0 if the input ends without a line, 126 or 127 after an E, else that of the command.

enter() { # FOLDER PROGRAM PATH [ROWS COLUMNS]: enters the folder and checks whether the program can be run
  # Incus changes the size, too, but perhaps only when the command has looked
  [ -z "$_gateway_modes" ] || stty ${4:+rows "$4" cols "$5"} "$_gateway_modes"
  cd -- "$1" 2>/dev/null || {
    printf '\001E cwd\n' >&2
    exit 126
  }
  unset OLDPWD
  _gateway_found=127
  case $2 in
    */*)
      [ ! -e "$2" ] || _gateway_found=126
      [ ! -f "$2" ] || [ ! -x "$2" ] || _gateway_found=0
      ;;
    *)
      _gateway_path=$3: # so that an empty last entry counts too
      IFS=:
      set -f
      for _gateway_folder in $_gateway_path; do
        [ -f "${_gateway_folder:-.}/$2" ] || continue
        _gateway_found=126
        [ ! -x "${_gateway_folder:-.}/$2" ] || { _gateway_found=0 && break; }
      done
      unset IFS
      set +f
      ;;
  esac
  [ "$_gateway_found" = 0 ] || {
    printf '\001E %s\n' "$_gateway_found" >&2
    exit "$_gateway_found"
  }
}

# for this shell only: in a UTF-8 locale bash misreads some invalid bytes
[ -n "${LC_ALL+set}" ] || LC_ALL=C
printf '\001R %s %s %s\n' "$$" "$1" "$2" >&2
IFS= read -r _gateway_line || exit 0
_gateway_modes=$3
# the line uses "$1" for a newline, a name that no environment variable can have
set -- '
'
eval "$_gateway_line"
