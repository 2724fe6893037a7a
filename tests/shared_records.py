"""Records that hosts share, as one of them sees it, without an etcd: who owns and who holds an image is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.memory import MemoryMetadataStore
from imgsvc.metadata.store import Entry, Member

OTHER = Member("c1bd4b4c-9d2e-4dd1-a1a9-7e5b2a7f0d3e", "two.example:/images", "http://two.example:20000")


class SharedRecords(MemoryMetadataStore):
    """`owners` and `holding` are member ids by image; a test says what other members did by changing them."""

    def __init__(self, member: Member) -> None:
        super().__init__(member)
        self.owners: dict[str, str] = {}
        self.holding: dict[str, set[str]] = {}

    def survey(self) -> Iterator[Sequence[Entry]]:
        for page in super().survey():
            yield [
                dataclasses.replace(
                    entry,
                    owner=self.owners.get(entry.image.id),
                    here=self._member.id in self.holding.get(entry.image.id, ()),
                )
                for entry in page
            ]

    def create(self, image: Image) -> Image:
        created = super().create(image)
        self._note(created)
        return created

    def update(self, image: Image) -> Image:
        updated = super().update(image)
        self._note(updated)
        return updated

    def may_own(self, image_id: str) -> bool:
        return self.owners.get(image_id, self._member.id) == self._member.id

    def hold(self, image: Image) -> None:
        super().hold(image)
        self.holding.setdefault(image.id, set()).add(self._member.id)

    def release(self, image_id: str) -> None:
        self.holding.get(image_id, set()).discard(self._member.id)

    def lose_copy(self, failed: Image, is_gone: Callable[[], bool]) -> bool:
        lost = not self.holders(failed.id)
        if lost:
            return super().lose_copy(failed, is_gone)
        self.release(failed.id)
        return False

    def holders(self, image_id: str) -> Sequence[str]:
        self.get(image_id)
        return sorted(self.holding.get(image_id, set()) - {self._member.id})

    def _note(self, image: Image) -> None:
        self.owners.pop(image.id, None)
        if image.in_transfer:
            self.owners[image.id] = self._member.id
        elif image.status is Status.COMPLETE:
            self.hold(image)
        else:
            self.holding.pop(image.id, None)
