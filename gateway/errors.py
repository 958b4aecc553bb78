"""Every error of the gateway, each with its wire code: those of `gateway_client.errors`."""

# ruff: noqa: F403 - the same names, for both ends of the wire
from gateway_client.errors import *
from gateway_client.errors import WIRE_CODES as WIRE_CODES
from gateway_client.errors import rpc_code as rpc_code
