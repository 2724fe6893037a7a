"""What a metadata store says of other members when there are none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from imgsvc.errors import Conflict
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.store import Entry, Member, require_same


class Unshared:
    """The part of a `MetadataStore` that is the same wherever only one process writes: this member transfers what is
    in transfer, and holds what is complete."""

    _member: Member

    def mark(self, last: str) -> str:
        return last

    def get(self, image_id: str) -> Image:
        raise NotImplementedError

    def update(self, image: Image) -> Image:
        raise NotImplementedError

    def survey(self) -> Iterator[Sequence[Entry]]:
        raise NotImplementedError

    def held(self) -> Iterator[Sequence[str]]:
        for page in self.survey():
            if ids := [entry.image.id for entry in page if entry.here]:
                yield ids

    @property
    def stale(self) -> float | None:
        return None

    def look(self, image_id: str) -> tuple[Image, float | None]:
        return self.get(image_id), None

    def expect(self, image_id: str, until: float) -> None:  # noqa: ARG002 - nobody else could end it
        self.get(image_id)

    def may_own(self, image_id: str) -> bool:
        self.get(image_id)
        return True

    def carrier(self, image_id: str) -> str:
        self.get(image_id)
        return ""

    def hold(self, image: Image) -> None:
        require_same(self.get(image.id), image)

    def release(self, image_id: str) -> None:
        """There is nobody else who could hold a complete image."""

    def drop_copy(self, image_id: str, keep: Collection[str]) -> bool:  # noqa: ARG002 - there is no other copy
        self.get(image_id)
        return False

    def lose_copy(self, failed: Image, is_gone: Callable[[], bool]) -> bool:
        if not is_gone():
            raise Conflict(f"the bytes of image {failed.id} are here again")
        self.update(failed)
        return True

    def holders(self, image_id: str) -> Sequence[str]:
        self.get(image_id)
        return ()

    def follow_deletions(self, deleted: Callable[[str], None], gap: Callable[[], None]) -> None:
        """Every deletion is made through this object, so nobody has to be told."""

    def _entry(self, image: Image) -> Entry:
        owner = self._member.id if image.in_transfer else None
        return Entry(image, owner, here=image.status is Status.COMPLETE)
