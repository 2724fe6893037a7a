"""The bytes of one image on their way to the disk: counted, hashed as they pass, and written.

Now and then a checkpoint is noted: so many bytes, with this digest. Who goes on with an unfinished image hashes what is
on the disk again and believes in it as far as the last checkpoint that is right. So no checkpoint has to wait for the
disk: what a loss of power took is found out.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor

from imgsvc.blocks import BLOCK
from imgsvc.images.store import ImageWriter

# Seconds between two checkpoints: what a kill costs at most, besides the time for hashing again.
_CHECKPOINT_INTERVAL = 1.0

# What identifies the bytes that are coming, for whoever goes on with them: its meaning is its owner's.
Origin = Mapping[str, str | int]


class Intake:
    """For one thread at a time. Everything raises what the writer raises."""

    def __init__(self, writer: ImageWriter, hashers: Executor) -> None:
        self._writer = writer
        self._hashers = hashers
        self._digest = hashlib.sha256()
        self._noted: float | None = None
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of the bytes so far, in hex."""
        return self._digest.hexdigest()

    def take(self, block: bytes | bytearray | memoryview) -> None:
        """Writes the block while it is being hashed."""
        self._drop_what_is_not_known()
        hashing = self._hashers.submit(self._digest.update, block)
        try:
            self._writer.write(block)
        finally:
            hashing.result()
        self.size += len(block)
        if self._noted is not None and time.monotonic() - self._noted >= _CHECKPOINT_INTERVAL:
            self._checkpoint()

    def begin(self, origin: Origin) -> None:
        """Forgets the bytes so far. Those that come now are of this origin, and can be gone on with."""
        self.restart()
        self._writer.note(json.dumps({"origin": origin}))
        self._noted = time.monotonic()

    def restart(self) -> None:
        """Forgets the bytes so far. Those that come now cannot be gone on with, unless `begin` says what they are."""
        self._digest = hashlib.sha256()
        self._noted = None
        self.size = 0
        self._drop_what_is_not_known()

    def recover(self, look: Callable[[], None]) -> Origin | None:
        """Goes on behind the bytes that an earlier intake left, as far as they are right, and returns their origin;
        None when there are none of use. Calls `look` now and then; what that raises ends it."""
        origin, checkpoints = _understood(self._writer.notes())
        if origin is not None:
            self._hash_to(checkpoints, look)
        if not self.size:
            self.restart()
            return None
        self._drop_what_is_not_known()
        self._noted = time.monotonic()
        return origin

    def commit(self) -> None:
        self._drop_what_is_not_known()
        self._writer.commit()

    def abort(self) -> None:
        """Never raises."""
        self._writer.abort()

    def close(self) -> None:
        """Leaves the bytes for whoever goes on with them, in this process or the next. Never raises."""
        try:
            if self._noted is not None:
                self._checkpoint()
        except Exception:  # noqa: BLE001 - an earlier checkpoint will do, or none
            self._noted = None
        self._writer.close()

    def _drop_what_is_not_known(self) -> None:
        """Bytes that were neither taken nor recovered are not of this image."""
        if self._writer.size != self.size:
            self._writer.truncate(self.size)

    def _checkpoint(self) -> None:
        self._writer.note(json.dumps({"size": self.size, "sha256": self.sha256}))
        self._noted = time.monotonic()

    def _hash_to(self, checkpoints: Mapping[int, str], look: Callable[[], None]) -> None:
        """To the last of the checkpoints that is right; the digest is then that one."""
        digest = hashlib.sha256()
        offset = 0
        for size in sorted(size for size in checkpoints if 0 < size <= self._writer.size):
            for block in self._read(offset, size):
                look()
                digest.update(block)
            offset = size
            if digest.hexdigest() == checkpoints[size]:
                self._digest, self.size = digest.copy(), size

    def _read(self, offset: int, end: int) -> Iterator[bytes]:
        while offset < end:
            block = self._writer.read(offset, min(BLOCK, end - offset))
            yield block
            offset += len(block)


def _understood(notes: Iterable[str]) -> tuple[Origin | None, Mapping[int, str]]:
    """The last origin, and the checkpoints after it."""
    origin: Origin | None = None
    checkpoints: dict[int, str] = {}
    for note in notes:
        try:
            read = json.loads(note)
        except ValueError:
            continue  # what a loss of power left of it
        match read:
            case {"origin": dict(origin)}:
                checkpoints = {}
            case {"size": int(size), "sha256": str(sha256)}:
                checkpoints[size] = sha256
    return origin, checkpoints
