"""Networks of their own for tests: hosts with an address each, in Linux network namespaces, that can be cut off from
each other.

The machine's own network is not touched. A namespace lives as long as this process has it open or a program runs in it:
nothing is left, however the tests end.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import pytest

_CLONE_NEWNET = 0x40000000
# Not an address on any machine: packets to it are sent, and nobody takes them.
_NOBODY = "02:00:00:00:00:00"
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Place:
    """Where programs run and sockets are made: this machine, or a host in a `Network`."""

    address: str = "127.0.0.1"
    # The path of a network namespace; empty for the machine's own.
    namespace: str = ""

    def command(self, *arguments: str) -> list[str]:
        """What runs the program in this place. It has the process id of what is started."""
        return ["nsenter", f"--net={self.namespace}", *arguments] if self.namespace else [*arguments]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The sockets that this thread makes meanwhile are of this place, and stay so."""
        if not self.namespace:
            yield
            return
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(self.namespace, os.O_RDONLY)
            try:
                _enter(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)


HERE = Place()


class Network:
    """Hosts on one wire, whose addresses begin with `net`. A context manager; programs in it must have ended when it
    does."""

    def __init__(self, net: str = "10.77.0") -> None:
        self._net = net
        self._open: list[int] = []
        self._cuts: set[tuple[Place, Place]] = set()
        self._slow: set[Place] = set()
        try:
            self._wire = self._new("")
            _ip(self._wire, "link add name wire type bridge", "link set wire up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def host(self) -> Place:
        """A new one, which reaches all others."""
        number = len(self._open)
        place = self._new(f"{self._net}.{number}")
        _ip(
            self._wire,
            f"link add name port{number} type veth peer name eth0 netns {place.namespace}",
            f"link set port{number} master wire up",
        )
        _ip(place, "link set lo up", f"addr add {place.address}/24 dev eth0", "link set eth0 up")
        return place

    def cut(self, one: Place, other: Place) -> None:
        """From now on nothing that either sends reaches the other, and nobody is told. May be repeated."""
        for sender, receiver in ((one, other), (other, one)):
            if (sender, receiver) not in self._cuts:
                self._cuts.add((sender, receiver))
                _ip(sender, f"neigh replace {receiver.address} lladdr {_NOBODY} nud permanent dev eth0")

    def join(self, one: Place, other: Place) -> None:
        """Undoes `cut`; may be repeated."""
        for sender, receiver in ((one, other), (other, one)):
            if (sender, receiver) in self._cuts:
                self._cuts.remove((sender, receiver))
                _ip(sender, f"neigh del {receiver.address} dev eth0")

    def slow(self, place: Place, bytes_per_second: int) -> None:
        """From now on what the host sends takes this long."""
        self._slow.add(place)
        rate = f"rate {bytes_per_second * 8}bit burst 64kb latency 200ms"
        _run(place.command("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *rate.split()))

    def reaches(self, one: Place, other: Place) -> bool:
        return (one, other) not in self._cuts

    def heal(self) -> None:
        """Undoes every `cut`, and all that is slow."""
        for one, other in list(self._cuts):
            self.join(one, other)
        while self._slow:
            _run(self._slow.pop().command("tc", "qdisc", "del", "dev", "eth0", "root"))

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def _new(self, address: str) -> Place:
        # In a thread of its own, which then ends: this one stays where it is.
        with ThreadPoolExecutor(1) as thread:
            self._open.append(thread.submit(_unshare).result())
        return Place(address, f"/proc/{os.getpid()}/fd/{self._open[-1]}")


@functools.cache
def why_no_namespaces() -> str:
    """Empty where a `Network` can be made."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    missing = [program for program in ("ip", "nsenter", "tc") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    try:
        with Network() as network:
            network.cut(network.host(), network.host())
            network.slow(network.host(), 1_000_000)
    except (OSError, AssertionError) as error:
        return f"no network namespaces can be made here: {error}"
    return ""


@pytest.fixture
def network() -> Iterator[Network]:
    """Skips, with the reason, where there can be none."""
    reason = why_no_namespaces()
    if reason:
        pytest.skip(reason)
    with Network() as network:
        yield network


def _unshare() -> int:
    """A new network namespace, in which this thread is from now on."""
    if _LIBC.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _ip(place: Place, *lines: str) -> None:
    _run(place.command("ip", "-batch", "-"), "\n".join(lines))


def _run(command: list[str], said: str = "") -> None:
    done = subprocess.run(command, input=said, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{command}: {said}: {done.stderr.strip()}"
