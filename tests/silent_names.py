"""Reads a source whose name nobody looks up, and gives up after a second: prints how long that took. Run it in mount and
network namespaces of its own, with a directory as its argument."""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from tests.raw_peer import Collected, read

_SET_FLAGS = 0x8914
_UP_AND_RUNNING = 0x41


class _StopError(Exception):
    pass


class _Impatient(Collected):
    def tick(self) -> None:
        if time.monotonic() - began > 1.0:
            raise _StopError


if __name__ == "__main__":
    resolver = Path(sys.argv[1]) / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\n")
    subprocess.run(["mount", "--bind", resolver, Path("/etc/resolv.conf").resolve()], check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        fcntl.ioctl(silent, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP_AND_RUNNING))
        silent.bind(("127.0.0.1", 53))
        began = time.monotonic()
        try:
            read("http://silent.example/image", _Impatient())
        except _StopError:
            print(time.monotonic() - began)  # noqa: T201 - for the test
