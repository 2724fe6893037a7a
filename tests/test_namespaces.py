"""The networks that tests make: hosts in them reach each other until they are cut off, and do not notice."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.namespaces import Network, Place


@contextmanager
def connected(one: Place, other: Place) -> Iterator[tuple[socket.socket, socket.socket]]:
    with one.entered():
        listener = socket.create_server((one.address, 1000))
    with closing(listener), other.entered(), closing(socket.create_connection((one.address, 1000), 2)) as client:
        server, _ = listener.accept()
        with closing(server):
            server.settimeout(0.3)
            yield server, client


def test_a_cut(network: Network) -> None:
    """What is sent meanwhile arrives when it is over; a third host is not concerned."""
    one, other, third = network.host(), network.host(), network.host()
    with connected(one, other) as (server, client):
        network.cut(one, other)
        client.sendall(b"x")
        with pytest.raises(TimeoutError):
            server.recv(1)
        with other.entered(), pytest.raises(TimeoutError):
            socket.create_connection((one.address, 1000), 0.3)
        with third.entered(), closing(socket.create_connection((one.address, 1000), 2)):
            pass
        network.heal()
        server.settimeout(10)
        assert server.recv(1) == b"x"


def test_nobody_else_is_reached(network: Network) -> None:
    """Neither this machine's network from there, nor the hosts from here."""
    before = Path("/proc/net/dev").read_text().count(":")
    host = network.host()
    assert Path("/proc/net/dev").read_text().count(":") == before
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, host.entered(), pytest.raises(OSError):
        socket.create_connection(listener.getsockname(), 1)
