"""Whether bytes may come in: the size limit, and the space that must stay free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imgsvc.errors import NoSpace, TooLarge
from imgsvc.images.store import ImageStore, Space


def _make_none(missing: Callable[[], int]) -> None:
    """There is nothing here that could go."""


@dataclass(frozen=True, slots=True)
class Room:
    """`max_image_size` is in bytes, 0 for no limit; `reserve` says how many bytes of a file system of a given size
    stay free whatever comes in, so that records can still be written and images deleted. `make_room` is called where
    space is short, with what tells how many bytes are missing: it may remove what can be had again."""

    images: ImageStore
    max_image_size: int
    reserve: Callable[[int], int]
    make_room: Callable[[Callable[[], int]], None] = _make_none

    def check_size(self, size: int) -> None:
        """Raises TooLarge when no image may have `size` bytes."""
        if self.max_image_size and size > self.max_image_size:
            raise TooLarge(f"an image may have at most {self.max_image_size} bytes")

    def check_space(self, more: int) -> None:
        """Raises NoSpace when `more` bytes do not fit, Unavailable when the disk does not tell."""
        space = self.images.space()
        if self._missing(more, space) > 0:
            self.make_room(lambda: self._missing(more, self.images.space()))
            space = self.images.space()
        if self._missing(more, space) > 0:
            reserve = self.reserve(space.total)
            raise NoSpace(f"no space for {more} bytes: {space.free} are free, of which {reserve} are kept in reserve")

    def _missing(self, more: int, space: Space) -> int:
        return more + self.reserve(space.total) - space.free
