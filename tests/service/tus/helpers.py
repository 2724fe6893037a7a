"""What tests of resumable uploads send, and what must come of it."""

from __future__ import annotations

import hashlib
import os
import time
from email.utils import parsedate_to_datetime

from tests.client import Answer
from tests.tus import Tus, id_of

MIB = 1 << 20
CONTENT = os.urandom(3 * MIB + 17)
UNKNOWN = "/uploads/0b53a0a6-6c41-4f43-9d2c-6c0d2b2f9a11"


def assert_whole(tus: Tus, path: str, content: bytes = CONTENT) -> None:
    """The upload is at its end, and the image is there."""
    image = tus.service.image(id_of(path))
    assert (image["status"], image["size"], image["expected_size"]) == ("complete", len(content), len(content))
    assert image["sha256"] == hashlib.sha256(content).hexdigest()
    assert tus.service.download(image["id"]).body == content
    assert tus.offset(path) == len(content)


def assert_expires(answer: Answer, seconds: float) -> None:
    left = parsedate_to_datetime(answer.headers["Upload-Expires"]).timestamp() - time.time()
    assert seconds - 5 < left <= seconds + 1
