"""Tells one listener of deletions, in a thread of its own, so that nobody waits for what it does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import structlog

from imgsvc.errors import ImgsvcError

# Before a gap that could not be made up is told again.
_RETRY_SECONDS = 0.5
# Ids that wait to be told; more are a gap, which costs less than to tell them.
_MOST = 100_000

log = structlog.get_logger()


class Deletions:
    """Calls `deleted(id)` and `gap()`, until `close`: each once, in the order in which it was told of them; a gap again
    and again until the listener raises no ImgsvcError."""

    def __init__(self, deleted: Callable[[str], None], gap: Callable[[], None]) -> None:
        self._deleted = deleted
        self._gap = gap
        # None is a gap.
        self._waiting: deque[str | None] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="etcd-deletions", daemon=True)
        self._thread.start()

    def tell(self, image_id: str) -> None:
        """Never blocks."""
        self._add(image_id)

    def tell_gap(self) -> None:
        """Never blocks."""
        self._add(None)

    def close(self) -> None:
        """What waits is not told any more; may be called twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _add(self, news: str | None) -> None:
        with self._changed:
            if len(self._waiting) >= _MOST:
                self._waiting.clear()
                news = None
            self._waiting.append(news)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                news = self._waiting.popleft()
            if not self._told(news):
                with self._changed:
                    self._waiting.appendleft(news)
                    self._changed.wait_for(lambda: self._stopping, _RETRY_SECONDS)

    def _told(self, news: str | None) -> bool:
        """False when it is to be told again."""
        try:
            if news is None:
                self._gap()
            else:
                self._deleted(news)
        except ImgsvcError as error:
            log.warning("deletions not followed yet", reason=str(error))
            return False
        except Exception:  # whatever is wrong with the listener, it shall hear of the next one
            log.exception("listener to deletions failed")
        return True
