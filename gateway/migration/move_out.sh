# Takes the site that was switched to out of the workspace: back to the copy where it never ran, else to a name at
# which it is kept.
#
# Usage:  sh -c "$(cat move_out.sh)" move_out WORKSPACE COPY PREFIX UID
#   PREFIX  what that name begins with: the first number that is free, behind a hyphen, makes it
#   UID     the site's user and group
# Input:  none.
# Output: the name, where the site is kept.
# Exit:   0 once the workspace is an empty folder without a service. It may be called again.
set -eu
unit=/etc/systemd/system/site.service
if [ ! -e "$2" ] && [ -n "$(ls -A "$1" 2>/dev/null)" ]; then
  if [ -f $unit ]; then
    systemctl --quiet disable --now site.service
    number=1
    while [ -e "$3-$number" ]; do number=$((number + 1)); done
    mv -T "$1" "$3-$number"
    echo "$3-$number"
  else
    mv -T "$1" "$2"
  fi
fi
rm -f $unit
systemctl daemon-reload
install -d -m 0755 -o "$4" -g "$4" "$1"
