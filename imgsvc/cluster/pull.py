"""One image on its way from other members to this one, while clients already read it.

What has come is in a file that is no image yet. Clients read it from there (`follower.py`), all but the last bytes:
those are theirs when the digest of the whole has been found right, so that nobody ever has a whole body of wrong bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor

import structlog

from imgsvc.blocks import BLOCK
from imgsvc.cluster.course import Course
from imgsvc.cluster.line import TICK, Line
from imgsvc.cluster.supply import Supply
from imgsvc.errors import Conflict, ImgsvcError, NotFound, PeerFailed, Unavailable
from imgsvc.images.store import ImageReader, ImageStore, ImageWriter
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import LiveMember
from imgsvc.room import Room
from imgsvc.throttle import Throttle

# Seconds after which bytes of a slow member are written, so that followers have them.
_PATIENCE = 0.04
# Bytes without which a member that broke off has been of no use.
_USE = 64 * 1024
# How often a pull may begin because of a wrong digest.
_ATTEMPTS = 5

log = structlog.get_logger()


class Pull:
    """`run` is for one thread, and everything else for any."""

    def __init__(
        self,
        image: Image,
        images: ImageStore,
        supply: Supply,
        *,
        room: Room,
        admit: Callable[[], None],
        hashers: Executor,
        stored: Callable[[Image], bool],
        held: Callable[[Image], None],
        background: bool = False,
        throttle: Throttle | None = None,
    ) -> None:
        """`admit` raises NoSpace when the image will not fit beside what else is on its way. `stored` says
        whether its very bytes are here by now. `held` notes that the committed image is here, or raises why it is not
        to be. One in the `background` began without a client; the throttle holds for
        as long as it has none, and nobody is in a hurry."""
        self.image = image
        self.course = Course(image.size)
        self._images = images
        self._supply = supply
        self._room = room
        self._admit = admit
        self._hashers = hashers
        self._stored = stored
        self._held = held
        self._background = background
        self._throttle = throttle
        self._digest = hashlib.sha256()
        self._buffer = memoryview(b"")
        # Who gave bytes of this attempt, and who has given a whole one that was wrong.
        self._givers: dict[str, LiveMember] = {}
        self._liars: set[str] = set()
        self._attempts = 1
        self._reason: Exception | None = None
        self._over = threading.Event()

    @property
    def missing(self) -> int:
        """Bytes that are still to be written."""
        return 0 if self._over.is_set() else self.image.size - self.course.position

    @property
    def is_idle(self) -> bool:
        """Whether no client reads it."""
        return self._background and not self.course.followed

    def hurry(self) -> None:
        """Somebody waits for the copy: it goes as fast as it can from now on."""
        self._throttle = None

    def cancel(self, reason: ImgsvcError) -> None:
        """Ends it soon, and for those who follow at once; does nothing when the image is whole."""
        self.course.fail(reason)

    def result(self, seconds: float) -> bool:
        """True when the image is held here, False when nobody knows after so many seconds. Raises why it is not."""
        if not self._over.wait(seconds):
            return False
        if self._reason is not None:
            raise self._reason
        return True

    def run(self) -> None:
        """Returns when the pull is over, whatever came of it."""
        began = time.monotonic()
        try:
            self._run()
        except ImgsvcError as error:
            self._reason = error
        except Exception as error:
            log.exception("pull failed unexpectedly", image=self.image.id)
            self._reason = error
        finally:
            self._buffer = memoryview(b"")
            self.course.fail(Unavailable("the image could not be brought here"))
            self._over.set()
            self._log(time.monotonic() - began)

    def _run(self) -> None:
        """Raises why the image was not brought here in the end."""
        if self._stored(self.image):
            # Who follows asked for it before another pull was over, and began to read afterwards.
            self.course.begin(self._open_stored)
            self.course.advance(self.image.size)
            self.course.verify()
            raise Conflict("the image is here already")
        writer: ImageWriter | None = None
        try:
            self._admit()
            writer = self._images.writer(self.image.id, followed=not self._background)
            self._fill(writer)
            writer.commit()
        except Exception as error:
            self._let_go(writer, error)
            raise
        self._held(self.image)

    def _open_stored(self) -> ImageReader:
        try:
            return self._images.open(self.image.id)
        except NotFound as error:
            raise Unavailable("the image is not here any more") from error

    def _fill(self, writer: ImageWriter) -> None:
        self.course.begin(lambda: writer.follow(self.image.size))
        self._buffer = memoryview(mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._bring(writer)
        while (found := self._digest.hexdigest()) != self.image.sha256:
            self._begin_anew(writer, found)
            self._bring(writer)
        self.course.verify()

    def _let_go(self, writer: ImageWriter | None, error: Exception) -> None:
        """Followers go on without a copy, unless there is none to be had. The file goes when the last has it read."""
        if isinstance(error, PeerFailed):
            self.course.fail(error)
        else:
            self.course.pass_on(self._digest)
        if writer is not None:
            writer.close()
            with contextlib.suppress(ImgsvcError):  # the next start finds it
                self._images.unclaim(self.image.id)

    def _begin_anew(self, writer: ImageWriter, found: str) -> None:
        """Also those who gave what was right are to look: nobody knows who gave what was not."""
        givers, self._givers = self._givers, {}
        self._digest = hashlib.sha256()
        # Before anything that may fail: who follows must not get the last of these bytes, whatever comes now.
        self.course.begin_anew()
        self._supply.accuse(givers.values(), self.image)
        if self._attempts == _ATTEMPTS or not givers:
            raise PeerFailed(f"the bytes have the SHA-256 {found}, and were to have {self.image.sha256}")
        if len(givers) == 1:
            self._liars.update(givers)
            for member in givers.values():
                self._supply.choice.failed(member)  # other pulls begin with another one
        self._attempts += 1
        writer.truncate(0)

    def _bring(self, writer: ImageWriter) -> None:
        """All that is missing, from one member after another."""
        tried: set[str] = set()
        trouble = "no other is live, or known to have the right bytes"
        while self.course.position < self.image.size:
            self.course.look()
            member = self._supply.choice.best(self.image, tried | self._liars)
            if member is None:
                raise self._supply.nobody(self.image, trouble)
            before = self.course.position
            try:
                self._bring_from(member, writer)
            except PeerFailed as error:
                trouble = f"{member.id}: {error}"
            if self.course.position > before:
                self._givers[member.id] = member
            tried = set() if self.course.position - before >= _USE else tried | {member.id}

    def _bring_from(self, member: LiveMember, writer: ImageWriter) -> None:
        with self._supply.rest(self.image, member, self.course.position, self.course.look) as line:
            while self.course.position < self.image.size:
                self._take(line, writer)

    def _take(self, line: Line, writer: ImageWriter) -> None:
        """The next bytes, up to a multiple of BLOCK from the beginning."""
        position = self.course.position
        room = self._buffer[: min(BLOCK - position % BLOCK, self.image.size - position)]
        filled, began = 0, time.monotonic()
        heard = began
        try:
            while filled < len(room):
                self.course.look()
                count = line.receive(room[filled:])
                now = time.monotonic()
                if count:
                    filled, heard = filled + count, now
                else:
                    self.course.tell_if_due()
                    line.wait(heard)
                # The first bytes of all are what clients wait for most.
                if filled and self._is_hurried and (not count or not position or now - began > _PATIENCE):
                    break
        finally:
            if filled:
                self._write(writer, room[:filled])

    @property
    def _is_hurried(self) -> bool:
        """Whether bytes are not to wait for a block to be full."""
        return not self._background or self.course.followed

    def _write(self, writer: ImageWriter, block: memoryview) -> None:
        self.course.look()
        self._room.check_space(len(block))
        before = self._digest.copy()
        hashing = self._hashers.submit(self._digest.update, block)
        try:
            writer.write(block)
        except BaseException:
            hashing.result()
            self._digest = before
            raise
        hashing.result()
        self.course.advance(len(block))
        self._pace(len(block))

    def _pace(self, size: int) -> None:
        throttle = self._throttle
        if throttle is None or self.course.followed:
            return
        until = time.monotonic() + throttle.take(size)
        while (rest := until - time.monotonic()) > 0 and not self.course.followed and self._throttle is throttle:
            self.course.look()
            time.sleep(min(rest, TICK))

    def _log(self, seconds: float) -> None:
        seconds = max(seconds, 1e-3)
        size = self.course.position
        log.info(
            "pull",
            image=self.image.id,
            bytes=size,
            seconds=round(seconds, 3),
            mb_per_s=round(size / 1e6 / seconds, 1),
            peers=sorted(self._givers),
            outcome="held" if self._reason is None else "not held",
            reason="" if self._reason is None else str(self._reason),
        )
