# Formats a text with the site's own Prettier, if the site configures it.
# Usage: prettier.sh PATH, from the workspace; the file need not exist.
# Input: the text. Output: the formatted text; Prettier's errors.
# Exit: Prettier's, or 69 without Prettier or without a configuration for this file.
set -u
program=node_modules/.bin/prettier
[ -x "$program" ] && "$program" --find-config-path "$1" >/dev/null 2>&1 || exit 69
exec "$program" --stdin-filepath "$1"
