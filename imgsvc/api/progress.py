"""Whether a client that is slow to read reads at all."""

from __future__ import annotations

import socket
import struct

from tornado.iostream import IOStream

# Where `struct tcp_info` (linux/tcp.h) has tcpi_bytes_acked, a 64-bit count. Fields are only ever added behind others.
_BYTES_ACKED = struct.Struct("=120xQ")


def acknowledged(stream: IOStream) -> int:
    """How many bytes the other side has acknowledged on this connection.

    A block that waits to be written says nothing of the bytes before it, of which the kernel may hold megabytes.
    """
    if stream.closed() or not isinstance(stream.socket, socket.socket):
        return 0
    info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
    acked: int = _BYTES_ACKED.unpack(info)[0]
    return acked
