# Waits for a command and becomes it.
#
# Usage:  sh -c "$(cat wait.sh)" sh HOW TERMINAL MODES
#   HOW       how the command's processes can be found: "cgroup" or "scan"
#   TERMINAL  the terminal on standard input, or empty
#   MODES     what `stty -g` said of it before it became raw, or empty
# Input:  one line, made by `launcher.command_line`: it calls `enter`, exports the environment, says "\001K" on
#         standard error, and becomes the command. A long one has its rest read by `head`, since `read` asks
#         the kernel for each byte. The command's own input must not come before "\001K" was said.
# Output: on standard error "\001R PID HOW TERMINAL" once it waits; "\001E cwd", "\001E 127" (no such program) or
#         "\001E 126" (cannot be executed) where the command cannot start, so that these are told from a
#         program's own exit codes.
# Exit:   0 where the input ends without a line, 126 or 127 after an E, else as the command.

enter() { # FOLDER PROGRAM PATH: goes to the folder and looks whether the program can be run
  [ -z "$_gateway_modes" ] || stty "$_gateway_modes"
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
      _gateway_path=$3: # an empty folder at its end counts too
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

# for this shell alone: bash takes some bytes that are not UTF-8 for others where it expects that
[ -n "${LC_ALL+set}" ] || LC_ALL=C
printf '\001R %s %s %s\n' "$$" "$1" "$2" >&2
IFS= read -r _gateway_line || exit 0
_gateway_modes=$3
# the line says "$1" for a newline: no variable of the command's environment has that name
set -- '
'
eval "$_gateway_line"
