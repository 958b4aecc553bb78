"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any, Final

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from gateway.storage.store import FILE
from gateway.storage.writer import memory_log_path
from tests import forks, thorough

EXTENSIONS: Final = "incus_gateway.extensions"
E2E: Final = "tests/e2e/"
THOROUGH: Final = "thorough"
LONGEST: Final = (
    E2E,
    *(
        f"tests/integration/test_{name}.py"
        for name in (
            *(
                "survive",
                "gateway_incus",
                "domains",
                "rollback",
                "quotas",
                "upgrade",
                "stalls",
                "runtime_incus",
            ),
            *("deployments_faults", "survive_tools", "files", "deployments_pool", "deployments_refusals"),
            *("network", "agent_commands", "deployments", "host_isolation", "idle", "claude"),
        )
    ),
)
# tests of what a gateway is from its start: what it takes of memory, who finds it, what takes its place
STARTS: Final = frozenset(
    f"test_{name}.py"
    for name in (
        *("broker", "capacity", "gateway_budget", "host_quickstart", "pressure", "stalls"),
        *("systemd", "upgrade"),
    )
)

# how long an example takes, and how long it is to be made, is the machine's affair
hypothesis.settings.register_profile(
    "tests",
    max_examples=thorough.examples(100),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("tests")

# a failed assertion of a helper shows its values too, unless the helper is imported above
pytest.register_assert_rewrite(
    *(f"tests.{folder}" for folder in ("cluster", "contracts", "e2e", "integration", "starters", "unit")),
    *(f"tests.{module}" for module in ("live", "messages", "neighbour", "shapes", "steady", "waits")),
    "tests.typescript",
)

_FILES: Final = 25  # that are told

_left_out: dict[str, int] = {}  # by worker: each collects all tests


class Progress:
    """Names what fails at once: a run that is cut off tells nothing at its end.

    Then tells which files took longest, for LONGEST: a worker that ends long before another waits for it.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seconds = defaultdict[str, float](float)
        self._ended: dict[str, float] = {}  # by worker

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration
        if node := getattr(report, "node", None):
            self._ended[node.gateway.id] = report.stop
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and isinstance(reporter, pytest.TerminalReporter):
            reporter.write_line(f"\n{report.when} failed: {report.nodeid}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        longest = sorted(self._seconds.items(), key=lambda one: -one[1])[:_FILES]
        told = (f"{seconds:.0f} s {file}" for file, seconds in longest)
        terminalreporter.line(f"the files that took longest: {', '.join(told)}")
        if self._ended:
            early = max(self._ended.values()) - min(self._ended.values())
            terminalreporter.line(f"one worker ended {early:.0f} s before another")


def pytest_configure(config: pytest.Config) -> None:
    if not entry_points(group=EXTENSIONS):
        again = ".venv/bin/python -m pip install --no-deps --no-build-isolation -e ."
        raise pytest.UsageError(f"the environment does not have the gateway's entry points yet: {again}")
    # a shell has its background jobs ignore interrupts, and they pass that on to what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("CI") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


class WholeFiles(LoadFileScheduling):  # type: ignore[misc] # it ships no types
    """Give a worker whole files, so that what a file's tests share is made once; and all of e2e to one.

    Those share a gateway, a deployed site and a browser.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return E2E if file.startswith(E2E) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles:
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: the last files are short, and no worker waits long for another."""

    def place(item: pytest.Item) -> int:
        found = (at for at, name in enumerate(LONGEST) if item.nodeid.startswith(name))
        return next(found, len(LONGEST))

    items.sort(key=place)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that `thorough` names."""
    if thorough.leaves(item.nodeid):
        item.add_marker(THOROUGH)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures: these start gateways."""
    forks.enabled = item.path.name not in STARTS


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count what `-m 'not thorough'` leaves out; xdist tells nobody."""
    if not items:  # as with `--last-failed`
        return
    output = getattr(items[0].config, "workeroutput", {})
    marked = sum(item.get_closest_marker(THOROUGH) is not None for item in items)
    output[THOROUGH] = output.get(THOROUGH, 0) + marked


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _left_out[node.gateway.id] = getattr(node, "workeroutput", {}).get(THOROUGH, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left := max(_left_out.values(), default=0):
        terminalreporter.line(
            f"{left} tests left out, which are marked thorough: `tests/run thorough` runs them"
        )


@pytest.fixture(scope="session", autouse=True)
def no_forks_left() -> Iterator[None]:
    """End the process that forks, if there is one."""
    yield
    forks.end()


@pytest.fixture(scope="session", autouse=True)
def no_notes_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove from memory what the gateways left there that tests killed."""
    yield
    for depth in range(1, 5):
        for records in tmp_path_factory.getbasetemp().glob("*/" * depth + FILE):
            memory_log_path(records.parent).unlink(missing_ok=True)
