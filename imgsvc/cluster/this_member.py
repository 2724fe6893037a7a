"""What this process is, as other members and people may know it."""

from __future__ import annotations

import contextlib
import dataclasses
from datetime import UTC, datetime

from imgsvc import __version__
from imgsvc.errors import ImgsvcError
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import format_time
from imgsvc.metadata.mirror import LiveMember
from imgsvc.metadata.store import Member


class ThisMember:
    """`unmeasured` is what needs no disk to be told."""

    def __init__(self, member: Member, images: ImageStore) -> None:
        self.id = member.id
        self.unmeasured = LiveMember(member.id, member.url, version=__version__, started=format_time(datetime.now(UTC)))
        self._images = images

    def measured(self) -> LiveMember:
        """Without what a disk in trouble cannot tell. Blocks for as long as it hangs."""
        says = self.unmeasured
        with contextlib.suppress(ImgsvcError):
            space = self._images.space()
            says = dataclasses.replace(says, free=space.free, total=space.total)
            says = dataclasses.replace(says, images=self._images.count())
        return says
