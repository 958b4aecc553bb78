# Takes the site that was switched to out of the workspace $1: back to the copy $2 where it never ran, else to
# the first free name that begins with $3, which is said.
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
