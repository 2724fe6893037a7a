"""Follows the deletions of records in etcd, through its outages."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from imgsvc.errors import ImgsvcError
from imgsvc.etcd import Compacted, Etcd
from imgsvc.etcd_layout import RECORD, Layout, end_of

# A watch on a frozen member shows nothing; so each is short, and before each a read finds a member that answers.
_WATCH_SECONDS = 2.0
_READ_SECONDS = 2.0
# Between attempts while etcd is away.
_RETRY_SECONDS = 0.5

_log = structlog.get_logger()


class DeletionWatch:
    """Calls `deleted(id)` and `gap()` from its own thread, until `close`; what was deleted before it was made is
    not its concern."""

    def __init__(self, etcd: Etcd, layout: Layout, deleted: Callable[[str], None], gap: Callable[[], None]) -> None:
        self._etcd = etcd
        self._layout = layout
        self._deleted = deleted
        self._gap = gap
        self._stop = threading.Event()
        # The first revision whose deletions were not told yet; None when it is not known.
        self._next: int | None = None
        self._reachable = True
        try:
            self._next = self._revision() + 1
        except ImgsvcError as error:
            self._lost(error)
        self._thread = threading.Thread(target=self._run, name="etcd-deletions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
                self._reachable = True
            except Compacted as error:
                _log.info("deletions may have been missed", reason=str(error))
                self._next = None
            except ImgsvcError as error:
                self._lost(error)
                self._stop.wait(_RETRY_SECONDS)

    def _follow(self) -> None:
        """One watch; `_next` is where the one after it begins."""
        current = self._revision()
        if self._next is None:
            self._tell(self._gap)
            self._next = current + 1
        start = self._layout.images
        for key, revision in self._etcd.deletions(start, end_of(start), self._next, _WATCH_SECONDS, self._stop):
            image_id, name = self._layout.split(key)
            if name == RECORD:
                self._tell(self._deleted, image_id)
            self._next = revision + 1

    def _revision(self) -> int:
        return self._etcd.range(self._layout.images, timeout=_READ_SECONDS).revision

    def _lost(self, error: ImgsvcError) -> None:
        if self._reachable:
            _log.warning("deletions cannot be followed now", reason=str(error))
        self._reachable = False

    def _tell(self, callback: Callable[..., None], *arguments: str) -> None:
        """Raises what store trouble the listener has, so that a gap is told again."""
        try:
            callback(*arguments)
        except ImgsvcError:
            raise
        except Exception:  # noqa: BLE001 - whatever is wrong with the listener, it shall hear of the next one
            _log.exception("listener to deletions failed")
