# Drops what a terminal holds and gets, until standard input ends, and leaves the terminal's modes as they were.
#
# Usage:  sh -c "$(cat drain.sh)" sh TERMINAL
#   TERMINAL  its path
# Input:  nothing; it ends when the draining is to end.
# Output: "\001D" once it drains; nothing where there is no such terminal.
# Exit:   0 where there is no such terminal, else means nothing.
modes=$(stty -g <"$1") || exit 0
stty raw -echo <"$1"
cat <"$1" >/dev/null &
printf '\001D\n'
read -r _
kill $!
stty "$modes" <"$1"
