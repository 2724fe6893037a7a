"""Reads one HTTP source with pycurl, and takes nothing for whole that is not."""

from __future__ import annotations

import re
import socket
import string
import time
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import Protocol, cast
from urllib.parse import quote, urljoin

import certifi
import pycurl

from imgsvc import __version__
from imgsvc.errors import FetchFailed, IdleTimeout, ImgsvcError, Incomplete
from imgsvc.metadata.image import UNKNOWN_SIZE
from imgsvc.settings import FetchSettings

_OK = 200
_REDIRECTS = (301, 302, 303, 307, 308)
# Seconds that a source which has sent all it announced has to close, or to show that it sends more.
_GRACE = 1.0
# A write callback that returns anything but the length it was given ends the transfer, as a progress callback does
# that returns anything but 0.
_ABORT = -1
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_LENGTH = re.compile(r"[0-9]{1,18}")


class Sink(Protocol):
    """Where the bytes of a source go. Whatever it raises ends the reading, and comes out of `Source.read`."""

    def begin(self, expected_size: int) -> None:
        """The source answers with a body of `expected_size` bytes, or UNKNOWN_SIZE."""

    def piece(self, data: bytes) -> None: ...

    def tick(self) -> None:
        """Called at least once a second, also while nothing arrives."""


class Source:
    """One reading of one URL; `read` may be called once."""

    def __init__(self, url: str, settings: FetchSettings, sink: Sink) -> None:
        self._url = url
        self._settings = settings
        self._sink = sink
        self._answer = _Answer()
        self._begun = False
        self._received = 0
        self._heard = time.monotonic()
        self._error: Exception | None = None
        self._denied: str | None = None

    def read(self) -> None:
        """Returns when the whole body has gone to the sink.

        Raises FetchFailed when the source cannot be reached, is not allowed or answers with anything but 200 in the
        end, Incomplete when its body is shorter or longer than announced, IdleTimeout when it sends nothing for
        `stall_timeout`, or what the sink raised.
        """
        curl = pycurl.Curl()
        try:
            self._set_up(curl)
            for _ in range(self._settings.max_redirects + 1):
                if self._read_to_the_end(curl):
                    return
            raise FetchFailed(f"the source redirected more than {self._settings.max_redirects} times")
        finally:
            curl.close()

    def _set_up(self, curl: pycurl.Curl) -> None:
        set_option = curl.setopt
        set_option(pycurl.NOSIGNAL, 1)  # curl's signals are not for programs with threads
        set_option(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        set_option(pycurl.PROXY, "")  # a proxy would connect where `_open_socket` cannot look
        set_option(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        set_option(pycurl.CAINFO, certifi.where())
        set_option(pycurl.USERAGENT, f"imgsvc/{__version__}")
        set_option(pycurl.CONNECTTIMEOUT_MS, round(self._settings.connect_timeout * 1000))
        # curl stops reading at the announced length, and so would not see that a source sends more. We count
        # ourselves, and ask the source to close, for that is now the end of a body that is not chunked.
        set_option(pycurl.IGNORE_CONTENT_LENGTH, 1)
        set_option(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        set_option(pycurl.HTTPHEADER, ["Connection: close"])
        set_option(pycurl.HEADERFUNCTION, self._guard(self._header, None))
        set_option(pycurl.WRITEFUNCTION, self._guard(self._write, None))
        set_option(pycurl.NOPROGRESS, 0)
        set_option(pycurl.XFERINFOFUNCTION, self._guard(self._progress, 0))

    def _read_to_the_end(self, curl: pycurl.Curl) -> bool:
        """False when the URL is now another one."""
        curl.setopt(pycurl.URL, self._url.encode())
        try:
            curl.perform()
        except pycurl.error as error:
            if isinstance(self._error, _Redirected):
                self._url = _resolved(self._url, self._error.location)
                self._error = self._denied = None
                return False
            self._explain(error)
        if not self._begun:
            raise FetchFailed("the source closed the connection in the middle of its headers")
        if self._answer.length != UNKNOWN_SIZE and self._received < self._answer.length:
            raise Incomplete(f"the source announced {self._answer.length} bytes and sent only {self._received}")
        return True

    def _guard(self, callback: Callable[..., None], success: int | None) -> Callable[..., int | None]:
        """Remembers the first error, which curl would turn into a bare number, and pycurl print."""

        def guarded(*args: object) -> int | None:
            if self._error is None:
                try:
                    callback(*args)
                except Exception as error:  # noqa: BLE001 - `_explain` raises it
                    self._error = error
                else:
                    return success
            return _ABORT

        return guarded

    def _open_socket(self, _purpose: int, address: tuple[int, int, int, tuple[str, int]]) -> socket.socket | int:
        """Looks at each address that curl is about to connect to, whatever name or spelling led to it."""
        family, kind, protocol, name = address
        ip = ip_address(name[0].partition("%")[0])
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        if ip.is_unspecified:  # where the kernel connects to this host
            ip = ip_address(_LOOPBACK[ip.version])
        if any(ip in network for network in self._settings.deny_networks):
            self._denied = str(ip)
            return pycurl.SOCKET_BAD
        self._heard = time.monotonic()
        return _Socket(family, kind, protocol)

    def _header(self, line: bytes) -> None:
        self._heard = time.monotonic()
        text = line.decode("latin-1").strip()
        if text.startswith("HTTP/"):
            # A number, or curl would have refused it.
            self._answer = _Answer(int(text.split()[1]))
        elif self._begun:
            pass  # a trailer: the body's length was said before
        elif text:
            self._answer.take(text)
        elif self._answer.status >= _OK:
            self._begin()

    def _begin(self) -> None:
        """The headers of an answer are there; those of 100 (Continue) and its like are no answer."""
        answer = self._answer
        if answer.status in _REDIRECTS and answer.location:
            raise _Redirected(answer.location)
        if answer.status != _OK:
            raise FetchFailed(f"the source answered {answer.status}")
        self._begun = True
        self._sink.begin(answer.length)

    def _write(self, data: bytes) -> None:
        self._received += len(data)
        if self._answer.length != UNKNOWN_SIZE and self._received > self._answer.length:
            raise Incomplete(f"the source announced {self._answer.length} bytes and sent more")
        self._sink.piece(data)
        self._heard = time.monotonic()  # not before: a slow disk is not the source's fault

    def _progress(self, *_totals: object) -> None:
        self._sink.tick()
        silent = time.monotonic() - self._heard
        if self._is_whole():
            if silent > _GRACE:
                raise _Whole
        elif silent > self._settings.stall_timeout:
            # curl's own watch averages over five seconds, and so is late.
            raise IdleTimeout(f"the source sent nothing for {self._settings.stall_timeout:g} seconds")

    def _is_whole(self) -> bool:
        return self._begun and self._received == self._answer.length

    def _explain(self, error: pycurl.error) -> None:
        """Raises what curl's error means, unless nothing is missing."""
        if self._error is not None and not isinstance(self._error, _Whole):
            raise self._error from error
        if self._is_whole():
            return  # how the connection ends after the last byte is nobody's concern
        code, message = cast("tuple[int, str]", error.args)
        if code == pycurl.E_COULDNT_CONNECT and self._denied is not None:
            raise FetchFailed(f"the source's address {self._denied} is in fetch.denyNetworks") from error
        raise FetchFailed(f"the source could not be fetched: {message} (curl {code})") from error


def _resolved(url: str, location: str) -> str:
    """Where a redirect from the URL leads. Raises FetchFailed."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchFailed("the source redirected to what is no URL") from error


class _Socket(socket.socket):
    """pycurl goes on with a duplicate of the descriptor, and drops this one, which closes without a warning then."""

    def __del__(self) -> None:
        self.close()


class _Answer:
    """What the headers of one answer say. `length` is that of the body, or UNKNOWN_SIZE."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.length = UNKNOWN_SIZE
        self.location = ""
        self._chunked = False

    def take(self, header: str) -> None:
        """Raises FetchFailed when the length makes no sense."""
        name, _, value = header.partition(":")
        value = value.strip()
        match name.strip().lower():
            case "location":
                # Sources that send bytes beyond ASCII here mean them as they are.
                self.location = quote(value, safe=string.punctuation, encoding="latin-1")
            case "transfer-encoding":
                # It overrides a length (RFC 9112, section 6.3).
                self._chunked = True
                self.length = UNKNOWN_SIZE
            case "content-length" if not self._chunked:
                if not _LENGTH.fullmatch(value) or self.length not in (UNKNOWN_SIZE, int(value)):
                    raise FetchFailed("the source sent a Content-Length that makes no sense")
                self.length = int(value)


class _Redirected(ImgsvcError):
    """Ends the reading of an answer that says where the source is; curl would read its body first."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


class _Whole(ImgsvcError):
    """Ends the reading of a body that is all there."""
