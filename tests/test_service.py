"""What can be done with images, where two things happen at once."""

from __future__ import annotations

from contextlib import closing

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import NotFound
from tests.rooms import Rooms


def test_a_deletion_that_meets_the_begin_of_a_fetch(rooms: Rooms) -> None:
    """It is no trouble that anybody should hear of, and the fetch ends without a trace."""
    image = rooms.queued()
    with capture_logs() as logged, closing(rooms.disk.writer(image.id)):
        rooms.service.delete(image.id)
    assert [line for line in logged if line["log_level"] == "error"] == []
    transfer = rooms.transfers.fetch(image)
    with pytest.raises(NotFound) as caught:
        transfer.start(5)
    transfer.abort(caught.value)
    assert rooms.listed() == {}
    assert rooms.claims() == set()
