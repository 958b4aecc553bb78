# Prints the end of a site's log, from a folder anywhere below its tenant's root.
#
# Usage:  sh -c "$(cat local_log.sh)" sh LINES [-F]
#   LINES  how many of its lines
#   -F     go on with what comes
# Input:  none.
# Output: the lines; nothing where there is no log.
# Exit:   as tail.
#
# The log lies beside the root, in which the tenant could put a link in its place.
exec tail -n "$@" "${PWD%/root/*}/site.log" 2>/dev/null
