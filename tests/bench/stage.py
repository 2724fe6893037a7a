"""What the rows share: a directory on a real disk, the image, the service, nginx, and warm memory."""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.bench.programs import Nginx
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service

MIB = 1 << 20
_WARM = 3 << 30
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the image, and of the one that comes from a limited source; how many `records` are very many."""

    image: int
    limited: int
    records: int


class Stage:
    """Starts what is asked for the first time, and ends all of it. A context manager."""

    def __init__(self, sizes: Sizes, parent: Path) -> None:
        """The directory is made in `parent`, which must be on a disk."""
        self.sizes = sizes
        self.round = 0
        kind = subprocess.check_output(["stat", "-f", "-c", "%T", parent], text=True).strip()
        if kind in _MEMORY_FILE_SYSTEMS:
            raise SystemExit(f"bench: {parent} is in memory ({kind}); name a directory on a disk with --dir")
        self.directory = Path(tempfile.mkdtemp(prefix="imgsvc-bench-", dir=parent))
        self.running = ExitStack()
        self.filled: dict[str, Service] = {}
        self.running.callback(shutil.rmtree, self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # Ctrl-C reaches the services too, and our SIGTERM is then the second signal, on which they just exit.
        with suppress(*(AssertionError,) if kind is KeyboardInterrupt else ()):
            self.running.close()

    def start_service(self, name: str) -> Service:
        """A service on its default stores, on a directory of this name, until the end."""
        return self.running.enter_context(Service(self.directory / name))

    @contextmanager
    def fresh_service(self) -> Iterator[Service]:
        """One that has done nothing yet, and is gone afterwards."""
        directory = self.directory / "fresh"
        try:
            with Service(directory) as service:
                yield service
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @functools.cached_property
    def service(self) -> Service:
        """The one that most rows use."""
        return self.start_service("data")

    @functools.cached_property
    def source(self) -> Path:
        """The image, of random bytes; nginx serves it as `/image`."""
        path = self._www / "image"
        fill(path, self.sizes.image)
        return path

    @functools.cached_property
    def nginx(self) -> Nginx:
        nginx = Nginx(self.directory / "nginx", self._www)
        self.running.callback(nginx.close)
        return nginx

    @functools.cached_property
    def etcd(self) -> EtcdCluster:
        """One member, which waits for the disk; each row that uses it has a prefix of its own."""
        etcd = EtcdCluster(parent=self.directory, durable=True)
        self.running.callback(etcd.close)
        return etcd

    @functools.cached_property
    def uploaded(self) -> str:
        """The id of the image in the service; it stays there."""
        with self.source.open("rb") as image:
            return str(self.service.upload(image)["id"])

    def source_url(self) -> str:
        """Where nginx serves the image."""
        assert self.source.exists()
        return f"{self.nginx.url}/image"

    def in_turn(self, *sides: Callable[[], None]) -> None:
        """Calls all sides; who begins changes from round to round."""
        first = self.round % len(sides)
        for side in (*sides[first:], *sides[:first]):
            side()

    @functools.cached_property
    def _www(self) -> Path:
        path = self.directory / "www"
        path.mkdir()
        return path


def warm() -> None:
    """Call it right before each timed write. What is dirty goes to the disk, and memory is touched, for a virtual
    machine may have given it back to its host, and to get it again costs more than the write itself."""
    os.sync()
    page = b"\1" * MIB
    with mmap.mmap(-1, _WARM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for start in range(0, _WARM, len(page)):
            memory[start : start + len(page)] = page


def fill(path: Path, size: int) -> None:
    """Writes a file of random bytes."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
