# Keeps a site's environment where its root alone reads it.
#
# Usage:  sh -c "$(cat keep_environment.sh)" sh FILE
#   FILE  where it is kept
# Input:  what systemd calls an EnvironmentFile. It may hold secrets, and a command line shows on the host.
# Output: nothing but what fails.
# Exit:   0 once it is there.
umask 077
cat >"$1"
