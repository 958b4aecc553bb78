# Starts the next site where it sees no process of the live one, since dev servers refuse to run twice: in a PID
# namespace, which systemd makes (PrivatePIDs=).
#
# Its process ids are high, so that a lock that it leaves behind names no process of the container. It is not process 1,
# which the kernel shields from signals.
#
# Usage:  sh -c "$(cat apart.sh)" sh USER PROGRAM ARGUMENT…
#   USER  the site's user; this script runs as root
# Input:  none.
# Output: the program's.
# Exit:   the program's; 0 after SIGTERM, once it has ended.
user="$1"
shift
echo 30000 2>/dev/null >/proc/sys/kernel/ns_last_pid
trap 'kill "$!"; wait "$!"; exit 0' TERM
# by its path, since PATH is as the site has it
/usr/bin/setpriv --reuid="$user" --regid="$user" --init-groups --inh-caps=-all "$@" &
wait "$!"
