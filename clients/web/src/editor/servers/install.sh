# Installs a language server for the site's user: exactly the packages of a lockfile, without running their scripts.
# Usage: install.sh FOLDER, below the home; PACKAGE and LOCK in the environment are its package.json and lockfile.
# Input: none. Output: none; npm's errors.
# Exit: npm's.
set -eu
folder=$HOME/$1
mkdir -p "${folder%/*}"
new=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$new"' EXIT
printf %s "$PACKAGE" >"$new/package.json"
printf %s "$LOCK" >"$new/package-lock.json"
# in a folder where the site's own npm configuration does not apply
(cd "$new" && npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error) >/dev/null
# another window may have been faster
[ -e "$folder" ] || mv -T "$new" "$folder" 2>/dev/null || [ -e "$folder" ]
