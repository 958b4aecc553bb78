# Ends the next site that was tried; its files stay.
#
# Usage:  sh -c "$(cat rest.sh)" rest
# Input:  none.
# Output: nothing but what fails.
# Exit:   0 once it is gone.
systemctl stop site-next.service 2>/dev/null
rm -f /run/systemd/system/site-next.service
systemctl daemon-reload
