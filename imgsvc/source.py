"""Reads one HTTP source, as often as it takes, and takes nothing for whole that is not."""

from __future__ import annotations

from contextlib import closing

from imgsvc.settings import FetchSettings
from imgsvc.source_answer import Version
from imgsvc.source_reading import Reading, Sink


class Source:
    """One URL, for one thread. `version` is what was found there, now or by an earlier fetch."""

    def __init__(self, url: str, settings: FetchSettings, sink: Sink, version: Version | None = None) -> None:
        self.version = version
        self._url = url
        self._settings = settings
        self._sink = sink
        self._alone = settings.connections == 1

    def read(self, offset: int = 0) -> None:
        """Returns when the whole body, or what is left of `version` from `offset` on, has gone to the sink. A version
        without a strong ETag is read from the beginning.

        Raises Interrupted when the source cannot be reached, breaks off, is silent for `stall_timeout`, or answers 429
        or 5xx: then it may be read again. Raises FetchFailed when it is not allowed, or answers with anything else but
        200 in the end; Incomplete when its body is longer than announced; or what the sink raised.
        """
        known = self.version or Version(self._url)
        if not known.etag:
            offset = 0
        elif offset == known.length:
            self._sink.begin(known, offset)
            return
        with closing(Reading(self._settings, self._sink, known, alone=self._alone)) as reading:
            try:
                reading.read(offset, self._url)
            finally:
                self.version = reading.version
                self._alone = reading.alone
