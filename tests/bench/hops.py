"""Measures what any relay keeps of a download on this machine: the bound for `tests/bench/relay`.

One process sends a file with `sendfile`, another takes it; between them stands none, or one that passes it on
by `recv` and `send`, by the kernel's `splice`, or by `recv` from a TLS socket. Nothing of the gateway is
in it. All share this machine's cores: where there are two, a relay costs throughput by that alone.
Prints MiB/s of each way in turns, and the share that it keeps in half of the rounds.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import socket
import ssl
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

MiB = 1 << 20
_AT_ONCE = 512 << 10  # bytes

Serve = Callable[[socket.socket], None]
"""Serves one client."""


def send(file: Path, client: socket.socket) -> None:
    with open(file, "rb") as source:
        sent = 0
        while count := os.sendfile(client.fileno(), source.fileno(), sent, MiB):
            sent += count


def send_by_tls(file: Path, context: ssl.SSLContext, client: socket.socket) -> None:
    with open(file, "rb") as source, context.wrap_socket(client, server_side=True) as wrapped:
        whole = memoryview(mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ))
        for at in range(0, len(whole), _AT_ONCE):
            wrapped.sendall(whole[at : at + _AT_ONCE])


def by_copies(port: int, context: ssl.SSLContext | None, client: socket.socket) -> None:
    room = memoryview(bytearray(_AT_ONCE))
    with socket.create_connection(("127.0.0.1", port)) as plain:
        source = plain if context is None else context.wrap_socket(plain, server_hostname="origin")
        while count := source.recv_into(room):
            client.sendall(room[:count])


def by_splice(port: int, client: socket.socket) -> None:
    out, into = os.pipe()
    with socket.create_connection(("127.0.0.1", port)) as source:
        while count := os.splice(source.fileno(), into, MiB):
            while count:
                count -= os.splice(out, client.fileno(), count)
    os.close(out)
    os.close(into)


def serving(serve: Serve) -> int:
    """Serve in another process, until this one ends; return the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            client, _ = listener.accept()
            with client:
                serve(client)

    multiprocessing.get_context("fork").Process(target=run, daemon=True).start()
    return int(listener.getsockname()[1])


def took(port: int, size: int) -> float:
    """Return MiB/s."""
    room, left, began = bytearray(MiB), size, time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as source:
        while count := source.recv_into(room):
            left -= count
    assert left == 0, f"{left} bytes are missing"
    return size / MiB / (time.perf_counter() - began)


def certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the contexts of a server with a certificate of its own, and of who knows it."""
    key, shown = folder / "key.pem", folder / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-days", "1", "-subj", "/CN=origin", "-addext", "subjectAltName=DNS:origin"]
    subprocess.run([*words, *names, "-keyout", key, "-out", shown], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(shown, key)
    return server, ssl.create_default_context(cafile=str(shown))


def measure(rounds: int, size: int) -> None:
    # in memory: no disk is measured
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        file = Path(folder, "file")
        with open(file, "wb") as out:
            for _ in range(size // MiB):
                out.write(os.urandom(MiB))
        server, client = certificate(Path(folder))
        origin, secret = serving(partial(send, file)), serving(partial(send_by_tls, file, server))
        ways = {
            "none between": origin,
            "splice": serving(partial(by_splice, origin)),
            "recv and send": serving(partial(by_copies, origin, None)),
            "recv of TLS and send": serving(partial(by_copies, secret, client)),
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, port in ways.items():
                found[way].append(took(port, size))
        for way, speeds in found.items():
            shares = [speed / alone for speed, alone in zip(speeds, found["none between"], strict=True)]
            share = statistics.median(shares)
            print(f"{way:24} p50 {statistics.median(speeds):6.0f} MiB/s   keeps {share:.0%}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/hops", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=1024, help="of each download")
    given = parser.parse_args()
    measure(given.rounds, given.mib * MiB)
    return 0
