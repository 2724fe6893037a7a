"""What can be done with images: each thing that the API offers is one call here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

import structlog

from imgsvc.cluster.orders import Orders
from imgsvc.cluster.pulls import Pulls
from imgsvc.digests import Digests
from imgsvc.errors import (
    Conflict,
    Elsewhere,
    ImgsvcError,
    Invalid,
    NotComplete,
    NotFound,
    SourceTaken,
    Unavailable,
    Unreadable,
)
from imgsvc.fetcher import Fetcher
from imgsvc.images.store import ImageReader, ImageStore
from imgsvc.metadata.image import Image, ImageType, Status, is_id, new_id
from imgsvc.metadata.store import MetadataStore
from imgsvc.settlements import Settlements
from imgsvc.transfer import Transfer
from imgsvc.transfers import Transfers

# Seconds.
_LAST_MOMENT = 1.0

log = structlog.get_logger()


class ImageService:
    """Every method may be called from any thread, and all but `peek` may block. Each raises Unavailable when a store
    cannot answer."""

    def __init__(
        self,
        images: ImageStore,
        records: MetadataStore,
        transfers: Transfers,
        fetcher: Fetcher,
        *,
        settlements: Settlements,
        digests: Digests,
        pulls: Pulls,
        orders: Orders,
        served: Callable[[str], None],
        damaged: Callable[[str], None],
        me: str,
    ) -> None:
        """`served` is told of each image that somebody begins to read here, `damaged` of each whose bytes
        here seem to be; that may raise Unavailable, and neither blocks. `me` is what records call
        this member."""
        self._images = images
        self._records = records
        self._transfers = transfers
        self._fetcher = fetcher
        self._settlements = settlements
        self._digests = digests
        self._pulls = pulls
        self._orders = orders
        self._served = served
        self._damaged = damaged
        self._me = me
        self._fetching_again = threading.Lock()

    def list(self, image_type: ImageType | None) -> Iterator[Sequence[str]]:
        """The documents of all images, or of those of a type, in pages."""
        return self._records.list(image_type)

    @property
    def stale(self) -> float | None:
        """Seconds since what `list` shows was known to be all that there is; None when it is now. Never blocks."""
        return self._records.stale

    def look(self, image_id: str) -> tuple[Image, float | None]:
        """As `get`, but also while the records cannot be asked, where this member remembers them: then with the seconds
        since it last heard of them. Raises Unavailable where it does not."""
        _require_id(image_id)
        return self._records.look(image_id)

    def get(self, image_id: str) -> Image:
        """Raises NotFound, also for what is no id."""
        _require_id(image_id)
        return self._records.get(image_id)

    def peek(self, image_id: str) -> str | None:
        """The document of `get`, or None when only `get` can tell. The one method that never blocks."""
        return self._records.peek(image_id)

    def upload(
        self, image_type: ImageType, comment: str, expected_size: int, expected_sha256: str = "", *, copies: int = 1
    ) -> Transfer:
        """Begins an upload: the caller feeds the transfer, and finishes or aborts it. Raises TooLarge, NoSpace, and
        Invalid or Unavailable when it is clear that so many members will not hold the image."""
        self._orders.require(copies)
        return self._transfers.upload(image_type, comment, expected_size, expected_sha256)

    def wait_for_copies(self, image: Image, count: int) -> Image:
        """Returns when so many members hold the image, which is complete here, and says which ones they are. Raises
        Unavailable, saying how many do, when they do not in time, and Conflict when it was deleted."""
        return self._orders.wait_for(image, count)

    def fetch(self, source: str, image_type: ImageType, comment: str, expected_sha256: str = "") -> Image:
        """The image of this source: a new one, pending; the one that there is; or that one, pending again, when it
        had ended in error. What is fetched by this call must have the digest `expected_sha256`, unless that is "".
        Raises Invalid unless the source is an absolute http(s) URL."""
        check_source(source)
        while True:
            with contextlib.suppress(NotFound):
                # Before anything is claimed: a known source takes no room, and there may be none.
                return self._fetch_again(self._records.get_by_source(source), expected_sha256)
            image = Image(id=new_id(), type=image_type, source=source, comment=comment, expected_sha256=expected_sha256)
            self._images.claim(image.id)
            try:
                image = self._records.create(image)
            except SourceTaken as taken:
                self._images.unclaim(image.id)
                with contextlib.suppress(NotFound):  # deleted since: the source is free again
                    return self._fetch_again(taken.image, expected_sha256)
            except Unavailable:
                # It may be stored, and its source be answered with it from now on; so it is not taken away again.
                self._settlements.later(image.id, functools.partial(self._fetch_if_created, image.id))
                raise
            except ImgsvcError:
                self._settlements.discard(image.id)
                raise
            else:
                self._fetcher.submit(image.id)
                return image

    def delete(self, image_id: str) -> Image:
        """Removes the image and returns it as it was; a transfer of it is told to stop, whoever runs it. Raises
        NotFound."""
        _require_id(image_id)
        image = self._records.delete(image_id)
        self.drop(image_id)
        return image

    def terminate(self, image_id: str) -> None:
        """Deletes an upload, or the image that it has become. Raises NotFound, also for an image that was fetched."""
        if self.get(image_id).source:
            raise NotFound(f"there is no upload {image_id!r}")
        self.delete(image_id)

    def drop(self, image_id: str) -> None:
        """Lets go of what this member has of an image whose record is gone. Never raises: what cannot be removed
        now is an orphan, which the next start removes."""
        reason = Conflict("the image was deleted during its transfer")
        self._transfers.cancel(image_id, reason)
        self._pulls.cancel(image_id, reason)
        try:
            self._images.delete(image_id)
            if not self._transfers.is_known(image_id):
                self._images.unclaim(image_id)
        except Conflict:
            pass  # a fetch that begins at this very moment: it finds no record, and takes its claim with it
        except ImgsvcError as error:
            log.error("bytes of a deleted image are left", image=image_id, reason=str(error))

    def open(self, image_id: str, *, own: bool = False) -> tuple[Image, ImageReader, float | None]:
        """A complete image and its bytes, which the caller closes; and, as `look` has it, how old that knowledge is.
        Bytes that are not here come from another member while they are read, unless only our `own` will do.

        Raises NotFound when there is none, NotComplete when it may not be read, Elsewhere when only other members hold
        its bytes, and are not live or not to be asked, Unavailable when nobody is known to, or has them any more."""
        image, stale = self.look(image_id)
        if image.was_lost and image.replicas is not None:
            # Among members, an image that somebody was promised is never said not to be there.
            raise Unavailable(image.error)
        if image.status is not Status.COMPLETE:
            raise NotComplete(f"image {image.id} is not complete")
        self._served(image.id)
        try:
            return image, self._open_bytes(image), stale
        except (NotFound, Unavailable) as trouble:
            if isinstance(trouble, Unreadable):
                self.doubt(image.id)
            if not own:
                with contextlib.suppress(Elsewhere):
                    return image, self._pulls.open(image), stale
            if isinstance(trouble, Unavailable):
                raise
            raise self._elsewhere(image) from trouble

    def doubt(self, image_id: str) -> None:
        """The bytes that are here cannot be read: what becomes of them is found out in the background, where another
        member may have the image. Never blocks or raises."""
        try:
            self._damaged(image_id)
        except Unavailable as error:
            log.warning("image not looked at", image=image_id, reason=str(error))

    def _elsewhere(self, image: Image) -> Unavailable:
        """What is to be said of an image that is not here."""
        try:
            holders = self._records.holders(image.id)
        except Unavailable:
            holders = image.replicas or ()
        if holders:
            return Elsewhere(f"this member does not hold the image; held by {', '.join(holders)}")
        log.error("bytes of a complete image are missing", image=image.id)
        if image.replicas is not None and self._me in image.replicas:
            return Unavailable(f"{self._me} is on record as holding the image and has lost it; nobody else is known to")
        return Unavailable("this member does not hold the image, and no other is known to")

    def _open_bytes(self, image: Image) -> ImageReader:
        """Raises NotFound when they are not here, Unavailable when they are not to be had."""
        # In this order: a pull that is over has brought the image.
        running, doubted = self._pulls.is_running(image.id), self._digests.doubts(image.id)
        noted = not doubted and (image.replicas is None or self._me in image.replicas)
        if not noted and not self._pulls.has_brought(image):
            self._images.size(image.id)
            # What is here without a note may be left from another transfer of the same image.
            if not running:
                self._digests.submit(image.id, doubted=True)
            raise NotFound("the digest of these bytes has not been found right yet")
        reader = self._images.open(image.id)
        if reader.size != image.size:
            reader.close()
            log.error("bytes of a complete image have changed", image=image.id, bytes=reader.size, size=image.size)
            raise Unreadable(f"the image has {reader.size} bytes on the disk, and should have {image.size}")
        return reader

    def _fetch_if_created(self, image_id: str) -> None:
        """After a `create` of which nobody knows whether it succeeded."""
        try:
            image = self._records.get(image_id)
        except NotFound:
            with contextlib.suppress(NotFound):
                self._records.delete(image_id)  # so that it cannot arrive late
            self._images.unclaim(image_id)
        else:
            # Others may have deleted, fetched or ended it meanwhile.
            if image.status is Status.PENDING and self._records.may_own(image_id):
                self._fetcher.submit(image_id)
            else:
                self._images.unclaim(image_id)

    def _fetch_again(self, image: Image, expected_sha256: str) -> Image:
        """The image of a taken source; one in error is fetched again, once however many ask."""
        if image.status is not Status.ERROR:
            return image
        # One at a time: writing the same change twice succeeds twice, as a repeated write must.
        with self._fetching_again:
            self._wait_for_end(image.id)
            image = self._records.get(image.id)
            if image.status is not Status.ERROR or self._transfers.is_known(image.id):
                return image
            # What it was before it failed may still be on its way here from another member.
            self._pulls.end(image.id, Conflict("the image is fetched again"))
            wanted = dataclasses.replace(image.requeued(), expected_sha256=expected_sha256)
            try:
                return self._fetcher.take(wanted)
            except Conflict:
                return self._records.get(image.id)

    def _wait_for_end(self, image_id: str) -> None:
        """A transfer that failed says so in the record a moment before it is over."""
        latest = time.monotonic() + _LAST_MOMENT
        while self._transfers.is_known(image_id) and time.monotonic() < latest:
            time.sleep(0.02)


def _require_id(text: str) -> None:
    if not is_id(text):
        raise NotFound(f"there is no image {text!r}")


def check_source(source: str) -> None:
    """Raises Invalid unless this is an absolute http or https URL that names a host."""
    try:
        url = urlsplit(source)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or any(character <= " " or character == "\x7f" for character in source):
        raise Invalid("image source is not an absolute http or https URL")
