"""The bytes of images at other members: who is asked for them, how, and who is told that they are wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import structlog

from imgsvc.cluster.choice import Choice
from imgsvc.cluster.line import Head, Line
from imgsvc.cluster.peers import Signatures
from imgsvc.errors import ImgsvcError, PeerFailed
from imgsvc.foreign import read_json
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import LiveMember

# What a member says with each answer to another one: how many requests it is answering.
LOAD = "X-Imgsvc-Load"

# Seconds for which a connection is kept for the next part, less than a member keeps it; and how many of them.
_KEPT = 10.0
_KEPT_LINES = 16

# The most bytes of an error's document that are read.
_DOCUMENT = 4096

_OK = 200
_PARTIAL_CONTENT = 206

log = structlog.get_logger()


class Supply:
    """Every method may be called from any thread. `patience` is how many seconds a member may be silent."""

    def __init__(
        self,
        choice: Choice,
        signatures: Signatures,
        patience: float,
        accuse: Callable[[LiveMember, str], None],
    ) -> None:
        """`accuse(member, image_id)` tells a member that its bytes of an image seem to be wrong; it may block."""
        self.choice = choice
        self._signatures = signatures
        self._patience = patience
        self._accuse = accuse
        self._accusers = ThreadPoolExecutor(1, thread_name_prefix="accuse")
        self._lock = threading.Lock()
        self._kept: list[tuple[float, str, Line]] = []

    def holders(self, image: Image) -> Sequence[LiveMember]:
        """The other live members that hold the image."""
        return self.choice.holders(image)

    def is_complete(self, image_id: str) -> bool:
        """Whether there is such an image and it is complete, as far as this member knows. Never blocks."""
        return self.choice.is_complete(image_id)

    def is_mine(self, image: Image) -> bool:
        """Whether this member is on record as holding the image."""
        return self.choice.is_mine(image)

    def has_noted(self, image: Image) -> bool:
        """Whether this member is on record by now as holding what this record is of."""
        return self.choice.has_noted(image)

    @contextmanager
    def rest(self, image: Image, member: LiveMember, first: int, look: Callable[[], None]) -> Iterator[Line]:
        """The connection on which all bytes of the image from `first` on are to be received. Raises PeerFailed, and
        what `look` does."""
        with self._asking(image, member):
            line = Line(member.url, self._patience, look)
            try:
                self._ask(line, image, member, first, image.size - 1)
                yield line
            finally:
                line.close()

    def part(self, image: Image, member: LiveMember, first: int, size: int, look: Callable[[], None]) -> bytes:
        """So many bytes of the image from `first` on. Raises as `rest` does."""
        part = bytearray(size)
        with self._asking(image, member):
            line = self._asked(image, member, first, first + size - 1, look)
            try:
                line.fill(memoryview(part))
            except BaseException:
                line.close()
                raise
            self._keep(member.url, line)
        return bytes(part)

    def accuse(self, members: Iterable[LiveMember], image: Image) -> None:
        """Has each of them told that its bytes of the image may have the wrong digest. Returns at once."""
        for member in members:
            log.error("wrong bytes from a member", image=image.id, peer=member.id, url=member.url)
            self._accusers.submit(self._tell, member, image.id)

    def nobody(self, image: Image, why: str) -> PeerFailed:
        """What is to be raised when no member gives the bytes."""
        live = {holder.id: holder for holder in self.holders(image)}
        names = ", ".join(
            f"{member} at {live[member].url}" if member in live else f"{member}, which is not live"
            for member in sorted(self.choice.others(image))
        )
        return PeerFailed(f"the image could not be had from the members that hold it ({names}): {why}")

    def close(self) -> None:
        self._accusers.shutdown(cancel_futures=True)
        with self._lock:
            kept, self._kept = self._kept, []
        for _, _, line in kept:
            line.close()

    @contextmanager
    def _asking(self, image: Image, member: LiveMember) -> Iterator[None]:
        with self.choice.asking(member):
            try:
                yield
            except PeerFailed as error:
                self.choice.failed(member)
                log.info("member did not give bytes", image=image.id, peer=member.id, reason=str(error))
                raise

    def _asked(self, image: Image, member: LiveMember, first: int, last: int, look: Callable[[], None]) -> Line:
        kept = self._taken(member.url)
        if kept is not None:
            kept.look = look
            try:
                self._ask(kept, image, member, first, last)
            except PeerFailed:
                kept.close()  # it may just have been too old
            except BaseException:
                kept.close()
                raise
            else:
                return kept
        line = Line(member.url, self._patience, look)
        try:
            self._ask(line, image, member, first, last)
        except BaseException:
            line.close()
            raise
        return line

    def _ask(self, line: Line, image: Image, member: LiveMember, first: int, last: int) -> None:
        """Returns when the head of the right answer has come."""
        target = f"/images/{image.id}/download"
        whole = (first, last) == (0, image.size - 1)
        fields = self._signatures.fields("GET", target)
        if image.sha256:
            fields["If-Match"] = f'"{image.sha256}"'
        if not whole:
            fields["Range"] = f"bytes={first}-{last}"
        head = line.get(target, fields)
        self.choice.said(member, head.get(LOAD))
        if head.status != (_OK if whole else _PARTIAL_CONTENT):
            raise PeerFailed(f"it answered {head.status}{_said(line, head)}")
        right_part = whole or head.get("Content-Range") == f"bytes {first}-{last}/{image.size}"
        if head.length != last - first + 1 or not right_part:
            raise PeerFailed("it answered with other bytes than it was asked for")

    def _taken(self, url: str) -> Line | None:
        """A connection that was kept, and is not too old."""
        now = time.monotonic()
        with self._lock:
            old = [each for each in self._kept if now - each[0] > _KEPT]
            self._kept = [each for each in self._kept if now - each[0] <= _KEPT]
            found = next((each for each in self._kept if each[1] == url), None)
            if found is not None:
                self._kept.remove(found)
        for _, _, line in old:
            line.close()
        return None if found is None else found[2]

    def _keep(self, url: str, line: Line) -> None:
        with self._lock:
            if line.reusable and len(self._kept) < _KEPT_LINES:
                self._kept.append((time.monotonic(), url, line))
                return
        line.close()

    def _tell(self, member: LiveMember, image_id: str) -> None:
        try:
            self._accuse(member, image_id)
        except ImgsvcError as error:
            log.warning("member not told of its wrong bytes", image=image_id, peer=member.id, reason=str(error))
        except Exception:  # the next is to be told all the same
            log.exception("member not told of its wrong bytes", image=image_id, peer=member.id)


def _said(line: Line, head: Head) -> str:
    """Why, as the member put it: a person is to see that a secret or a clock is wrong."""
    if not 0 < head.length <= _DOCUMENT:
        return ""
    document = bytearray(head.length)
    line.fill(memoryview(document))
    try:
        return f": {read_json(document)['message']}"
    except (ValueError, KeyError, TypeError):
        return ""
