# Discards a terminal's input, buffered and new, until standard input ends; then restores the terminal's modes.
#
# Usage:  sh -c "$(cat drain.sh)" sh TERMINAL
#   TERMINAL  the terminal's path
# Input:  nothing; its end stops the script.
# Output: "\001D" once it has started; nothing if there is no such terminal.
# Exit:   0 if there is no such terminal, else undefined.
modes=$(stty -g <"$1") || exit 0
stty raw -echo <"$1"
cat <"$1" >/dev/null &
printf '\001D\n'
read -r _
kill $!
stty "$modes" <"$1"
