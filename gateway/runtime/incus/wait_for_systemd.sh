# Waits until systemd listens; right after a container's start, it does not yet, and has not mounted /run.
#
# Usage:  before a script that calls systemctl or writes to /run; see script_files.py
for _ in $(seq 400); do
  [ -S /run/systemd/private ] && break
  sleep 0.05
done
