"""Requests of a source, made with curl: several at once, in one thread."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import Any, Protocol

import certifi
import pycurl

from imgsvc import __version__
from imgsvc.errors import FetchFailed, Incomplete, Interrupted
from imgsvc.metadata.image import UNKNOWN_SIZE
from imgsvc.settings import FetchSettings
from imgsvc.source_answer import Answer, Part

_OK = 200
# A write callback that returns anything but the length it was given ends the transfer, as a progress callback does
# that returns anything but 0.
_ABORT = -1
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
# Bytes that curl may hand over at once; less where they have to wait for a limit, so that nothing waits long for it.
_MOST_AT_ONCE = 128 * 1024
_LEAST_AT_ONCE = 16 * 1024
# What may be over by the next time. What speaks of the URL or of a certificate will not be.
_PASSING = frozenset(
    {
        pycurl.E_COULDNT_RESOLVE_HOST,
        pycurl.E_COULDNT_CONNECT,
        pycurl.E_OPERATION_TIMEDOUT,
        pycurl.E_SSL_CONNECT_ERROR,
        pycurl.E_GOT_NOTHING,
        pycurl.E_SEND_ERROR,
        pycurl.E_RECV_ERROR,
        pycurl.E_PARTIAL_FILE,
    }
)


class Receiver(Protocol):
    """What becomes of an answer."""

    def answered(self, request: Request) -> None:
        """The headers are there; those of 100 (Continue) and its like are no answer. Whatever it raises ends the
        request, and comes out of `Request.check`."""

    def received(self, request: Request, pieces: list[bytes]) -> None:
        """The next bytes of the body, as curl delivered them: joining them would cost more than the rest. Whatever it
        raises comes out of `Requests.step`."""


class Request:
    """One GET. `answer` is what came of headers so far, `body` the number of bytes; `part` is None for the whole.

    A part that has an end may be one of many on one connection. For any other the source is asked to close at the end,
    for curl stops reading at the announced length, and so would not see that a source sends more: we count ourselves.
    """

    def __init__(self, url: str, part: Part | None, settings: FetchSettings, receiver: Receiver) -> None:
        self.url = url
        self.part = part
        self.answer = Answer()
        # Whether an address of the source is known.
        self.found = False
        self.begun = self.has_answer = False
        self.body = 0
        self.heard = time.monotonic()
        self.curl = pycurl.Curl()
        self._settings = settings
        self._receiver = receiver
        self._arrived: list[bytes] = []
        self._error: Exception | None = None
        self._denied: str | None = None
        self._set_up()

    @property
    def may_go_on(self) -> bool:
        """Whether no last byte was asked for."""
        return self.part is None or self.part.last is None

    @property
    def is_whole(self) -> bool:
        """Whether as many bytes came as were announced."""
        return self.has_answer and self.body == self.answer.length

    def check(self, code: int, message: str) -> None:
        """Now that curl has ended it. Raises Interrupted or FetchFailed when the body is not whole, Incomplete when it
        is longer than announced, or what the receiver raised."""
        if self._error is not None:
            raise self._error
        if self.is_whole:
            return  # how the connection ends after the last byte is nobody's concern
        if code == pycurl.E_COULDNT_CONNECT and self._denied is not None:
            raise FetchFailed(f"the source's address {self._denied} is in fetch.denyNetworks")
        if code != pycurl.E_OK:
            kind = Interrupted if code in _PASSING else FetchFailed
            raise kind(f"the source could not be fetched: {message} (curl {code})")
        if not self.has_answer:
            raise Interrupted("the source closed the connection in the middle of its headers")
        if self.answer.length != UNKNOWN_SIZE:
            raise Interrupted(f"the source announced {self.answer.length} bytes and sent only {self.body}")

    def hand_on(self) -> None:
        """What has arrived goes to the receiver. Raises Incomplete when it is more than was announced, or what the
        receiver raises."""
        if not self._arrived:
            return
        self.heard = time.monotonic()
        pieces = self._arrived.copy()
        self._arrived.clear()
        self.body += sum(map(len, pieces))
        if self.answer.length != UNKNOWN_SIZE and self.body > self.answer.length:
            raise Incomplete(f"the source announced {self.answer.length} bytes and sent more")
        self._receiver.received(self, pieces)

    def _set_up(self) -> None:
        set_option = self.curl.setopt
        set_option(pycurl.URL, self.url.encode())
        set_option(pycurl.NOSIGNAL, 1)  # curl's signals are not for programs with threads
        set_option(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        set_option(pycurl.PROXY, "")  # a proxy would connect where `_open_socket` cannot look
        set_option(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        set_option(pycurl.CAINFO, certifi.where())
        set_option(pycurl.USERAGENT, f"imgsvc/{__version__}")
        set_option(pycurl.CONNECTTIMEOUT_MS, round(self._settings.connect_timeout * 1000))
        set_option(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        set_option(pycurl.BUFFERSIZE, _at_once(self._settings.max_bytes_per_second))
        fields = [] if self.part is None else self.part.fields
        if self.may_go_on:
            set_option(pycurl.IGNORE_CONTENT_LENGTH, 1)
            set_option(pycurl.FRESH_CONNECT, 1)  # on a used one may be what others sent too much
            fields = [*fields, "Connection: close"]
        set_option(pycurl.HTTPHEADER, [field.encode("latin-1") for field in fields])
        set_option(pycurl.HEADERFUNCTION, self._guard(self._header))
        # Curl hands over 16 KiB at most, and so calls this 65,536 times a GiB: it is no function of Python's.
        set_option(pycurl.WRITEFUNCTION, self._arrived.append)

    def _guard(self, callback: Callable[[bytes], None]) -> Callable[[bytes], int | None]:
        """Remembers the first error, which curl would turn into a bare number, and pycurl print."""

        def guarded(data: bytes) -> int | None:
            if self._error is None:
                try:
                    callback(data)
                except Exception as error:  # noqa: BLE001 - `check` raises it
                    self._error = error
                else:
                    return None
            return _ABORT

        return guarded

    def _open_socket(self, _purpose: int, address: tuple[int, int, int, tuple[str, int]]) -> socket.socket | int:
        """Looks at each address that curl is about to connect to, whatever name or spelling led to it."""
        self.found = True
        family, kind, protocol, name = address
        ip = ip_address(name[0].partition("%")[0])
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        if ip.is_unspecified:  # where the kernel connects to this host
            ip = ip_address(_LOOPBACK[ip.version])
        if any(ip in network for network in self._settings.deny_networks):
            self._denied = str(ip)
            return pycurl.SOCKET_BAD
        self.heard = time.monotonic()
        return _Socket(family, kind, protocol)

    def _header(self, line: bytes) -> None:
        self.heard = time.monotonic()
        text = line.decode("latin-1").strip()
        if text.startswith("HTTP/"):
            # A number, or curl would have refused it.
            self.answer = Answer(int(text.split()[1]))
        elif self.has_answer:
            pass  # a trailer: the body's length was said before
        elif text:
            self.answer.take(text)
        elif self.answer.status >= _OK:
            self.has_answer = True
            self._receiver.answered(self)


class Requests:
    """The requests under way. For one thread.

    Not curl's own select, which knows no descriptor above 1,023: a service with a thousand downloads has such.
    """

    def __init__(self) -> None:
        self._requests: dict[Any, Request] = {}
        try:
            self._poll = select.epoll()
        except OSError as error:
            raise Interrupted(f"nothing can be fetched now: {error.strerror}") from error
        self._watched: set[int] = set()
        self._timer: float | None = None
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        request.begun = True
        request.heard = time.monotonic()
        self._requests[request.curl] = request
        self._multi.add_handle(request.curl)

    def end(self, request: Request) -> None:
        """Ends it early, and with it its connection; does nothing when it has ended."""
        if self._requests.pop(request.curl, None) is not None:
            self._multi.remove_handle(request.curl)
            request.curl.close()

    def silent(self) -> list[tuple[Request, float]]:
        """For how many seconds each has heard nothing."""
        now = time.monotonic()
        return [(request, now - request.heard) for request in self._requests.values()]

    def forgive(self, seconds: float) -> None:
        """So long nobody listened: that was no silence."""
        for request in self._requests.values():
            request.heard += seconds

    def step(self, seconds: float) -> list[tuple[Request, int, str]]:
        """Waits for something to happen, so many seconds at most, lets curl work on it, and hands on what arrived.
        Returns the requests that have ended, each with curl's number and text of why."""
        now = time.monotonic()
        if self._timer is not None:
            seconds = min(seconds, max(self._timer - now, 0))
        events = self._poll.poll(seconds)
        for descriptor, event in events:
            self._multi.socket_action(descriptor, _bits(event))
        if self._timer is not None and time.monotonic() >= self._timer:
            self._timer = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        for request in list(self._requests.values()):
            request.hand_on()
        return self._ended()

    def close(self) -> None:
        looked_up = all(request.found for request in self._requests.values())
        for request in list(self._requests.values()):
            self.end(request)
        if looked_up:
            self._let_go()
        else:
            # curl waits for the look-up of a name, which takes ten seconds when nobody answers.
            threading.Thread(target=self._let_go, name="fetch-name", daemon=True).start()

    def _let_go(self) -> None:
        self._multi.close()
        self._poll.close()

    def _ended(self) -> list[tuple[Request, int, str]]:
        _, done, failed = self._multi.info_read()
        ended = [(curl, pycurl.E_OK, "") for curl in done] + list(failed)
        found = [(self._requests[curl], code, message) for curl, code, message in ended]
        for request, _, _ in found:
            self.end(request)
        return found

    def _watch(self, what: int, descriptor: int, _multi: object, _data: object) -> None:
        if what == pycurl.POLL_REMOVE:
            if descriptor in self._watched:
                self._watched.discard(descriptor)
                self._poll.unregister(descriptor)
            return
        wanted = (select.EPOLLIN if what & pycurl.POLL_IN else 0) | (select.EPOLLOUT if what & pycurl.POLL_OUT else 0)
        if descriptor in self._watched:
            self._poll.modify(descriptor, wanted)
        else:
            self._watched.add(descriptor)
            self._poll.register(descriptor, wanted)

    def _set_timer(self, milliseconds: int) -> None:
        self._timer = None if milliseconds < 0 else time.monotonic() + milliseconds / 1000


class _Socket(socket.socket):
    """pycurl goes on with a duplicate of the descriptor, and drops this one, which closes without a warning then."""

    def __del__(self) -> None:
        self.close()


def _at_once(rate: int) -> int:
    return min(max(rate // 4, _LEAST_AT_ONCE), _MOST_AT_ONCE) if rate else _MOST_AT_ONCE


def _bits(event: int) -> int:
    bits = 0
    if event & (select.EPOLLIN | select.EPOLLHUP):
        bits |= pycurl.CSELECT_IN
    if event & select.EPOLLOUT:
        bits |= pycurl.CSELECT_OUT
    if event & select.EPOLLERR:
        bits |= pycurl.CSELECT_ERR
    return bits
