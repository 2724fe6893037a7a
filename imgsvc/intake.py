"""The bytes of one image on their way to the disk: counted, hashed as they pass, and written.

Now and then a checkpoint is noted: so many bytes, with this digest. Who goes on with an unfinished image hashes what is
on the disk again and believes in it as far as the last checkpoint that is right. So no checkpoint has to wait for the
disk: what a loss of power took is found out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor

from imgsvc.blocks import BLOCK
from imgsvc.errors import Unavailable
from imgsvc.foreign import read_json
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
        # The last checkpoint: its size and its digest.
        self._kept = (0, self._digest)
        self._held = False
        self._mark = ""
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of the bytes so far, in hex."""
        return self._digest.hexdigest()

    def take(self, block: bytes | bytearray | memoryview) -> None:
        """Writes the block while it is being hashed."""
        self._drop_what_is_not_known()
        before = self._digest.copy()
        hashing = self._hashers.submit(self._digest.update, block)
        try:
            self._writer.write(block)
        except BaseException:
            hashing.result()
            self._digest = before
            raise
        hashing.result()
        self.size += len(block)
        if self._noted is not None and time.monotonic() - self._noted >= _CHECKPOINT_INTERVAL:
            self.checkpoint()

    def begin(self, origin: Origin) -> None:
        """Forgets the bytes so far. Those that come now are of this origin, and can be gone on with."""
        self.restart()
        self._mark = _mark(origin)
        self._writer.note(json.dumps({"origin": origin, "mark": self._mark, "at": time.time()}))
        self._noted = time.monotonic()

    def restart(self) -> None:
        """Forgets the bytes so far. Those that come now cannot be gone on with, unless `begin` says what they are."""
        self._digest = hashlib.sha256()
        self._noted = None
        self.size = 0
        self._keep()
        self._drop_what_is_not_known()

    def recover(self, look: Callable[[], None]) -> Origin | None:
        """Goes on behind the bytes that an earlier intake left, as far as they are right, and returns their origin;
        None when there are none of use. Calls `look` now and then; what that raises ends it."""
        origin, checkpoints, _ = _understood(self._writer.notes())
        if origin is not None:
            self._hash_to(checkpoints, look)
        if not self.size:
            self.restart()
            return None
        self._drop_what_is_not_known()
        self._keep()
        self._noted = time.monotonic()
        self._mark = "" if origin is None else _mark(origin)
        return origin

    def checkpoint(self) -> int:
        """Notes how far this came. Returns how many bytes whoever goes on will find, which is all of them unless they
        are held back."""
        if self._noted is not None and not self._held and self.size != self._kept[0]:
            note = {"size": self.size, "sha256": self.sha256, "mark": self._mark, "at": time.time()}
            self._writer.note(json.dumps(note))
            self._noted = time.monotonic()
            self._keep()
        return self._kept[0]

    def hold(self) -> None:
        """The bytes that come now are in doubt: until `release` there is no checkpoint, and `go_back` drops them."""
        self.checkpoint()
        self._held = True

    def release(self) -> None:
        self._held = False

    def go_back(self) -> None:
        """To the last checkpoint."""
        self._forget_since_checkpoint()
        self._drop_what_is_not_known()

    def pause(self) -> None:
        """Lets go of the file until `go_on`. What cannot be noted is forgotten. Never raises."""
        with contextlib.suppress(Exception):
            self.checkpoint()
        if self.size != self._kept[0]:
            self._forget_since_checkpoint()
        if self._noted is not None:  # else nothing is known yet of what is there
            with contextlib.suppress(Exception):  # then with the next block
                self._drop_what_is_not_known()
        self._held = False
        self._writer.close()

    def go_on(self, writer: ImageWriter) -> None:
        """With another writer of the same image, which this one takes over."""
        self._writer = writer
        if writer.size < self.size:
            writer.close()
            raise Unavailable(f"of {self.size} bytes that were written, {writer.size} are there")

    def commit(self) -> None:
        self._drop_what_is_not_known()
        self._writer.commit()

    def abort(self) -> None:
        """Never raises."""
        self._writer.abort()

    def close(self) -> None:
        """Leaves the bytes for whoever goes on with them, in this process or the next. Never raises."""
        try:
            self.checkpoint()
        except Exception:  # noqa: BLE001 - an earlier checkpoint will do, or none
            self._noted = None
        self._writer.close()

    def _drop_what_is_not_known(self) -> None:
        """Bytes that were neither taken nor recovered are not of this image."""
        if self._writer.size != self.size:
            self._writer.truncate(self.size)

    def _keep(self) -> None:
        self._kept = (self.size, self._digest.copy())
        self._held = False

    def _forget_since_checkpoint(self) -> None:
        self.size, digest = self._kept
        self._digest = digest.copy()
        self._held = False

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


def look_back(notes: Iterable[str]) -> tuple[Origin, float] | None:
    """What an intake noted: the origin of the bytes, and the Unix time of the last note about them; None when they
    cannot be gone on with."""
    origin, _, moment = _understood(notes)
    return None if origin is None else (origin, moment)


def _mark(origin: Origin) -> str:
    """Stands for the origin in checkpoints, and tells whether a note of it is as it was made."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]


def _understood(notes: Iterable[str]) -> tuple[Origin | None, Mapping[int, str], float]:
    """The last origin, its checkpoints, and the Unix time of the last note. Checkpoints of no other origin, for a note
    between may be lost."""
    origin: Origin | None = None
    mark = ""
    moment = 0.0
    checkpoints: dict[int, str] = {}
    for note in notes:
        try:
            read = read_json(note)
        except ValueError:
            continue  # what a loss of power left of it
        match read:
            case {"origin": dict(found), "mark": str(its)} if its == _mark(found):
                origin, mark, checkpoints = found, its, {}
            case {"size": int(size), "sha256": str(sha256), "mark": str(its)} if its == mark:
                checkpoints[size] = sha256
        match read:
            case {"at": float(moment)}:
                pass
    return origin, checkpoints, moment
