"""Clients that others' generators make of the OpenAPI document upload a file. For the night.

It needs PyPI, npm, Java and Go. openapi-generator makes TypeScript, Python and Go.
"""

from __future__ import annotations

import json
import shutil
import venv
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration.test_claude_newest import run
from tests.live import LiveGateway, local_gateway

PYTHON = (
    "openapi-generator-cli",
    "openapi-python-client",
    "ruff",
    "httpx",
    "pydantic",
    "python-dateutil",
    "urllib3",
)
NPM = (
    *("openapi-typescript", "openapi-fetch", "@hey-api/openapi-ts", "orval", "axios"),
    *("esbuild", "typescript@5", "@types/node"),
)
# axios asks for modules of Node by it
REQUIRE = "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url);"
BYTES = bytes(range(256)) * 40

# each writes `in` to a file of the tenant: arguments are the gateway's address, a token and the file's name
OPENAPI_GENERATOR_PYTHON = """
import sys; sys.path.insert(0, "openapi-generator-python")
import openapi_client as made
url, token, name = sys.argv[1:]
with made.ApiClient(made.Configuration(host=url, access_token=token)) as client:
    made.FilesApi(client).files_put("shop", name, open("in", "rb").read())
"""
OPENAPI_PYTHON_CLIENT = """
import sys; sys.path.insert(0, "openapi-python-client")
from incus_gateway_client import AuthenticatedClient
from incus_gateway_client.api.files import files_put
from incus_gateway_client.types import File
url, token, name = sys.argv[1:]
client = AuthenticatedClient(base_url=url, token=token, raise_on_unexpected_status=True)
answer = files_put.sync_detailed("shop", name, client=client, body=File(payload=open("in", "rb")))
assert answer.status_code in (200, 201), answer
"""
OPENAPI_FETCH = """
import { readFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { paths } from "./openapi-typescript";
const [url, token, name = ""] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${token}` } });
const { error } = await client.PUT("/v1/tenants/{tenant}/files/{path}", {
  params: { path: { tenant: "shop", path: name } },
  body: new Blob([readFileSync("in")]) as unknown as string,
  bodySerializer: (body) => body as unknown as Blob,
  headers: { "Content-Type": "application/octet-stream" },
});
if (error) throw new Error(JSON.stringify(error));
"""
HEY_API = """
import { readFileSync } from "node:fs";
import { client } from "./hey-api/client.gen";
import { filesPut } from "./hey-api";
const [url, token, path = ""] = process.argv.slice(2);
client.setConfig({ baseUrl: url ?? "", auth: token ?? "" });
await filesPut({ path: { tenant: "shop", path }, body: new Blob([readFileSync("in")]), throwOnError: true });
"""
OPENAPI_GENERATOR_TYPESCRIPT = """
import { readFileSync } from "node:fs";
import { Configuration, FilesApi } from "./openapi-generator-typescript";
const [basePath, accessToken, path = ""] = process.argv.slice(2);
const files = new FilesApi(new Configuration({ basePath, accessToken }));
await files.filesPut({ tenant: "shop", path, body: new Blob([readFileSync("in")]) });
"""
# of its client of `fetch`: the newest that runs on Node 20 sends any body as JSON, also a file
ORVAL = """
import { readFileSync } from "node:fs";
import { getIncusGateway } from "./orval/client";
const [baseURL, token, path = ""] = process.argv.slice(2);
const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/octet-stream" };
await getIncusGateway().filesPut("shop", path, new Blob([readFileSync("in")]), { baseURL, headers });
"""
OPENAPI_GENERATOR_GO = """
package main

import (
	"context"
	"log"
	"os"

	made "github.com/GIT_USER_ID/GIT_REPO_ID"
)

func main() {
	in, err := os.Open("in")
	if err != nil {
		log.Fatal(err)
	}
	where := made.NewConfiguration()
	where.Servers = made.ServerConfigurations{{URL: os.Args[1]}}
	ctx := context.WithValue(context.Background(), made.ContextAccessToken, os.Args[2])
	files := made.NewAPIClient(where).FilesAPI
	if _, _, err := files.FilesPut(ctx, "shop", os.Args[3]).Body(in).Execute(); err != nil {
		log.Fatal(err)
	}
}
"""


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("state"), "shop")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0


@pytest.mark.timeout(1500)
async def test_generated_clients_upload_a_file(gateway: LiveGateway, tmp_path: Path) -> None:
    if shutil.which("java") is None or shutil.which("go") is None:
        pytest.fail("this needs Java and Go, which `tests/run thorough` installs")
    async with aiohttp.ClientSession() as session, session.get(gateway.url + "/openapi.json") as answer:
        document = await answer.json()
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "in").write_bytes(BYTES)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    await run(str(bin_ / "pip"), "install", "--quiet", *PYTHON)
    await run("npm", "install", "--no-audit", "--no-fund", *NPM, cwd=tmp_path)

    generator = (str(bin_ / "openapi-generator-cli"), "generate", "-i", "openapi.json")
    for kind, name in (("typescript-fetch", "typescript"), ("python", "python"), ("go", "go")):
        printed = await run(*generator, "-g", kind, "-o", f"openapi-generator-{name}", cwd=tmp_path)
        assert "ERROR" not in printed, printed
    python_client = ("generate", "--path", "openapi.json", "--output-path", "openapi-python-client")
    environment = {"PATH": f"{bin_}:/usr/bin:/bin"}
    words = (str(bin_ / "openapi-python-client"), *python_client)
    printed = await run(*words, cwd=tmp_path, environment=environment)
    assert "WARNING" not in printed and "ERROR" not in printed, printed
    await run("npx", "openapi-typescript", "openapi.json", "-o", "openapi-typescript.d.ts", cwd=tmp_path)
    await run("npx", "openapi-ts", "-i", "openapi.json", "-o", "hey-api", cwd=tmp_path)
    orval = ("--input", "openapi.json", "--output", "orval/client.ts", "--client", "axios")
    await run("npx", "orval", *orval, cwd=tmp_path)

    programs = {
        "upload-openapi-generator-python.py": OPENAPI_GENERATOR_PYTHON,
        "upload-openapi-python-client.py": OPENAPI_PYTHON_CLIENT,
        "upload-openapi-fetch.ts": OPENAPI_FETCH,
        "upload-hey-api.ts": HEY_API,
        "upload-openapi-generator-typescript.ts": OPENAPI_GENERATOR_TYPESCRIPT,
        "upload-orval.ts": ORVAL,
        "openapi-generator-go/upload/main.go": OPENAPI_GENERATOR_GO,
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        match path.suffix:
            case ".py":
                program: tuple[str, ...] = (str(bin_ / "python"), name)
            case ".go":
                alone = {"GOPROXY": "off", "CGO_ENABLED": "0"}  # it needs nothing but Go's own packages
                go = ("go", "build", "-o", tmp_path / "uploading", "./upload")
                await run(*map(str, go), cwd=path.parents[1], environment=alone)
                program = (str(tmp_path / "uploading"),)
            case _:
                bundle = ("--bundle", "--platform=node", "--format=esm", f"--banner:js={REQUIRE}")
                await run("npx", "esbuild", name, *bundle, f"--outfile={name}.mjs", cwd=tmp_path)
                program = ("node", f"{name}.mjs")
        target = f"deep/{path.name}.bin"
        await run(*program, gateway.url, gateway.token("shop"), target, cwd=tmp_path)
        async with gateway.http("shop") as http, http.get(f"/v1/tenants/shop/files/{target}") as answer:
            assert (answer.status, await answer.read()) == (200, BYTES), name
