"""Reads one HTTP source with pycurl, and takes nothing for whole that is not."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import Protocol, cast

import certifi
import pycurl

from imgsvc import __version__
from imgsvc.errors import FetchFailed, ImgsvcError, Incomplete
from imgsvc.metadata.image import UNKNOWN_SIZE
from imgsvc.settings import FetchSettings

HTTP_OK = 200
# How long a source that has sent all it announced may take to close, or to show that it sends more.
_GRACE = 1.0
_LENGTH = re.compile(r"[0-9]{1,18}")
# A write callback that returns anything but the length it was given ends the transfer, as a progress callback does
# that returns anything but 0.
_ABORT = -1


class Sink(Protocol):
    """Where the bytes of a source go. Whatever it raises ends the reading, and comes out of `read`."""

    def begin(self, expected_size: int) -> None:
        """The source has answered with a body of `expected_size` bytes, or UNKNOWN_SIZE."""

    def piece(self, data: bytes) -> None: ...

    def tick(self) -> None:
        """Called at least once a second, also while nothing arrives."""


class Source:
    """One reading of one URL; `read` may be called once."""

    def __init__(self, url: str, settings: FetchSettings, sink: Sink) -> None:
        self._curl = pycurl.Curl()
        self._url = url
        self._settings = settings
        self._sink = sink
        self._error: Exception | None = None
        self._status = 0
        self._denied: str | None = None
        self._chunked = False
        self._announced = UNKNOWN_SIZE
        self._begun = False
        self._received = 0
        self._whole_since: float | None = None

    def read(self) -> None:
        """Returns when the whole body has gone to the sink.

        Raises FetchFailed when the source cannot be reached, is not allowed or answers with anything but 200,
        Incomplete when its body is shorter or longer than announced, or what the sink raised.
        """
        curl = self._curl
        try:
            self._set_up(curl)
            try:
                curl.perform()
            except pycurl.error as error:
                self._explain(error)
            self._check_whole()
        finally:
            curl.close()

    def _set_up(self, curl: pycurl.Curl) -> None:
        settings = self._settings
        set_option = curl.setopt
        set_option(pycurl.URL, self._url.encode())
        set_option(pycurl.NOSIGNAL, 1)  # curl's signals are not for programs with threads
        set_option(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        set_option(pycurl.REDIR_PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        set_option(pycurl.FOLLOWLOCATION, 1)
        set_option(pycurl.MAXREDIRS, settings.max_redirects)
        set_option(pycurl.PROXY, "")  # a proxy would connect where `_open_socket` cannot look
        set_option(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        set_option(pycurl.CAINFO, certifi.where())
        set_option(pycurl.USERAGENT, f"imgsvc/{__version__}")
        set_option(pycurl.CONNECTTIMEOUT_MS, round(settings.connect_timeout * 1000))
        set_option(pycurl.LOW_SPEED_LIMIT, 1)
        set_option(pycurl.LOW_SPEED_TIME, max(1, round(settings.stall_timeout)))
        # curl stops reading at the announced length, and so would not see that a source sends more. We count
        # ourselves, and ask the source to close, for that is now the end of a body that is not chunked.
        set_option(pycurl.IGNORE_CONTENT_LENGTH, 1)
        set_option(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        set_option(pycurl.HTTPHEADER, ["Connection: close"])
        set_option(pycurl.HEADERFUNCTION, self._guard(self._header, None))
        set_option(pycurl.WRITEFUNCTION, self._guard(self._write, None))
        set_option(pycurl.NOPROGRESS, 0)
        set_option(pycurl.XFERINFOFUNCTION, self._guard(self._progress, 0))

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
        """Looks at each address that curl is about to connect to, redirects and every spelling of it included."""
        family, kind, protocol, name = address
        ip = ip_address(name[0].partition("%")[0])
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        if any(ip in network for network in self._settings.deny_networks):
            self._denied = str(ip)
            return pycurl.SOCKET_BAD
        return socket.socket(family, kind, protocol)

    def _header(self, line: bytes) -> None:
        name, _, value = line.decode("latin-1").partition(":")
        name, value = name.strip().lower(), value.strip()
        if name.startswith("http/"):
            self._status = int(name.split()[1])  # which is a number, or curl would have refused it
            self._chunked = False
            self._announced = UNKNOWN_SIZE
        elif self._begun:
            return  # a trailer says nothing about the length
        elif name == "transfer-encoding":
            self._chunked = True
        elif name == "content-length":
            if not _LENGTH.fullmatch(value) or self._announced not in (UNKNOWN_SIZE, int(value)):
                raise FetchFailed("the source sent a Content-Length that makes no sense")
            self._announced = int(value)

    def _begin(self) -> None:
        if self._begun:
            return
        if self._status != HTTP_OK:
            raise FetchFailed(f"the source answered {self._status}")
        if self._chunked:
            self._announced = UNKNOWN_SIZE  # RFC 9112, section 6.3: chunked overrides a length
        self._begun = True
        self._sink.begin(self._announced)

    def _write(self, data: bytes) -> None:
        self._begin()
        self._received += len(data)
        if self._announced != UNKNOWN_SIZE and self._received > self._announced:
            raise Incomplete(f"the source announced {self._announced} bytes and sent more")
        self._sink.piece(data)

    def _progress(self, *_totals: object) -> None:
        self._sink.tick()
        if self._begun and self._received == self._announced:
            now = time.monotonic()
            self._whole_since = self._whole_since or now
            if now - self._whole_since > _GRACE:
                raise _Whole

    def _explain(self, error: pycurl.error) -> None:
        if isinstance(self._error, _Whole):
            return
        if self._error is not None:
            raise self._error from error
        if self._begun and self._received == self._announced:
            return  # how the connection ends after the last byte is nobody's concern
        code, message = cast("tuple[int, str]", error.args)
        if code == pycurl.E_COULDNT_CONNECT and self._denied is not None:
            raise FetchFailed(f"the source's address {self._denied} is in fetch.denyNetworks") from error
        raise FetchFailed(f"the source could not be fetched: {message} (curl {code})") from error

    def _check_whole(self) -> None:
        self._begin()  # an empty body does not call `_write`
        if self._announced != UNKNOWN_SIZE and self._received < self._announced:
            raise Incomplete(f"the source announced {self._announced} bytes and sent only {self._received}")


class _Whole(ImgsvcError):
    """Ends the reading of a body that is there; not an error."""
