"""What clients were told, and so what must hold."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Model:
    """Every method may be called from any thread.

    `digests` are of all images that were acknowledged as complete, or seen so. `deleted` are the images whose deletion
    was acknowledged, `doubtful` those for which it was asked, with no answer that tells. `sources` are the contents
    that URLs have, `fetched` what image a URL was said to be.
    """

    digests: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    # How often the deletion of each image was asked for: of several requests at once, one is told that it was there.
    asked: Counter[str] = field(default_factory=Counter)
    offered: dict[str, str] = field(default_factory=dict)
    fetched: dict[str, str] = field(default_factory=dict)
    # Digests of what was sent in uploads, whatever became of them.
    sent: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def acknowledge(self, image_id: str, sha256: str) -> None:
        with self._lock:
            assert self.digests.setdefault(image_id, sha256) == sha256, f"image {image_id} has two contents"

    def send(self, sha256: str) -> None:
        """An upload of these bytes begins."""
        with self._lock:
            self.sent.add(sha256)

    def offer(self, source: str, sha256: str) -> None:
        """The source has these bytes."""
        with self._lock:
            self.offered[source] = sha256

    def accept(self, source: str, image_id: str) -> None:
        """A POST of the source was answered with this image."""
        with self._lock:
            before = self.fetched.get(source)
            gone = before is None or before in self.deleted or before in self.doubtful
            assert gone or before == image_id, f"{source} is image {before}, and then {image_id}"
            self.fetched[source] = image_id

    def doubt(self, image_id: str) -> None:
        """Its deletion is asked for."""
        with self._lock:
            self.doubtful.add(image_id)
            self.asked[image_id] += 1

    def delete(self, image_id: str) -> None:
        """It is gone for good."""
        with self._lock:
            self.doubtful.discard(image_id)
            self.deleted.add(image_id)

    def kept(self) -> dict[str, str]:
        """The digests of what must be there."""
        with self._lock:
            return {each: sha256 for each, sha256 in self.digests.items() if each not in self.deleted | self.doubtful}

    def known(self) -> list[str]:
        """All that may be deleted, in the order in which it was told."""
        with self._lock:
            return [
                each for each in self.digests | dict.fromkeys(self.fetched.values(), "") if each not in self.deleted
            ]

    def gone(self) -> set[str]:
        with self._lock:
            return set(self.deleted)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
