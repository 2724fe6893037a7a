"""Stored documents that may be passed on as they are."""

from __future__ import annotations

from collections.abc import Iterable

from imgsvc.metadata.image import Image

# About 16 MiB.
_MOST = 200_000


class Documents:
    """Reads a document as an image once; the same text again is passed on unread, for reading takes most of a list's
    time. It remembers hashes, not texts. May be used by several threads."""

    def __init__(self) -> None:
        self._sound: set[int] = set()

    def know(self, texts: Iterable[str]) -> bool:
        """Whether `checked` has found all of them right as they are."""
        return self._sound.issuperset(map(hash, texts))

    def checked(self, text: str) -> str:
        """The document of the image that `text` describes, as `Image.to_json` writes it. Raises ValueError when it
        describes none."""
        key = hash(text)
        if key in self._sound:
            return text
        document = Image.from_json(text).to_json()
        if document == text:
            if len(self._sound) >= _MOST:
                self._sound.clear()
            self._sound.add(key)
        return document
