# Stores a site's environment where only root can read it.
#
# Usage:  sh -c "$(cat keep_environment.sh)" sh FILE
#   FILE  the file to write
# Input:  a systemd EnvironmentFile. It may contain secrets, and command lines are visible on the host.
# Output: only errors.
# Exit:   0 once it is written.
umask 077
cat >"$1"
