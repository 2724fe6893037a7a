"""What clients do in a run of faults. They do it beside the steps that follow, and what they are told goes into the
model."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from tests.client import Answer
from tests.cluster_of_three import Member
from tests.faults.model import Model, digest
from tests.faults.pieces import Pieces
from tests.source import Resource, Source

_LARGEST = 1 << 20
_SOURCES = 8
_PIECES = 20
# A step waits so long for what it began, and the next then comes into the middle of it.
_HEAD_START = 0.3
_CUT = (OSError, http.client.HTTPException)


class Clients:
    def __init__(self, model: Model, source: Source) -> None:
        self._model = model
        self._source = source
        self._pieces = Pieces(model)
        self._pool = ThreadPoolExecutor(32)
        self._begun: list[Future[None]] = []

    def begin(self, deed: str, member: Member, chance: random.Random) -> None:
        """Begins what is called so at this member."""
        deeds = {
            "upload": self._upload,
            "piece": self._pieces.bring,
            "post": self._post,
            "delete": self._delete,
            "read": self._read,
        }
        begun = self._pool.submit(deeds[deed], member, chance)
        self._begun.append(begun)
        wait([begun], _HEAD_START)

    def look(self) -> None:
        """Raises what a client saw and must not see."""
        for begun in [each for each in self._begun if each.done()]:
            self._begun.remove(begun)
            begun.result()

    def finish(self) -> None:
        """As `look`, when all has come to an end, and every upload is whole. Takes members that are ready."""
        wait(self._begun)
        self.look()
        self._pieces.finish()

    def close(self) -> None:
        self._pool.shutdown()

    def _upload(self, member: Member, chance: random.Random) -> None:
        content = chance.randbytes(round(_LARGEST ** chance.uniform(0.3, 1)))
        self._model.send(digest(content))
        headers = {"X-Image-Type": "kvm"}
        if chance.random() < 0.5:
            headers["Content-Length"] = str(len(content))
        body = _pieces(content, chance.choice([0, 0, 1, 2]))
        answer = _answer(member, lambda: member.request("PUT", "/images", body, headers), (200, 409, 503, 507))
        if answer is not None and answer.status == 200:
            self._model.acknowledge(answer.json()["id"], digest(content))

    def _post(self, member: Member, chance: random.Random) -> None:
        number = chance.randrange(_SOURCES)
        content = random.Random(number).randbytes(50_000 * (number + 1))
        resource = Resource(content, rate=chance.choice([None, 80_000.0]), etag=chance.choice(["", '"one"']))
        url = self._source.serve(f"/{number}", resource)
        self._model.offer(url, digest(content))
        answer = _answer(member, lambda: member.post({"source": url, "type": "kvm"}), (202, 503, 507))
        if answer is not None and answer.status == 202:
            self._model.accept(url, answer.json()["id"])

    def _delete(self, member: Member, chance: random.Random) -> None:
        known = self._model.known()
        if not known:
            return
        image_id = chance.choice(known)
        certain = image_id in self._model.kept()
        self._model.doubt(image_id)
        answer = _answer(member, lambda: member.delete(image_id), (200, 404, 503))
        if answer is not None and answer.status != 503:
            alone = certain and self._model.asked[image_id] == 1
            assert answer.status == 200 or not alone, f"image {image_id} was not there to be deleted"
            self._model.delete(image_id)

    def _read(self, member: Member, chance: random.Random) -> None:
        """A range of what is there, which may be what was asked for or nothing."""
        kept = self._model.kept()
        if not kept:
            return
        image_id = chance.choice(list(kept))
        first = chance.randrange(1000)
        path, headers = f"/images/{image_id}/download", {"Range": f"bytes={first}-{first + 4999}"}
        answer = _answer(member, lambda: member.request("GET", path, headers=headers), (206, 404, 416, 503))
        if answer is not None and image_id in self._model.kept():
            assert answer.status != 404, f"image {image_id} was not found: {answer.message}"


def _answer(member: Member, ask: Callable[[], Answer], expected: Sequence[int]) -> Answer | None:
    """None when the connection ended without one, as it does when the member is killed, or frozen for long."""
    began, breaks = time.monotonic(), member.breaks
    try:
        answer = ask()
    except TimeoutError as error:
        if member.breaks == breaks:
            raise AssertionError(f"{member.name} did not answer") from error
        return None
    except _CUT:
        return None
    assert answer.status in expected, f"{answer.status}: {answer.body[:500]!r}, after {time.monotonic() - began:.1f} s"
    return answer


def _pieces(content: bytes, seconds: float) -> Iterator[bytes]:
    """Evenly over so many seconds."""
    size = len(content) // _PIECES + 1
    for start in range(0, len(content), size):
        yield content[start : start + size]
        time.sleep(seconds / _PIECES)
