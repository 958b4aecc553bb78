#!/usr/bin/env bash
# The first process of a member, in its new namespaces: power_on.sh STATE NAME ADDRESS/BITS ROUTER
# It mounts what is the member's own, waits for its cable, then reaps for ever. STATE/booted says that all is there.
set -euo pipefail

state=$1 name=$2 address=$3 router=$4

hierarchies() { awk '$3 == "cgroup" || $3 == "cgroup2" { print $2, $3, $4 }' /proc/self/mounts; }

mount --make-rprivate /
hostname "$name"
# what other Incus of this machine have mounted is theirs: a copy here would keep it busy
awk '$2 ~ "^/var/lib/incus" { print $2 }' /proc/self/mounts | sort -r | while read -r busy; do
  umount --lazy "$busy"
done
list=$(hierarchies)
mount -t proc proc /proc
# a sysfs that shows this network namespace, and the hierarchies again, rooted at this member's cgroup
mount -t sysfs sysfs /sys
if grep -q '^/sys/fs/cgroup cgroup2' <<<"$list"; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  while read -r at kind options; do
    mkdir -p "$at"
    case $kind in
      cgroup2) mount -t cgroup2 cgroup2 "$at" ;;
      *)
        controllers=$(sed -E 's/(^|,)(rw|ro|nosuid|nodev|noexec|relatime|xattr|clone_children|release_agent=[^,]*)//g; s/^,//' <<<"$options")
        [[ $controllers == name=* ]] && controllers=none,$controllers
        mount -t cgroup -o "$controllers" cgroup "$at"
        ;;
    esac
  done <<<"$list"
fi
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
for pair in incus:/var/lib/incus log:/var/log/incus gateway:/var/lib/incus-gateway \
  caddy:/var/lib/incus-gateway-caddy etc:/etc/incus-gateway; do
  mkdir -p "$state/${pair%%:*}" "${pair#*:}"
  mount --bind "$state/${pair%%:*}" "${pair#*:}"
done
ip link set lo up
for _ in $(seq 500); do # the cable comes from outside
  [ -e /sys/class/net/eth0 ] && break
  sleep 0.02
done
ip link set eth0 up
ip address add "$address" dev eth0
ip route add default via "$router"
touch "$state/booted"
exec -a "member-$name" bash -c 'trap : TERM INT HUP; while :; do sleep 1000000 & wait $!; done'
