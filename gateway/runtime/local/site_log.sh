# Prints the end of a site's log, run from any folder below its tenant's root.
#
# Usage:  sh -c "$(cat site_log.sh)" sh LINES [-F]
#   LINES  number of lines
#   -F     keep printing new lines
# Input:  none.
# Output: the lines; nothing if there is no log.
# Exit:   that of tail.
#
# The log is beside the root, because inside it the tenant could replace it by a link.
exec tail -n "$@" "${PWD%/root/*}/site.log" 2>/dev/null
