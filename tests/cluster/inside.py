"""What a member of the tests' cluster does in its namespaces: `python -m tests.cluster.inside ACTION`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from gateway.host import HostError, caddy_service
from gateway.host.caddy_service import CaddyService
from gateway.host.cluster import add_member, enable_cluster, join_cluster, recover_from_quorum_loss
from gateway.host.daemon import Daemon
from gateway.host.gateway_process import GatewayProcess, QuickstartFiles
from gateway.host.image import build_image
from gateway.host.requirements import doctor, setup
from gateway.settings import Settings
from tests.integration import environment
from tests.live import SECRET
from tests.waits import until_true

CHECKOUT: Final = Path(__file__).parents[2]
PROGRAM: Final = Path(sys.executable).with_name("incus-gateway")


def settings() -> Settings:
    """Return the settings of the member's gateway: those of its environment, and what quickstart chooses."""
    given = Settings(
        tenant_disk="2GiB",
        tenant_memory="512MiB",
        caddy_issuer="internal",
        domain_suffixes=("localhost", "test", "example.com"),
        settle_time=0.2,
        # chosen each time, they would be others while Caddy has them
        caddy_http=80,
        caddy_https=443,
        caddy_ask=2020,
    )
    return given.model_copy(update=caddy_service.chosen(given))


def gateway(of: Settings) -> GatewayProcess:
    variables = {
        **environment.variables(of),
        "GATEWAY_STATE_DIR": str(of.state_dir),
        "GATEWAY_SECRET": SECRET,
        "GATEWAY_DOMAIN_SUFFIXES": ",".join(of.domain_suffixes),
    }
    return GatewayProcess(of, QuickstartFiles(of.state_dir), None, PROGRAM, variables)


def start_gateway() -> None:
    """Have the gateway and its Caddy run; those that do go on, but for a gateway of another checkout."""
    print(CaddyService(settings()).start(CHECKOUT / "deploy"))
    print(gateway(settings()).ensure(f"tests of {CHECKOUT}", print))


def end_gateway(number: signal.Signals) -> None:
    """Send the gateway's process a signal, and return once it is gone; Caddy and what is held go on."""
    running = gateway(settings())
    if (pid := running.pid()) is not None:
        os.kill(pid, number)
        until_true(lambda: running.pid() != pid, 60)


def stop_incusd() -> None:
    """Have incusd end by itself, as an upgrade of its package does, which waits longer than this."""
    pid = Daemon().pid()
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    until_true(lambda: Daemon().pid() != pid, 60)


def command(*words: str) -> int:
    """Run the command line, as an operator of this member would."""
    of = settings()
    variables = {**os.environ, **environment.variables(of), "GATEWAY_STATE_DIR": str(of.state_dir)}
    variables |= {"GATEWAY_SECRET": SECRET, "GATEWAY_LISTEN": f"127.0.0.1:{of.listen.rpartition(':')[2]}"}
    return subprocess.run([PROGRAM, *words], env=variables, check=False).returncode


def main(words: list[str]) -> int:
    """Do one action; those of the gateway's own commands are what these call."""
    try:
        match words:
            case ["incusd"]:
                Daemon().ensure(print)
            case ["found"]:
                setup(settings(), print)
                build_image(settings(), print)
            case ["enable"]:
                enable_cluster(settings(), os.environ["TEST_NAME"], "", print)
            case ["add"]:
                print(add_member(settings(), os.environ["TEST_NAME"]))
            case ["join"]:
                join_cluster(settings(), os.environ["TEST_TOKEN"], print)
                setup(settings(), print)
            case ["recover"]:
                recover_from_quorum_loss(settings(), print)
            case [("drain" | "restore") as action]:
                return command("cluster", action, os.environ["TEST_NAME"])
            case ["members"]:
                return command("cluster", "list")
            case ["setup"]:
                setup(settings(), print)
            case ["doctor"]:
                print(*doctor(settings()), sep="\n")
            case ["gateway"]:
                start_gateway()
            case ["all"]:
                Daemon().ensure(print)
                start_gateway()
            case [("kill" | "term") as how, "incusd"]:
                if how == "kill":
                    Daemon().kill()
                else:  # it would wait for commands under way, for minutes
                    Daemon().stop(instances=False, timeout=10)
            case ["stop", "incusd"]:
                stop_incusd()
            case [("kill" | "term") as how, "gateway"]:
                end_gateway(signal.SIGKILL if how == "kill" else signal.SIGTERM)
            case ["ungateway"]:
                gateway(settings()).stop()
                CaddyService(settings()).stop()
            case _:
                return 2
    except HostError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
