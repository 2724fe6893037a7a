"""How often one directory has noted how far the records had come: in etcd, too, where a backup has less of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from imgsvc.errors import Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_messages import KeyValue, modified_at, put, read

_ANSWER_SECONDS = 1.0
# Notes that others are quicker with; more in a row is no accident.
_ATTEMPTS = 20
# Of a number that is ours.
_MOST_DIGITS = 18


class NotedCount:
    """Any thread may call; one at a time asks etcd, so that no answer is held against a number that is newer.

    A number is stored only on top of what was there when it was asked for. So one that is stuck on its way, and arrives
    when another has been stored, does nothing, nor does it hide that etcd was restored meanwhile. A key that is gone is
    less as well: that somebody has deleted it cannot be told from a backup which is older, and harms less than that.
    """

    def __init__(self, etcd: Etcd, key: str, number: int) -> None:
        """`number` is what an earlier run has come to."""
        self._etcd = etcd
        self._key = key
        self._lock = threading.Lock()
        self._number = self._tried = number
        # The revision at which the key was written, 0 when there is none; None before it was asked for.
        self._modified: int | None = None

    @property
    def number(self) -> int:
        return self._number

    def has_gone_back(self) -> bool:
        """Whether etcd has less than it had. Raises Unavailable."""
        with self._lock:
            return not self._read()

    def forget(self) -> None:
        """What etcd has when it is asked next is right, however little it is."""
        with self._lock:
            self._number, self._modified = 0, None

    def add(self) -> bool:
        """Makes it one more, in etcd first; False when etcd has less than it had, and then nothing is written. Raises
        Unavailable."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                if self._modified is None and not self._read():
                    return False
                # An attempt whose answer is lost may have been stored, and be in a backup: the next one is higher.
                self._tried = number = max(self._tried, self._number) + 1
                done = self._etcd.transact(
                    [modified_at(self._key, self._modified or 0)],
                    [put(self._key, str(number))],
                    [read(self._key)],
                    timeout=_ANSWER_SECONDS,
                )
                if done.succeeded:
                    self._number, self._modified = number, done.revision
                    return True
                if not self._take(done.found[0]):
                    return False
        raise Unavailable(f"{self._key} is written by others all the time")

    def _read(self) -> bool:
        return self._take(self._etcd.range(self._key, timeout=_ANSWER_SECONDS).items)

    def _take(self, found: Sequence[KeyValue]) -> bool:
        """Goes on from what is there, unless that is less."""
        text = found[0].text if found else ""
        number = int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else 0
        if number < self._number:
            return False
        self._number, self._modified = number, found[0].modified if found else 0
        return True
