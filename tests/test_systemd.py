"""What systemd would receive, on a real datagram socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from imgsvc import systemd

Listen = Callable[[str], socket.socket]


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    """Binds a socket as systemd does, and puts its name where systemd puts it; "@" begins an abstract name."""
    sockets: list[socket.socket] = []

    def listen(name: str) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sockets.append(channel)
        channel.settimeout(5)
        channel.bind(name.replace("@", "\0", 1))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        return channel

    yield listen
    for channel in sockets:
        channel.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_gets_each_state_as_one_message(listen: Listen, tmp_path: Path, abstract: bool) -> None:
    channel = listen(f"@imgsvc-test-{os.getpid()}" if abstract else str(tmp_path / "notify"))

    systemd.notify("READY=1\nSTATUS=listening")
    systemd.notify("WATCHDOG=1")

    assert channel.recv(100) == b"READY=1\nSTATUS=listening"
    assert channel.recv(100) == b"WATCHDOG=1"


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)

    with capture_logs() as logs:
        systemd.notify("READY=1")

    assert not logs


@pytest.mark.parametrize("address", ["/gone/notify", "relative", "/" + 200 * "x", "@", "vsock:2:1"])
def test_a_socket_that_cannot_be_reached_is_logged_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)

    with capture_logs() as logs:
        systemd.notify("READY=1")

    assert [line["event"] for line in logs] == ["systemd was not told"]


def test_a_systemd_that_does_not_read_cannot_hold_the_service(
    listen: Listen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "_TIMEOUT", 0.05)
    listen(str(tmp_path / "notify"))
    start = time.monotonic()

    for _ in range(int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 3):
        systemd.notify("WATCHDOG=1")

    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("usec", "beyond", "interval"),
    [
        ("30000000", None, 15.0),
        ("30000000", 0, 15.0),
        ("30000000", 1, None),
        ("0", None, None),
        ("soon", None, None),
        ("-1", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog_is_told_twice_in_the_time_that_it_waits(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, beyond: int | None, interval: float | None
) -> None:
    """And only by the process that systemd watches: one whose number is that far beyond ours."""
    pid = None if beyond is None else os.getpid() + beyond
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))

    assert systemd.watchdog_interval() == interval
