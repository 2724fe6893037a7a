"""One reading of a source, over one connection or several: in order, and as far as it can be believed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ParamSpec, Protocol
from urllib.parse import urljoin

from imgsvc.blocks import BLOCK
from imgsvc.errors import FetchFailed, ImgsvcError, Interrupted
from imgsvc.metadata.image import UNKNOWN_SIZE
from imgsvc.settings import FetchSettings
from imgsvc.source_answer import Part, Version
from imgsvc.source_curl import Request, Requests

P = ParamSpec("P")

_OK = 200
_PARTIAL_CONTENT = 206
_REDIRECTS = (301, 302, 303, 307, 308)
_RANGE_NOT_SATISFIABLE = 416
_TOO_MANY_REQUESTS = 429
_SERVER_ERRORS = range(500, 600)
# Seconds that a source which has sent all it announced has to close, or to show that it sends more.
_GRACE = 1.0
# Seconds between two looks at what does not come from curl.
_TICK = 0.25
# Bytes that one of several connections fetches at a time. So many for each of them may wait in memory.
PIECE = 8 * BLOCK


class Sink(Protocol):
    """Where the bytes of a source go. Whatever it raises ends the reading, and comes out of `Reading.read`."""

    def begin(self, version: Version, offset: int) -> None:
        """The pieces that follow are those of the version from `offset` on: how far the last reading came, or 0, and
        then all that came before is void."""

    def pace(self, size: int) -> None:
        """So many bytes have arrived; returns when more may."""

    def piece(self, data: bytes) -> None:
        """The next bytes in order."""

    def tick(self) -> None:
        """Called at least once a second, also while nothing arrives."""


@dataclass(eq=False)
class _Stretch:
    """Bytes from `first` to `end`, excluded, or to the source's end, that one request brings. They wait in `waiting`
    until all before them are there."""

    request: Request
    first: int
    end: int | None = None
    got: int = 0
    waiting: list[bytes] = field(default_factory=list)
    done: bool = False

    @property
    def position(self) -> int:
        return self.first + self.got

    @property
    def is_full(self) -> bool:
        return self.position == self.end


class Reading:
    """One try. It begins with one connection. Where the source turns out to serve ranges of the same version, others
    fetch pieces ahead of it; a source that does not keep to that is left to the one connection.

    `version` is what was found; `alone` says that more than one connection is of no use. A redirect is remembered, as
    part of the version, once there was an image behind it.
    """

    def __init__(self, settings: FetchSettings, sink: Sink, version: Version, *, alone: bool) -> None:
        self.version = version
        self.alone = alone
        self._settings = settings
        self._sink = sink
        self._requests = Requests()
        self._stretches: deque[_Stretch] = deque()
        self._of: dict[Request, _Stretch] = {}
        self._probe: Request | None = None
        # The first byte that nobody has asked for, once there are several connections.
        self._next: int | None = None
        self._redirects = 0
        self._lied = False
        # Where to begin anew when what an earlier redirect led to is gone.
        self._home: str | None = None

    def close(self) -> None:
        self._requests.close()

    def read(self, offset: int, home: str) -> None:
        if home != self.version.url:
            self._home = home
        self._ask_for_rest(offset)
        while self._stretches:
            ended = self._requests.step(_TICK)
            if self._lied:
                self._disbelieve()
            for request, code, message in ended:
                self._ended(request, code, message)
            self._hand_on()
            self._ask_for_pieces()
            self._unhurried(self._sink.tick)
            self._look_for_silence()

    # What becomes of answers: a `Receiver`.

    def answered(self, request: Request) -> None:
        answer = request.answer
        if request.part is not None and request.part.last is not None:
            if answer.status != _PARTIAL_CONTENT or not answer.is_part(request.part, self.version.length):
                raise _NotServed
            if request is self._probe:
                self._split()
        elif answer.status in _REDIRECTS and answer.location:
            raise _Redirected(answer.location)
        else:
            self._begin(request)

    def received(self, request: Request, pieces: list[bytes]) -> None:
        stretch = self._of.get(request)
        if stretch is None:
            return  # the probe's byte
        size = sum(map(len, pieces))
        fitting = self._fitting(stretch, size)
        if fitting < size:
            size, pieces = fitting, [b"".join(pieces)[:fitting]]
        stretch.got += size
        self._unhurried(self._sink.pace, size)
        if stretch is self._stretches[0]:
            self._unhurried(self._deliver, pieces)
        else:
            stretch.waiting += pieces

    def _deliver(self, pieces: list[bytes]) -> None:
        for data in pieces:
            self._sink.piece(data)

    def _disbelieve(self) -> None:
        """All that came is void, and the whole is asked for, alone. First that is told, and then asked: should we end
        before there is an answer, nobody goes on behind what the source sent."""
        self.alone, self._lied = True, False
        self.version = Version(self.version.url)
        self._unhurried(self._sink.begin, self.version, 0)
        self._ask_anew(self.version.url)

    # One connection.

    def _ask_for_rest(self, offset: int) -> None:
        part = Part(offset, None, self.version.etag) if offset else None
        self._add(_Stretch(Request(self.version.url, part, self._settings, self), offset))

    def _ask_anew(self, url: str) -> None:
        """For the whole, and whatever it is now."""
        for stretch in self._stretches:
            self._give_up(stretch)
        self._stretches.clear()
        self._next = None
        if self._probe is not None:
            self._requests.end(self._probe)  # what it says is of the past
            self._probe = None
        self._add(_Stretch(Request(url, None, self._settings, self), 0))

    def _begin(self, request: Request) -> None:
        answer, part = request.answer, request.part
        stretch = self._of[request]
        self._check_status(request)
        if answer.status == _OK:
            self.version = Version(request.url, answer.etag, answer.length)
            stretch.first = 0
        elif part is None or answer.range is None or not answer.is_part(part, self.version.length):
            raise _Anew(request.url)
        else:
            self.version = replace(self.version, length=answer.range[-1])
        self._home = None
        self._unhurried(self._sink.begin, self.version, stretch.first)
        rest = self.version.length - stretch.first
        if not self.alone and self.version.etag and answer.takes_ranges and rest > self._settings.split_size:
            last = self.version.length - 1
            self._probe = Request(self.version.url, Part(last, last, self.version.etag), self._settings, self)

    def _check_status(self, request: Request) -> None:
        """Raises what an answer without the bytes means."""
        answer, part = request.answer, request.part
        if answer.status == _OK or (part is not None and answer.status == _PARTIAL_CONTENT):
            return
        if part is not None and answer.status == _RANGE_NOT_SATISFIABLE:
            raise _Anew(request.url)
        message = f"the source answered {answer.status}"
        if answer.status == _TOO_MANY_REQUESTS or answer.status in _SERVER_ERRORS:
            raise Interrupted(message, answer.retry_after)
        if self._home is not None and request.url == self.version.url:
            raise _Anew(self._home)
        raise FetchFailed(message)

    def _fitting(self, stretch: _Stretch, size: int) -> int:
        """Of so many bytes that follow in the stretch, how many are part of it."""
        end = self.version.length if stretch.end is None else stretch.end
        rest = size if end == UNKNOWN_SIZE else end - stretch.position
        if size > rest and (stretch.end is None or not stretch.request.may_go_on):
            # Then nothing that it sent so far need be what it said.
            self._lied = True
        return min(size, rest)

    def _ended(self, request: Request, code: int, message: str) -> None:
        if request is self._probe:
            self.alone = self.alone or self._next is None
            return
        stretch = self._of.pop(request, None)
        if stretch is None:
            return
        if stretch.is_full:
            stretch.done = True
        else:
            self._ended_early(stretch, code, message)

    def _ended_early(self, stretch: _Stretch, code: int, message: str) -> None:
        """Or as it should, where nobody knew how much there is."""
        request = stretch.request
        try:
            request.check(code, message)
        except _Redirected as redirect:
            self._follow(redirect, stretch)
            return
        except _Anew as anew:
            self._home = None
            self._ask_anew(anew.url)
            return
        except _NotServed:
            self._fall_back()
            return
        except FetchFailed as error:
            if request.may_go_on:
                raise
            if request.has_answer:
                raise Interrupted(str(error)) from error
            self._fall_back()
            return
        self._check_end(stretch)

    def _check_end(self, stretch: _Stretch) -> None:
        """It ended as it should, though perhaps too early."""
        end = self.version.length if stretch.end is None else stretch.end
        if end in (UNKNOWN_SIZE, stretch.position):
            stretch.done = True
        elif stretch.request.may_go_on:
            raise Interrupted(f"the source ended after {stretch.position} of {end} bytes")
        else:
            self._fall_back()

    def _follow(self, redirect: _Redirected, stretch: _Stretch) -> None:
        if self._redirects == self._settings.max_redirects:
            raise FetchFailed(f"the source redirected more than {self._settings.max_redirects} times")
        self._redirects += 1
        # An ETag means nothing elsewhere, so there is nothing to go on with.
        self._ask_anew(_resolved(stretch.request.url, redirect.location))

    def _hand_on(self) -> None:
        """What waits only for what came before it."""
        while self._stretches:
            head = self._stretches[0]
            if head.is_full and not head.done and head.request.may_go_on:
                self._end(head)  # its further bytes are those of the next
            if not head.done:
                return
            self._stretches.popleft()
            if self._stretches:
                waiting, self._stretches[0].waiting = self._stretches[0].waiting, []
                self._unhurried(self._deliver, waiting)

    # Several connections.

    def _split(self) -> None:
        """From now on the first connection brings a piece like the others."""
        first = self._stretches[0]
        end = (first.position // BLOCK + 1) * BLOCK + PIECE
        if end < self.version.length:
            first.end = self._next = end

    def _ask_for_pieces(self) -> None:
        if self._probe is not None and not self._probe.begun:
            self._requests.add(self._probe)
        if self._next is None:
            return
        connections, length = self._settings.connections, self.version.length
        latest = (self._stretches[0].position if self._stretches else self._next) + connections * PIECE
        while self._next < min(length, latest) and len(self._requests) < connections:
            end = min(self._next + PIECE, length)
            part = Part(self._next, end - 1, self.version.etag)
            self._add(_Stretch(Request(self.version.url, part, self._settings, self), self._next, end))
            self._next = end

    def _fall_back(self) -> None:
        """To one connection, from where the bytes in order end."""
        self._hand_on()
        self.alone, self._next = True, None
        head = self._stretches.popleft()
        for stretch in self._stretches:
            self._give_up(stretch)
        self._stretches.clear()
        if head.request.may_go_on and not head.is_full:
            head.end = None
            self._stretches.append(head)
        else:
            self._give_up(head)
            self._ask_for_rest(head.position)

    # All of them.

    def _add(self, stretch: _Stretch) -> None:
        self._stretches.append(stretch)
        self._of[stretch.request] = stretch
        self._requests.add(stretch.request)

    def _end(self, stretch: _Stretch) -> None:
        self._give_up(stretch)
        stretch.done = True

    def _give_up(self, stretch: _Stretch) -> None:
        self._requests.end(stretch.request)
        self._of.pop(stretch.request, None)

    def _look_for_silence(self) -> None:
        for request, seconds in self._requests.silent():
            if request.may_go_on and request.is_whole and seconds > _GRACE:
                self._end(self._of[request])
            elif seconds > self._settings.stall_timeout:
                if request is self._probe:
                    self._requests.end(request)
                    self.alone = True
                elif request.may_go_on or request.has_answer:
                    # curl's own watch averages over five seconds, and so is late.
                    raise Interrupted(f"the source sent nothing for {self._settings.stall_timeout:g} seconds")
                else:
                    self._fall_back()
                    return

    def _unhurried(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """A slow disk, or a limit of ours, is not the source's silence."""
        began = time.monotonic()
        call(*args, **kwargs)
        self._requests.forgive(time.monotonic() - began)


def _resolved(url: str, location: str) -> str:
    """Where a redirect from the URL leads. Raises FetchFailed."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchFailed("the source redirected to what is no URL") from error


class _Redirected(ImgsvcError):
    """Ends the reading of an answer that says where the source is; curl would read its body first."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


class _Anew(ImgsvcError):
    """The source cannot go on where the last reading ended, and has to be read from its beginning, at this URL."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


class _NotServed(ImgsvcError):
    """The source does not serve a piece, or not to so many connections."""
