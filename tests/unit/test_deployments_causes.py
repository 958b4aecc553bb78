"""Why an install or a site failed, in words that say what to do."""

from __future__ import annotations

import pytest

from gateway.deployments.verify import in_the_way, install_failed, last_output, why_it_ends
from gateway.errors import ExecFailed
from gateway.runtime.sites import failure

MiB = 1 << 20
NPM = 'npm error [--workspaces]\nnpm error\nnpm error Run "npm help ci" for more info\n'


def told(said: str, code: int, *install: str, memory: int = 512 * MiB, short: bool = False) -> str:
    message = f"the install command {' '.join(install)} ended with {code}: {said}"
    known = failure(code, said)
    assert known is not None
    facts = known.facts | ({"cause": "memory"} if short else {})
    failed = ExecFailed(message, reason="install_failed", exit_code=code, **facts)
    return install_failed(failed, install, memory).message


@pytest.mark.parametrize(
    ("said", "install", "first"),
    [
        ("error: lockfile had changes, but lockfile is frozen\n", ("bun", "install", "--frozen-lockfile"),
         "bun.lock does not match what the folder requires: run `bun install` there and deploy again, or "
         "install without it by --install 'bun install'. the install"),
        (NPM, ("npm", "ci"), "package-lock.json does not match what the folder requires: run `npm install`"),
        (" ERR_PNPM_OUTDATED_LOCKFILE  Cannot install", ("pnpm", "install"), "pnpm-lock.yaml does not match"),
        ("error: The lockfile at `uv.lock` needs to be updated, but `--locked` was provided.", ("uv", "sync"),
         "uv.lock does not match what the folder requires: run `uv lock` there and deploy again, or install "
         "without it by --install 'uv sync'"),
        ("pyproject.toml changed significantly since poetry.lock was last generated. Run `poetry lock` to "
         "fix the lock file.\n", ("env", "POETRY_VIRTUALENVS_IN_PROJECT=1", "uvx", "poetry", "install"),
         "poetry.lock does not match what the folder requires: run `poetry lock` there and deploy again."),
    ],
)  # fmt: skip
def test_a_lockfile_that_does_not_fit_is_named(said: str, install: tuple[str, ...], first: str) -> None:
    assert told(said, 1, *install).startswith(first)


@pytest.mark.parametrize(
    ("said", "code", "memory", "first"),
    [
        ("", 137, 512 * MiB,
         "`bun run build` needs more memory than the tenant has (512 MiB): the size medium has 1024 MiB: "
         "deploy with --size medium, or resize an existing tenant with `incus-gateway resize TENANT "
         "medium`."),
        ('error: script "build" was terminated by signal SIGKILL\nKilled\n', 1, 1024 * MiB,
         "`bun run build` needs more memory than the tenant has (1024 MiB): the size large has 2048 MiB"),
        ("FATAL ERROR: Reached heap limit Allocation failed - JavaScript heap out of memory", 134, 2048 * MiB,
         "`bun run build` needs more memory than the tenant has (2048 MiB): there is no larger size"),
    ],
)  # fmt: skip
def test_a_build_without_memory_names_the_size_that_does(
    said: str, code: int, memory: int, first: str
) -> None:
    """Its own words say so, or the kernel."""
    short = "heap" not in said
    assert told(said, code, "bun", "run", "build", memory=memory, short=short).startswith(first)


def test_a_build_that_somebody_killed_is_not_said_to_lack_memory() -> None:
    for said, code in (("", 137), ("Killed\n", 1), ("terminated by signal SIGKILL", 1)):
        message = told(said, code, "bun", "run", "build")
        assert message.startswith("`bun run build` was killed (SIGKILL), and the kernel reports no")
        assert "medium" not in message


def test_a_program_that_the_image_lacks_is_named() -> None:
    first = "the tenant's image has no uv, which `sh -c uv venv && uv pip install -r requirements.txt` needs"
    words = ("sh", "-c", "uv venv && uv pip install -r requirements.txt")
    assert told("sh: 1: uv: not found\n", 127, *words).startswith(first)
    missing = ExecFailed("command not found: npm", reason="not_found", exitCode=127)
    error = install_failed(missing, ("npm", "ci"), 0)
    assert error.message.startswith(
        "the tenant's image has no npm, which `npm ci` needs: the gateway's operator can"
    )
    assert error.facts["reason"] == "not_found"


@pytest.mark.parametrize(
    ("said", "registry"),
    [
        ("npm error code EAI_AGAIN\nnpm error syscall getaddrinfo", "the npm registry"),
        ("npm error code E503\nnpm error 503 Service Unavailable", "the npm registry"),
        ("error: ConnectionRefused downloading package manifest is-odd", "the npm registry"),
        (" ERR_PNPM_META_FETCH_FAIL  GET https://registry.npmjs.org/is-odd", "the npm registry"),
        (
            'error An unexpected error occurred: "https://registry.yarnpkg.com/x: getaddrinfo ENOTFOUND',
            "the npm registry",
        ),
        ("broken by 'NewConnectionError('': /simple/x/\nERROR: No matching distribution found for x", "PyPI"),
        ("  Caused by: error sending request for url (https://pypi.org/simple/flask/)", "PyPI"),
    ],
)
def test_a_registry_that_does_not_answer_is_named(said: str, registry: str) -> None:
    assert told(said, 1, "npm", "ci").startswith(
        f"{registry} could not be reached; try again when it answers. "
    )


def test_a_build_that_lacks_a_server_of_its_own_is_not_taken_for_that() -> None:
    retried = "warn: ConnectionRefused downloading package manifest x. Retry 1/5...\nerror: script failed"
    server = "Error: connect ECONNREFUSED 127.0.0.1:5432"
    for said in (server, retried, "npm error code 1", "npm error code E404"):
        assert failure(1, said) is None


def test_what_nothing_is_known_of_stays() -> None:
    assert failure(1, "error: no such host") is None
    failed = ExecFailed("the install command x ended with 1: no such host", exit_code=1)
    assert install_failed(failed, ("x",), 0) is failed


RUN = """site.service: Scheduled restart job, restart counter is at {n}.
Started site.service - The site of this tenant.
{said}
{how}
"""
FAILED = (
    "site.service: Main process exited, code=exited, status={}\nsite.service: Failed with result 'exit-code'."
)
CLEAN = "site.service: Deactivated successfully."


@pytest.mark.parametrize(
    ("said", "how", "why", "words"),
    [
        ("$ node index.js\nhello", CLEAN, "it ends by itself, without an error", "$ node index.js\nhello"),
        ("Error: no port", FAILED.format("1/FAILURE"), "it ends with code 1", "Error: no port"),
        ("short", FAILED.format("9/KILL"), "the kernel kills it because memory runs out: the size medium",
         "short"),
        ("short", FAILED.format("137/n/a"), "the kernel kills it because memory runs out", "short"),
        ("", FAILED.format("9/KILL"), "it was killed (SIGKILL), and the kernel", "nothing"),
        ("env: ‘npm’: No such file or directory", FAILED.format("127/n/a"),
         "the tenant's image has no npm, which `npm run dev` needs", "env: ‘npm’: No such file or directory"),
    ],
)  # fmt: skip
def test_a_site_that_ends_says_how_and_what_it_said(said: str, how: str, why: str, words: str) -> None:
    """Its own words are those of its last run, without systemd's."""
    journal = "".join(RUN.format(n=n, said=said, how=how) for n in range(1, 5))
    assert why in why_it_ends(journal, ("npm", "run", "dev"), 512 * MiB, short=said == "short")
    assert last_output(journal) == f"Its last output: {words}"
    begun = f"{journal}Started site.service - The site of this tenant.\n"
    assert last_output(begun) == f"Its last output: {words}"


def test_a_site_that_ended_says_why_though_it_has_begun_again() -> None:
    """The beginning of the next run says nothing of how the last one ended; of one that runs on it does."""
    run = RUN.format(n=1, said="$ tsc\nerror TS5011", how=FAILED.format("2/INVALIDARGUMENT"))
    journal = f"{run}Started site.service - The site of this tenant.\n$ tsc\n"
    assert last_output(journal, finished=True) == "Its last output: $ tsc\nerror TS5011"
    assert last_output(journal) == "Its last output: $ tsc"


def test_calls_inside_packages_do_not_displace_what_a_program_says() -> None:
    """Those of Vite, as pnpm installs it, are longer than what is kept of its last output."""
    where = "node_modules/.pnpm/vite@8.4.0_@types+node@24.19.4_jiti@2.6.1/node_modules/vite/dist/node/cli.js"
    said = (
        "Error: Found another Vite dev process for this project (PID 46).\nPass --bypass-lock to bypass it."
    )
    own = "    at file:///srv/site/vite.config.ts:3:7"
    inner = [f"    at async start{number} (file:///srv/site-next/{where}:741:9)" for number in range(8)]
    inner.append("    at process.processTicksAndRejections (node:internal/process/task_queues:105:5)")
    journal = "\n".join((said, own, *inner, "  hook: 'configureServer'\n}", "[ELIFECYCLE] Command failed."))
    last = last_output(journal)
    assert in_the_way(last)
    assert (
        last == f"Its last output: {said}\n{own}\n  hook: 'configureServer'\n}}\n[ELIFECYCLE] Command failed."
    )
