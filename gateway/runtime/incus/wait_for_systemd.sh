# Stands before each script that uses systemd or writes to /run: waits until systemd listens, 20 s at most. Right after a
# container's start it does not yet, and has not mounted /run.
#
# Usage:  sh -c "$(cat wait_for_systemd.sh start_service.sh)" sh …
# Input:  none, so that it is left to the script that follows.
# Output: none.
# Exit:   that of the script that follows.
for _ in $(seq 400); do
  [ -S /run/systemd/private ] && break
  sleep 0.05
done
