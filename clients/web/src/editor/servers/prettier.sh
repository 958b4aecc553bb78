# Formats a text as the site's own Prettier does, where the site says how.
# Usage: prettier.sh PATH, from the workspace; the file need not exist.
# Input: the text. Output: the formatted text; Prettier's errors.
# Exit: Prettier's, or 69 without Prettier, or where no configuration of it is for this file.
set -u
program=node_modules/.bin/prettier
[ -x "$program" ] && "$program" --find-config-path "$1" >/dev/null 2>&1 || exit 69
exec "$program" --stdin-filepath "$1"
