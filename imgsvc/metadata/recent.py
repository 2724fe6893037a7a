"""Records that were read lately, for those who may not wait for the disk."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Hashable, Iterator, Sequence

from imgsvc.metadata.image import Image

# Together at most 32 MiB of text, and less than 10 MiB as images usually are.
_MOST = 8_192
_LONGEST = 4_096
# About 10 MiB as well.
_MOST_PAGES = 16

# What is on one page of a list, and what the next begins after.
Page = tuple[Sequence[str], str | None]


class Recent:
    """Documents by id, each as its record is now. May be used by several threads; one at a time writes records.

    What was read is kept only if no record was written since the reading began, and what is being written is not here
    from before its commit. That other processes wrote nothing has to be found out, and said by `trust` or `forget`
    again and again: nothing is answered later than that allows.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._documents: dict[str, str] = {}
        self._pages: dict[Hashable, Page] = {}
        self._pages_state = 0
        self._trusted_until = 0.0
        self._state = 0
        self._writing = False

    @property
    def state(self) -> int:
        """To be asked for before a record is read, and handed to `keep`."""
        return self._state

    def get(self, image_id: str) -> str | None:
        """Never waits."""
        return self._documents.get(image_id) if time.monotonic() < self._trusted_until else None

    def keep(self, image: Image, state: int) -> None:
        """`image` has been read since the state was `state`."""
        if image.id in self._documents:
            return
        document = image.to_json()
        with self._lock:
            if self._writing or state != self._state or len(document) > _LONGEST:
                return
            if len(self._documents) >= _MOST:
                del self._documents[next(iter(self._documents))]
            self._documents[image.id] = document

    def page(self, key: Hashable) -> Page | None:
        """A page of a list, while no record at all has been written since it was read."""
        with self._lock:
            current = self._pages_state == self._state and time.monotonic() < self._trusted_until
            return self._pages.get(key) if current else None

    def keep_page(self, key: Hashable, page: Page, state: int) -> None:
        """`page` has been read since the state was `state`. The first pages of the first list are kept."""
        with self._lock:
            if self._writing or state != self._state:
                return
            if state != self._pages_state:
                self._pages.clear()
                self._pages_state = state
            if len(self._pages) < _MOST_PAGES:
                self._pages[key] = page

    @contextlib.contextmanager
    def writing(self, image_id: str) -> Iterator[None]:
        """While this record is written."""
        with self._lock:
            self._state += 1
            self._writing = True
            self._documents.pop(image_id, None)
        try:
            yield
        finally:
            with self._lock:
                self._state += 1
                self._writing = False

    def trust(self, until: float) -> None:
        """What is here may be answered until then, by `time.monotonic`."""
        self._trusted_until = until

    def forget(self) -> None:
        """Somebody else has written."""
        with self._lock:
            self._state += 1
            self._documents.clear()
