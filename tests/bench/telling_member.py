"""`imgsvc` itself, of which each member says in its log when its mirror first has an image that was completed since its
start. Run it as a program, with the arguments of `imgsvc`.

Lists are answered from the mirror, so that is when a list would show the image: asking for the list of 100,000 images
often enough to see that would be a load of its own.
"""

from __future__ import annotations

import sys
import time
from unittest import mock

import structlog

from imgsvc.errors import NotFound
from imgsvc.main import main
from imgsvc.metadata.image import Status
from imgsvc.metadata.mirror import Mirror

_log = structlog.get_logger()


class _TellingMirror(Mirror):
    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()
        self.listen(self._changed)

    def _changed(self, image_id: str) -> None:
        try:
            complete = image_id not in self._told and self.get(image_id).status is Status.COMPLETE
        except NotFound:
            return
        if complete:
            at = time.monotonic()
            self._told.add(image_id)
            _log.info("seen", image=image_id, at=at)


if __name__ == "__main__":
    with mock.patch("imgsvc.context.Mirror", _TellingMirror):
        sys.exit(main())
