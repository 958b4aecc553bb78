#!/bin/sh
# LXC runs this on the host before it starts a tenant, and starts none if it fails: it puts the table of addresses in
# force, unless it is. After a reboot, Incus starts tenants before the gateway.
#
# Usage:  NETWORK TENANT lxc pre-start
# Input:  none.
# Output: none.
# Exit:   0 if the table is in force.
NFT list chain bridge TABLE ports >/dev/null 2>&1 || exec NFT -f FILE
