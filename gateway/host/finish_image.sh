# Makes a Debian tree the base image of tenants: their user, their workspace, and no unit that a container has no use
# for.
#
# Usage:  sh finish_image.sh ROOT UID USER WORKSPACE MASKED GENERATORS
#   ROOT        the tree
#   UID, USER   the workspace's user
#   WORKSPACE   the folder that becomes that user's
#   MASKED      units, with blanks between them
#   GENERATORS  programs that make units, with blanks between them
# Input:  none.
# Output: what the programs say.
# Exit:   0 once all is done.
set -eu
root="$1" uid="$2" user="$3" workspace="$4" masked="$5" generators="$6"
chroot "$root" groupadd --gid "$uid" "$user"
chroot "$root" useradd --uid "$uid" --gid "$uid" --create-home --home-dir "/home/$user" --shell /bin/bash "$user"
# may read the log of its site, and of all else in its container
chroot "$root" usermod --append --groups systemd-journal "$user"
install -d -m 0755 -o "$uid" -g "$uid" "$root$workspace"
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
ln -s /usr/bin/vim.tiny "$root/usr/local/bin/vim"
# the build's own haste
sed -i /^force-unsafe-io$/d "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
# Nothing of Debian's is written in Python here, so `pip install` may do what is asked of it.
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
install -d "$root/var/log/journal"
chroot "$root" systemctl --quiet enable announce-address.service
# shellcheck disable=SC2086 # words
chroot "$root" systemctl --quiet mask $masked
install -d "$root/etc/systemd/system-generators" "$root/etc/tmpfiles.d"
for name in $generators; do ln -s /dev/null "$root/etc/systemd/system-generators/$name"; done
ln -s /dev/null "$root/etc/tmpfiles.d/systemd-nologin.conf"
# started by who asks for it, through its socket
rm -f "$root/usr/lib/systemd/system/multi-user.target.wants/dbus.service"
rm -f "$root"/usr/lib/systemd/system/sysinit.target.wants/systemd-udev*.service
rm -f "$root/etc/resolv.conf"
chroot "$root" journalctl --update-catalog
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root/etc/hostname" "$root/etc/apt/apt.conf.d/99mmdebstrap"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/var/log/apt
# nothing is left for a first start to bring up to date (systemd-update-done.service), as by ldconfig
touch "$root/etc/.updated" "$root/var/.updated"
