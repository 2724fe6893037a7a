"""Uploads that come in pieces: what of them a client was told is there stays so, whatever happens between two pieces."""

from __future__ import annotations

import http.client
import random
import threading
import time
from dataclasses import dataclass

from tests.client import Answer
from tests.cluster_of_three import Member
from tests.faults.model import Model, digest
from tests.harness import wait_for
from tests.tus import Tus, id_of, path_of

_LARGEST = 1 << 20
_SECONDS = 30.0
_CUT = (OSError, http.client.HTTPException)


@dataclass
class _Upload:
    member: Member
    path: str
    content: bytes
    # How far it is, as was last said, and how far it may be.
    told: int = 0
    sent: int = 0


class Pieces:
    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._unfinished: list[_Upload] = []

    def bring(self, member: Member, chance: random.Random) -> None:
        """A piece of an upload to this member, or the beginning of one, if it can be had."""
        upload = self._taken(member) or self._created(member, chance)
        if upload is None:
            return
        tus = Tus(member)
        try:
            at = self._offset(upload, tus.head(upload.path))
            if at is not None:
                piece = upload.content[at : at + round(len(upload.content) * chance.random()) + 1]
                upload.sent = max(upload.sent, at + len(piece))
                answer = tus.patch(upload.path, at, piece)
                assert answer.status in (204, 423, 503, 507), answer
                if answer.status == 204:
                    upload.told = at + len(piece)
        except _CUT:
            pass
        finally:
            self._put_back(upload)

    def finish(self) -> None:
        """Brings the rest of all of them. Only when nothing else is under way, and every member is ready."""
        for upload in self._unfinished:
            wait_for(lambda upload=upload: self._finished(upload), _SECONDS, f"{upload.path} goes on")  # type: ignore[misc]
        self._unfinished.clear()

    def _finished(self, upload: _Upload) -> bool:
        tus = Tus(upload.member)
        at = self._offset(upload, tus.head(upload.path))
        if at is not None and tus.patch(upload.path, at, upload.content[at:]).status == 204:
            self._model.acknowledge(id_of(upload.path), digest(upload.content))
            return True
        time.sleep(0.3)
        return False

    def _taken(self, member: Member) -> _Upload | None:
        with self._lock:
            for upload in self._unfinished:
                if upload.member is member:
                    self._unfinished.remove(upload)
                    return upload
        return None

    def _created(self, member: Member, chance: random.Random) -> _Upload | None:
        content = chance.randbytes(round(_LARGEST ** chance.uniform(0.3, 1)))
        self._model.send(digest(content))
        try:
            created = Tus(member).post(len(content))
        except _CUT:
            return None
        assert created.status in (201, 503, 507), created
        return _Upload(member, path_of(created), content) if created.status == 201 else None

    def _offset(self, upload: _Upload, head: Answer) -> int | None:
        """None when the member cannot say it now."""
        assert head.status in (200, 503), f"{upload.path}: {head}"
        if head.status != 200:
            return None
        at = int(head.headers["Upload-Offset"])
        assert upload.told <= at <= upload.sent, f"{upload.path} is at {at}, and was at {upload.told} to {upload.sent}"
        return at

    def _put_back(self, upload: _Upload) -> None:
        if upload.told < len(upload.content):
            with self._lock:
                self._unfinished.append(upload)
        else:
            self._model.acknowledge(id_of(upload.path), digest(upload.content))
