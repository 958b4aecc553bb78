# Has the old path $2 lead to the workspace $1, so that what names it by its full path works here too.
set -eu
if [ "$1" = "$2" ] || [ -e "$2" ]; then exit 0; fi
mkdir -p "$(dirname "$2")"
ln -s "$1" "$2"
