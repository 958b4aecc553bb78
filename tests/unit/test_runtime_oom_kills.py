"""Parsing the kernel log of Linux 6 for processes killed for lack of memory."""

from __future__ import annotations

import pytest

from gateway.runtime.incus.watch import victim

HEAD = "4,1042,17574841593,-;"
MINE = "/lxc.payload.shop"


def killed(
    cpuset: str = "site.service",
    limited: str = MINE,
    group: str = f"{MINE}/system.slice/site.service",
    task: str = "node",
) -> str:
    return (
        f"{HEAD}oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset={cpuset},mems_allowed=0,"
        f"oom_memcg={limited},task_memcg={group},task={task},pid=18566,uid=1001000\n SUBSYSTEM=x\n"
    )


def test_a_tenant_at_its_limit() -> None:
    assert victim(killed()) == ("shop", "node")


def test_a_host_without_memory() -> None:
    record = killed().replace(f"oom_memcg={MINE}", "global_oom")
    assert victim(record) == ("shop", "node")


def test_a_name_with_what_separates_others() -> None:
    assert victim(killed(task="a,pid=1,uid=0")) == ("shop", "a,pid=1,uid=0")


@pytest.mark.parametrize(
    "record",
    [
        killed(cpuset="x,oom_memcg=/lxc.payload.other"),
        killed(group=f"{MINE}/lxc.payload.other"),
        killed(group=f"{MINE}/a,task_memcg=/lxc.payload.other"),
    ],
)
def test_a_group_named_after_another_tenant_accuses_nobody(record: str) -> None:
    assert victim(record) is None


@pytest.mark.parametrize(
    "record",
    [
        "",
        HEAD,
        killed(limited="/worker", group="/worker"),
        killed().replace("oom-kill:", "say oom-kill:"),
        f"{HEAD}oom-kill:constraint={MINE}",
        f"{HEAD}node invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0\n",
    ],
)
def test_other_records(record: str) -> None:
    assert victim(record) is None
