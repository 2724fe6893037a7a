"""Many bytes from an image into a connection, past the event loop and this process's memory."""

from __future__ import annotations

import asyncio
import select
import socket
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from tornado.iostream import IOStream

from imgsvc.images.store import ImageReader

# Seconds after which a thread is free for another download, although the client would take more.
_TURN = 0.05
# Milliseconds in which a client that takes nothing may go on: fast ones need no detour by the event loop, and slow ones
# keep no thread.
_MOMENT = 2
# Bytes in one call: the reader is not to be closed meanwhile, and the disk may be slow.
_PIECE = 1 << 20


class Outlet:
    """The bytes of an image from `offset` to `end`, sent by one thread at a time while the connection's stream has
    nothing to write. A context manager.

    `sent` counts the bytes. It has a descriptor of its own, for that of the stream may be closed, and its number given
    to another connection, while a thread is sending.
    """

    def __init__(self, stream: IOStream, reader: ImageReader, offset: int, end: int) -> None:
        assert isinstance(stream.socket, socket.socket)  # noqa: S101 - anything else is a mistake of ours
        self._socket = stream.socket.dup()
        self._loop = asyncio.get_running_loop()
        self._reader = reader
        self._offset = offset
        self._end = end
        self.sent = 0

    @property
    def position(self) -> int:
        """The next byte to be sent."""
        return self._offset + self.sent

    @property
    def done(self) -> bool:
        return self.position == self._end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()

    def send(self) -> None:
        """In a thread: sends until the client takes no more, nothing more has arrived, or the time is up.

        Raises OSError when the client has left, and what the reader raises.
        """
        writable = select.poll()
        writable.register(self._socket, select.POLLOUT)
        until = time.monotonic() + _TURN
        while not self.done and time.monotonic() < until:
            offset = self.position
            length = min(self._end - offset, self._reader.arrived(offset), _PIECE)
            if length == 0:
                return
            count = self._reader.send(self._socket.fileno(), offset, length)
            if count == 0 and not writable.poll(_MOMENT):
                return
            self.sent += count

    def writable(self) -> asyncio.Future[None]:
        """Done when the client takes more, or has left."""
        ready = self._loop.create_future()
        self._loop.add_writer(self._socket.fileno(), self._end_wait, ready)
        return ready

    def end(self) -> None:
        """Ends the connection, and so whatever goes on or waits here. It would live on with this descriptor."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _end_wait(self, ready: asyncio.Future[None]) -> None:
        self._loop.remove_writer(self._socket.fileno())
        if not ready.done():
            ready.set_result(None)
