"""The first commands that coding agents run in a tenant, as its Bash tool answers them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.settings import Settings
from gateway_client import Client, Tenant
from tests.integration.conftest import make_containers, settle
from tests.integration.test_gateway_incus import live

# A command line, and a pattern in what it prints. Each ends with 0 in one tenant, and may be run once more.
LOOKS = (
    ("pwd && whoami && echo $HOME", r"^/srv/site\nsite\n/home/site$"),
    ("uname -a && cat /etc/os-release", "trixie"),
    ("ls -la", r"total \d"),
    ("which node npm npx bun bunx pnpm yarn python3 pip uv git rg make curl jq", r"/usr/local/bin/node\n"),
    ("command -v python pip3 uvx vi vim nano less", "/usr/local/bin/python"),
    ("node -v", r"^v24\."),
    ("npm -v && npx -v", r"^11\.\d+\.\d+\n11\."),
    ("pnpm -v && yarn -v", r"^11\.\d+\.\d+\n1\.22"),
    ("bun -v && bunx --version", r"^1\."),
    ("python3 --version && python --version", r"^Python 3\.13\.\d+\nPython 3\.13"),
    ("pip --version && python3 -m pip --version", r"python 3\.13"),
    ("uv --version && uvx --version", r"^uv 0\."),
    ("git --version && rg --version | head -1 && make --version | head -1", "GNU Make"),
    ("node -e 'console.log(process.versions.node, !process.versions.bun)'", "true$"),
    ("node -p 'os.availableParallelism()'", r"^1$"),
    ("node --input-type=module -e 'import fs from \"node:fs\"; console.log(typeof fs.cpSync)'", "^function$"),
    ("node t.ts && bun t.ts", r"^42\n42$"),
    ("python3 -c 'import json, ssl, sqlite3, venv; print(json.dumps([6 * 7]))'", r"^\[42\]$"),
    ("python3 - <<'END'\nprint('from a heredoc')\nEND", "^from a heredoc$"),
    ("python3 -m json.tool <<<'{\"a\": 1}' && jq -r .a <<<'{\"a\": 1}'", r"\n1$"),
    ("grep -rn 42 . && rg -n 42", r"t\.ts:1:"),
    ("find . -name '*.ts' -not -path '*/node_modules/*' | xargs wc -l", r"t\.ts"),
    ("cp t.ts u.ts && sed -i s/42/43/ u.ts && sed -n 1p u.ts | awk '{print $5}'", "^43"),
    ("file t.ts && stat -c %s t.ts && du -sh . && tree -L 1", "ASCII text"),
    ("diff t.ts <(sed s/42/41/ t.ts) >c.diff; patch -o - t.ts c.diff 2>/dev/null", "41"),
    ("ps aux | head -3 && pgrep -a systemd && lsof -v 2>&1 | head -1", "systemd"),
    ("ss -ltn && ip -4 addr show eth0", "inet 10"),
    ("free -m && df -h . && nproc && uptime", "Mem:"),
    ("ping -c 1 -W 5 127.0.0.1", "1 received"),
    ("journalctl --no-pager -n 3 && systemctl --no-pager status | head -3", r"systemd\["),
    ("env | grep -c GATEWAY_EXEC && date +%Y && locale 2>/dev/null | head -1", "^1\n20"),
    ("EDITOR=true vi --version | head -1", "VIM"),
    ("mkdir -p a/b && cp t.ts a/b && mv a/b/t.ts a/u.ts && rm -r a && ls", r"^t\.ts$"),
    ("tar czf t.tgz t.ts && tar tzf t.tgz && zip -q t.zip t.ts && unzip -l t.zip && xz --version", r"t\.ts"),
    ("timeout 5 sleep 0 && (sleep 60 & kill $!) && echo ended", "ended$"),
    ("bash -lc 'command -v node && echo $PATH'", r"/home/site/\.local/bin"),
    ("printf 'all:\\n\\t@echo made\\n' >Makefile && make", "^made$"),
)
COMMIT = "git config user.email a@b.c && git config user.name A && git add -A && git commit -qm one"
CHANGE = "git init -q three && cd three && echo >a && git add a && echo 1 >a && git diff --stat"
GIT = (
    ("git init one && cd one && touch a && git status --short", r"\?\? a"),
    (f"git init -q two && cd two && date +%s%N >a && {COMMIT} && git log --oneline | cat", r"^\w+ one$"),
    (f"{CHANGE} && git branch --show-current", r"a \| 2 \+-\n[^|]*\nmain"),
)
PAGE = '"$(npm config get registry)is-number"'
# from the registries: DNS, NAT and certificates work, and nothing needs root
INSTALLS = (
    (f"curl -sSI {PAGE} | head -1", "200"),
    (f"wget -qO- {PAGE}/7.0.0 | jq -r .version", r"^7\.0\.0$"),
    (f"node -e 'fetch(process.argv[1]).then(r => console.log(r.status))' {PAGE}", "^200$"),
    (f"python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).status)' {PAGE}", "^200$"),
    # with certificates of their own, as the SDKs of most services have
    (
        "uv run --no-project --with httpx==0.28.1 --with requests==2.32.5 python -c "
        f"'import sys, httpx, requests; print(*(m.get(sys.argv[1]) for m in (httpx, requests)))' {PAGE}",
        r"200 OK.*200",
    ),
    (
        "npm install -g semver@7.7.3 >/dev/null && semver 1.2.3 && which semver",
        r"/home/site/\.local/bin/semver",
    ),
    ("pip install pycowsay==0.0.0.2 && pycowsay hi && which pycowsay", r"/home/site/\.local/bin/pycowsay"),
    ("python3 -c 'import pycowsay; print(pycowsay.__file__)'", r"/home/site/\.local/lib/python3"),
    ("uv run --no-project --with six==1.17.0 python -c 'import six; print(six.PY3)'", "True"),
)
# the same by others, or into a folder, where nothing of the image has a say: for `tests/run thorough`
MORE_INSTALLS = (
    ("pnpm add -g cowsay@1.6.0 && cowsay hi && which cowsay", r"/home/site/\.local/share/pnpm/bin/cowsay"),
    ("bun add -g semver@7.7.3 && bun pm bin -g", r"/home/site/\.bun/bin"),
    ("bunx semver@7.7.3 1.2.3", r"^1\.2\.3$"),
    ("python3 -m venv v && v/bin/pip install -q six==1.17.0 && v/bin/python -c 'import six'", "no output"),
    ("uv venv -qc u && uv pip install -qp u six==1.17.0 && u/bin/python -c 'import six; print(6)'", "^6$"),
    ("mkdir -p n && cd n && npm init -y && npm install is-number@7.0.0 && npm ls", r"is-number@7\.0\.0"),
    ("npx --yes semver@7.7.3 1.2.3", r"^1\.2\.3$"),
    (
        "rm -rf made && npm create vite@9.3.0 made -- --template react-ts --no-interactive && ls made",
        "package.json",
    ),
    (
        "mkdir -p p && cd p && echo '{}' >package.json && pnpm add is-number@7.0.0 && ls node_modules",
        "is-number",
    ),
    (
        "mkdir -p y && cd y && echo '{}' >package.json && yarn add is-number@7.0.0 && ls node_modules",
        "is-number",
    ),
    (
        "mkdir -p b && cd b && echo '{}' >package.json && bun add is-number@7.0.0 && ls node_modules",
        "is-number",
    ),
)
TABLE = (*LOOKS, *GIT, *INSTALLS)


@pytest.fixture(scope="module")
async def tenant(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Tenant]:
    log: Path = tmp_path_factory.mktemp("commands") / "gateway.log"
    async with (
        make_containers("commands", incus_settings, 1) as (made,),
        live(incus_settings, log) as gateway,
    ):
        await settle(made)
        async with Client(gateway.url, token=gateway.token(made.name)) as client:
            tenant = client.tenant(made.name)
            await tenant.write("t.ts", "const n: number = 42; console.log(n)\n")
            yield tenant


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        *(pytest.param(*row, id=row[0][:60]) for row in TABLE),
        *(pytest.param(*row, id=row[0][:60], marks=pytest.mark.thorough) for row in MORE_INSTALLS),
    ],
)
async def test_a_command_does_what_agents_expect(tenant: Tenant, command: str, printed: str) -> None:
    done = await tenant.bash(f"cd /srv/site && {command}", timeout=60)
    assert done.exit_code == 0, done.text
    assert re.search(printed, done.text.strip(), re.MULTILINE), done.text
