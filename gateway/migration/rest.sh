# Ends the next site that was tried; its files stay.
systemctl stop site-next.service 2>/dev/null
rm -f /run/systemd/system/site-next.service
systemctl daemon-reload
