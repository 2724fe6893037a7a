"""Makes bytes and records agree: at start, and when deletions by other members may have been missed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import structlog

from imgsvc.digests import Digests
from imgsvc.errors import ConfigError, Conflict, ImgsvcError, NoSpace, NotFound, Unavailable, Unreadable
from imgsvc.fetcher import Fetcher
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import LOST, Image, Status
from imgsvc.metadata.store import Entry, MetadataStore, let_go
from imgsvc.uploads import Uploads

# What the marker says of a directory with images of more than one set of records: no identity is this word.
_SEVERAL = "several"

log = structlog.get_logger()


class Maintenance:
    """Settles what the last run of this member left, and only that."""

    def __init__(
        self, images: ImageStore, records: MetadataStore, fetcher: Fetcher, uploads: Uploads, digests: Digests
    ) -> None:
        self._images = images
        self._records = records
        self._fetcher = fetcher
        self._uploads = uploads
        self._digests = digests

    def start_sweep(self) -> None:
        """To be run before anything comes in, and again after Unavailable or NoSpace: each of its steps may be
        repeated.

        Interrupted uploads become `error`, unless they can be resumed, interrupted fetches are pending and submitted
        again, claims and bytes without a record go. Raises ConfigError when the records speak of images and the
        directory has no marker for them and none of the images, as when its dataset is not mounted."""
        stored = set(self._images.ids())
        identity = self._records.identity
        if self._images.fresh or self._images.marked_for not in ("", identity):
            self._refuse_wrong_directory(stored)
        if self._images.fresh:
            self._images.mark("" if stored else identity)
        unfinished = set(self._images.unfinished())
        orphans = set(stored)
        to_fetch: list[str] = []
        for page in self._records.survey():
            for entry in page:
                orphans.discard(entry.image.id)
                to_fetch += self._check(entry, stored, unfinished, identity)
        if self._images.marked_for in ("", identity):
            for image_id in unfinished:
                self._unclaim(image_id)
        else:
            orphans |= unfinished  # the records that they belong to will need them
        self._remove_orphans(orphans, identity)
        for image_id in to_fetch:
            self._fetcher.submit(image_id)

    def reconcile(self) -> None:
        """Drops bytes whose record is gone; may run at any time, for a record is there before its bytes are."""
        identity = self._records.identity
        orphans = set(self._images.ids())
        for page in self._records.survey():
            orphans.difference_update(entry.image.id for entry in page)
        self._remove_orphans(orphans, identity)

    def _refuse_wrong_directory(self, stored: set[str]) -> None:
        """One that holds none of the images which records put here: it is another service's, or not mounted."""
        example = ""
        for page in self._records.survey():
            for entry in page:
                # Without a marker nobody knows what id the directory had.
                expected = entry.here or (entry.was_here and self._images.fresh)
                if expected and entry.image.status is Status.COMPLETE:
                    if entry.image.id in stored:
                        return
                    example = entry.image.id
        if example:
            raise ConfigError(
                f"{self._images.place} has none of the images that this member is on record as holding (such as "
                f"{example}), and no marker for these records: is its file system mounted, and is it the right one?"
            )

    def _size(self, image_id: str) -> int | None:
        """None when the disk cannot tell. Neither this nor the following steps stop a start for one file's sake, which
        would keep all other images from being served."""
        try:
            return self._images.size(image_id)
        except Unreadable as error:
            log.error("image cannot be looked at", image=image_id, reason=str(error))
            return None

    def _set_aside(self, image_id: str) -> bool:
        """False when there is no room for the directory that it goes to, or the disk does not let it go."""
        try:
            self._images.quarantine(image_id)
        except (NoSpace, Unavailable) as error:
            log.error("image cannot be set aside", image=image_id, reason=str(error))
            return False
        return True

    def _remove(self, image_id: str) -> None:
        """Unless the disk does not let it go: then its record does not speak of these bytes."""
        try:
            self._images.delete(image_id)
        except Unreadable as error:
            log.error("bytes of an image cannot be removed", image=image_id, reason=str(error))

    def _unclaim(self, image_id: str) -> None:
        try:
            self._images.unclaim(image_id)
        except Unreadable as error:
            log.error("what is left of a transfer cannot be removed", image=image_id, reason=str(error))

    def _is_ours(self, entry: Entry, *, traces: bool) -> bool:
        """Whether this member was transferring. Without an owner on record, what is on the disk tells."""
        if entry.owner is None:
            return traces
        return entry.owner == self._images.member

    def _check(self, entry: Entry, stored: set[str], unfinished: set[str], identity: str) -> list[str]:
        """The id of the fetch that is to be submitted again, if it is one of ours."""
        if entry.image.in_transfer:
            return self._check_transfer(entry, stored, unfinished, identity)
        if entry.image.status is Status.COMPLETE:
            self._check_complete(entry, stored)
        elif entry.image.id in stored:
            self._check_failed(entry.image, identity)
        return []

    def _check_transfer(self, entry: Entry, stored: Collection[str], unfinished: set[str], identity: str) -> list[str]:
        """The id of the fetch that is to be submitted again, if it is one of ours."""
        image_id = entry.image.id
        if image_id in stored and self._images.marked_for not in ("", identity):
            certain = entry.owner == self._images.member and not entry.image.source
            # These records may be older than the image, which was whole.
            if (certain and self._resumed(entry.image)) or not self._set_aside(image_id):
                return []
        if self._is_ours(entry, traces=image_id in stored or image_id in unfinished):
            unfinished.discard(image_id)
            return self._settle(entry.image)
        if image_id in stored:
            # What another member brings in by now may be other bytes, and these must not stand for them.
            self._remove(image_id)
        return []

    def _resumed(self, image: Image) -> bool:
        """Whether the upload is one that goes on. One that the disk does not give does not."""
        try:
            return self._uploads.take_over(image)
        except Unreadable as error:
            log.error("upload cannot be looked at", image=image.id, reason=str(error))
            return False

    def _settle(self, image: Image) -> list[str]:
        """The id of the fetch that is to be submitted again, if it is one.

        Bytes may stand under the final name: the process died between the rename and the record's last step. Where
        records are shared, that step may be under way to them until the record has been written. So the bytes go after
        that. Should the process die before they have gone, the next start finds them with a record that is pending and
        claimed, or in `error`.
        """
        if not image.source and self._resumed(image):
            return []
        if image.source:
            with contextlib.suppress(NoSpace):  # until they go, the bytes say whose it is, too
                self._images.claim(image.id)
        try:
            self._records.update(
                image.requeued()
                if image.source
                else image.progressed(0).failed("the service stopped during the upload")
            )
        except NoSpace:
            if image.replicas is None:
                # Nothing is under way to records that nobody shares, and they may be on the disk that is full.
                self._remove(image.id)
            raise
        except (Conflict, NotFound) as error:
            log.info("interrupted transfer settled otherwise", image=image.id, reason=str(error))
            return self._settle_otherwise(image.id)
        self._remove(image.id)
        if image.source:
            self._images.claim(image.id)
            return [image.id]
        log.info("interrupted upload is now in error", image=image.id)
        self._unclaim(image.id)
        return []

    def _settle_otherwise(self, image_id: str) -> list[str]:
        """As `_settle`, when the record was written meanwhile: by a request of the last run that came late, or by
        others. From now on no other one of the last run can do anything."""
        kept = False
        with contextlib.suppress(NotFound):
            image = self._records.get(image_id)
            if image.in_transfer and self._records.may_own(image_id):
                return self._settle(image)
            here = image.replicas is None or self._images.member in image.replicas
            kept = image.status is Status.COMPLETE and here
        if not kept:
            self._remove(image_id)
        self._unclaim(image_id)
        return []

    def _check_failed(self, image: Image, identity: str) -> None:
        """Bytes under the name of an image in error. Those of a transfer that another member has ended, between the
        rename and its last step, are nobody's; those of an image that was complete, or may have been under the Go
        program, are left to a person."""
        if self._images.marked_for == identity and not image.may_have_been_whole:
            log.info("bytes of an image in error are removed", image=image.id, reason=image.error)
            self._remove(image.id)

    def _check_complete(self, entry: Entry, stored: set[str]) -> None:
        image = entry.image
        if image.id in stored:
            size = self._size(image.id)
            if size is None:
                return  # its note stays: who asks for the image, and the scrub, find out what is wrong with it
            if size != image.size:
                if entry.here:
                    with contextlib.suppress(NotFound):
                        let_go(self._records, image.id, self._images.member)
                self._set_aside(image.id)
                self._lost(image, f"its file has {size} bytes, and the image {image.size}")
                return
            if image.sha256 and not entry.here:
                # A size is not enough to vouch for what has a digest.
                self._digests.submit(image.id, doubted=True)
            elif not image.sha256:
                # One that another member has deleted since is told of once the sweep is over; one that it has put in
                # error is the next start's.
                with contextlib.suppress(NotFound, Conflict):
                    self._records.hold(image)
                self._digests.submit(image.id)
        elif entry.here:
            aside = image.id in self._images.quarantined()
            self._lost(image, "its bytes are in quarantine" if aside else "its file is missing")

    def _lost(self, image: Image, reason: str) -> None:
        """This member cannot serve a complete image that it should hold."""
        log.error("image lost here", image=image.id, reason=reason)
        try:
            self._records.lose_copy(image.failed(LOST + reason), lambda: True)
        except (Conflict, NotFound) as error:
            log.info("lost image settled otherwise", image=image.id, reason=str(error))

    def _remove_orphans(self, orphans: set[str], identity: str) -> None:
        """Only in a directory that belongs to these very records: with the wrong ones, all images look like orphans.

        So do, once the right ones are back, those that came in under the wrong ones. So a directory with images of
        others belongs to no records, until a person has moved away what is not wanted. Raises Unavailable when the
        records are no longer those of which the orphans are.
        """
        if self._records.identity != identity:
            raise Unavailable("the records are others than a moment ago")
        if self._images.marked_for != identity:
            self._leave_alone(orphans, identity)
            return
        for image_id in orphans:
            try:
                if self._has_no_record(image_id):
                    self._images.delete(image_id)
                    log.info("bytes without a record removed", image=image_id)
            except ImgsvcError as error:
                log.error("bytes that seem to have no record are left", image=image_id, reason=str(error))

    def _leave_alone(self, orphans: set[str], identity: str) -> None:
        # A disk that is too full for the new marker keeps the old one until the next start.
        with contextlib.suppress(ConfigError):
            if not orphans:
                self._images.mark(identity)
            elif self._images.marked_for not in ("", _SEVERAL):
                self._images.mark(_SEVERAL)
        if orphans:
            log.error(
                "images without a record are left alone: the directory was not filled with these records",
                place=self._images.place,
                count=len(orphans),
                example=min(orphans),
            )

    def _has_no_record(self, image_id: str) -> bool:
        """Asked once more: a survey leaves out a record that somebody has spoilt, for which this is Unavailable."""
        try:
            self._records.get(image_id)
        except NotFound:
            return True
        return False
