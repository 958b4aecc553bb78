# Keeps the variables of the site where its root alone reads them.
#
# Usage:  sh -c "$(cat keep.sh)" keep
# Input:  what systemd calls an EnvironmentFile: it may hold secrets.
# Output: nothing but what fails.
# Exit:   0 once it is there.
umask 077
cat >/etc/site.env
