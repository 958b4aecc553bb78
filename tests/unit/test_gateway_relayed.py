"""The public contract of a tenant that is another member's: two gateways of the `local` runtime."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.clusters import Relayed, relayed
from tests.contracts.files import FilesContract
from tests.contracts.gateway import AGENT, QUICK, GatewayContract, no_traceback
from tests.contracts.idempotency import ReceiptsContract
from tests.contracts.input import InputContract
from tests.contracts.mcp import McpContract
from tests.contracts.pace import PaceContract
from tests.contracts.tokens import TokensContract
from tests.live import LiveGateway
from tests.unit import test_gateway_local as local


@pytest.fixture(scope="module")
def tenant() -> str:
    return "demo"


@contextlib.asynccontextmanager
async def running(folder: Path, tenant: str, **environment: str) -> AsyncIterator[Relayed]:
    gateway = await relayed(folder, tenant, **environment)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    assert await gateway.entry.stop() == 0
    await no_traceback(gateway)
    await no_traceback(gateway.entry)


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> AsyncIterator[LiveGateway]:
    async with running(tmp_path_factory.mktemp("state"), tenant, **AGENT) as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def quick(tmp_path_factory: pytest.TempPathFactory, tenant: str) -> AsyncIterator[LiveGateway]:
    async with running(tmp_path_factory.mktemp("quick"), tenant, **QUICK) as gateway:
        yield gateway


@pytest.fixture
async def disposable(tmp_path: Path, tenant: str) -> AsyncIterator[LiveGateway]:
    gateway = await relayed(tmp_path, tenant)
    await gateway.start()
    yield gateway
    assert gateway.home.process is not None
    if gateway.home.process.returncode is None:
        gateway.home.process.kill()
        await gateway.home.process.wait()
    assert await gateway.entry.stop() == 0


class TestRelayed(GatewayContract):
    thorough = frozenset(
        {
            "test_what_cannot_start_is_an_error",
            "test_a_programs_own_126_and_127_are_exits",
            "test_a_signal_reaches_the_command",
            "test_a_cancel_behind_the_commands_own_end_does_not_claim_it",
            "test_a_tree_that_just_grows_is_asked_to_end_as_a_whole",
            "test_a_second_cancel_may_have_less_patience",
            "test_what_was_cancelled_counts_no_longer",
            "test_cancel_twice_at_once_answers_both",
            "test_a_cancelled_start_leaves_nothing_running",
            "test_a_timeout_ends_the_tree_and_says_so",
            "test_what_holds_the_output_open_holds_nobody_up",
            "test_what_is_left_can_be_set_to_end_with_its_command",
            "test_characters_are_never_split_for_who_asks_for_text",
            "test_what_fell_out_of_the_tail_is_counted",
            "test_a_linger_is_a_number",
            "test_a_tenant_takes_its_share_of_subscriptions",
            "test_a_tenant_takes_its_share_of_tool_sessions",
            "test_read_before_write_holds_in_a_named_session",
            "test_a_call_that_nobody_asks_for_again_ends",
        }
    )


class TestRelayedInput(InputContract):
    pass


class TestRelayedPace(PaceContract):
    pass


class TestRelayedMcp(McpContract):
    pass


class TestRelayedTokens(TokensContract):
    pass


class TestRelayedReceipts(ReceiptsContract):
    pass


class TestRelayedFiles(FilesContract):
    thorough = frozenset(
        {
            "test_folders_and_moves",
            "test_hostile_trees_are_listed_and_removed",
            "test_any_name_is_named",
            "test_conditions",
            "test_limits_are_told",
            "test_a_file_that_shrinks_breaks_its_download_off",
            "test_paths_and_ignored_names_are_the_clients_choice",
            "test_changes_of_the_tenants_own_are_seen_at_any_depth",
            "test_a_storm_is_an_overflow_and_the_gateway_lives",
        }
    )

    as_root = local.TestLocalFiles.as_root
