# Installs a language server for the site's user: the very packages that a lockfile names, none of whose scripts run.
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
# not where the site's own configuration of npm would hold
(cd "$new" && npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error) >/dev/null
# another window may have been quicker
[ -e "$folder" ] || mv -T "$new" "$folder" 2>/dev/null || [ -e "$folder" ]
