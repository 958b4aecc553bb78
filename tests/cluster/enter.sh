#!/bin/sh
# Runs a command in a member's cgroup: enter.sh 'FOLDER…' COMMAND…
set -eu

for folder in $1; do
  parent=${folder%/*}
  mkdir -p "$folder"
  if [ -e "$folder/cpuset.cpus" ] && [ ! -e "$folder/cgroup.controllers" ]; then
    # in the old hierarchy a new cpuset holds nothing, and nothing may run in it
    for each in "$parent" "$folder"; do
      cat "${parent%/*}/cpuset.cpus" >"$each/cpuset.cpus"
      cat "${parent%/*}/cpuset.mems" >"$each/cpuset.mems"
    done
  fi
  echo $$ >"$folder/cgroup.procs"
done
shift
exec "$@"
