# Turns a Debian tree into the tenants' base image: adds their user and workspace, and removes units that are of no
# use in a container.
#
# Usage:  sh finish_image.sh ROOT UID USER WORKSPACE MASKED GENERATORS
#   ROOT        the root of the tree
#   UID, USER   the user who owns the workspace
#   WORKSPACE   the workspace's path inside the tree
#   MASKED      the units to mask, separated by spaces
#   GENERATORS  the systemd generators to mask, separated by spaces
# Input:  none.
# Output: that of the programs it runs.
# Exit:   0 on success.
set -eu
root="$1" uid="$2" user="$3" workspace="$4" masked="$5" generators="$6"
chroot "$root" groupadd --gid "$uid" "$user"
chroot "$root" useradd --uid "$uid" --gid "$uid" --create-home --home-dir "/home/$user" --shell /bin/bash "$user"
# so that the user can read the log of the site and of everything else in the container
chroot "$root" usermod --append --groups systemd-journal "$user"
install -d -m 0755 -o "$uid" -g "$uid" "$root$workspace"
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
ln -s /usr/bin/vim.tiny "$root/usr/local/bin/vim"
# only to speed up the build
sed -i /^force-unsafe-io$/d "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
# No Debian program here is written in Python, so `pip install` can break none.
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
install -d "$root/var/log/journal"
chroot "$root" systemctl --quiet enable announce-address.service
# shellcheck disable=SC2086 # words
chroot "$root" systemctl --quiet mask $masked
install -d "$root/etc/systemd/system-generators" "$root/etc/tmpfiles.d"
for name in $generators; do ln -s /dev/null "$root/etc/systemd/system-generators/$name"; done
ln -s /dev/null "$root/etc/tmpfiles.d/systemd-nologin.conf"
# its socket starts it on first use
rm -f "$root/usr/lib/systemd/system/multi-user.target.wants/dbus.service"
rm -f "$root"/usr/lib/systemd/system/sysinit.target.wants/systemd-udev*.service
rm -f "$root/etc/resolv.conf"
chroot "$root" journalctl --update-catalog
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root/etc/hostname" "$root/etc/apt/apt.conf.d/99mmdebstrap"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/var/log/apt
# so that the first start runs no update services such as ldconfig (see systemd-update-done.service)
touch "$root/etc/.updated" "$root/var/.updated"
