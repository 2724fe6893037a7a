"""The real program for tests: started as a child, watched from outside, killed and started again."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.client import Client, Connection
from tests.namespaces import HERE, Place

_READY_SECONDS = 30.0
_EXIT_SECONDS = 30.0
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BAD_LEVELS = ("error", "critical", "fatal", "exception")


def wait_for(true: Callable[[], object], seconds: float, what: str) -> None:
    """Returns as soon as `true()` is; fails after the seconds, saying what did not happen."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def freeze(child: subprocess.Popen[bytes]) -> None:
    """SIGSTOP. Returns when no thread of it runs any more: sending the signal does not wait for that, and a process that
    is on another processor may answer once more."""
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)


@dataclass(frozen=True)
class Census:
    """What a process holds at one moment: files by the name that /proc gives them, sockets by number, threads."""

    files: tuple[str, ...]
    sockets: int
    threads: int


@dataclass(frozen=True)
class Site:
    """Where a service runs, where its client is, and the port; with 0 each start has another one."""

    place: Place = HERE
    seen_from: Place = HERE
    port: int = 0


class Service(Client):
    """`imgsvc serve` as a child process on 127.0.0.1, or at another site, and a client of it.

    `data_dir` holds all its state, images in `data_dir/images`; other settings are given by the name of their
    environment variable, lower case and without the prefix. A context manager that starts it, and in the end stops
    it and fails when the log holds what no service should say: an error, a traceback, or a line that is not JSON.
    """

    def __init__(self, data_dir: Path, site: Site | None = None, /, **settings: object) -> None:
        site = site or Site()
        super().__init__(site.port, site.place.address, site.seen_from)
        self.data_dir = data_dir
        program = [sys.executable, "-m", "imgsvc", "serve", "--port", str(site.port), "--data-dir", str(data_dir)]
        self.place = site.place
        self.command = self.place.command(*program)
        self.frozen = False
        # How often it was frozen or ended, so that a test can tell whether that came in between.
        self.breaks = 0
        self.settings: dict[str, object] = {
            "host": self.place.address,
            "image_store_config_dir": data_dir / "images",
            "fetch_retries": 0,  # a source that fails in a test does so at once
            "shutdown_timeout": 2,  # a test that fails in mid-transfer should not take long to end
            **settings,
        }
        self.log: list[dict[str, Any]] = []
        self._strange: list[str] = []
        self._expected: set[str] = set()
        self._first = self._checked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        atexit.register(self._kill_if_running)
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close()
        atexit.unregister(self._kill_if_running)
        if kind is None:
            self.check_log()

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def runs(self) -> bool:
        return self._process is not None

    @property
    def answers(self) -> bool:
        """Whether it runs, and is not frozen."""
        return self._process is not None and not self.frozen

    @property
    def exited(self) -> bool:
        """Whether it has ended by itself."""
        return self._running().poll() is not None

    @property
    def member(self) -> str:
        """Its id, as it said when it was started."""
        return str(self.events("listening")[-1]["member"])

    @property
    def images_dir(self) -> Path:
        return Path(str(self.settings["image_store_config_dir"]))

    def start(self, *, wait: bool = True) -> None:
        """Starts the program, which is not running, on a port of its choice; unless told otherwise, until it is ready."""
        assert self._process is None
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._first = len(self.log)
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment(),
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
        self._reader.start()
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise

    def start_refused(self) -> str:
        """Starts the program, which must end by itself as one with a wrong setting does; returns what it said."""
        self.start(wait=False)
        status = self.wait_exit()
        said, self._strange = "\n".join(self._strange), []
        assert status == 2, f"exit status {status}:\n{said}\n{self.tail()}"
        return said

    def wait_listening(self) -> None:
        """Until it has said its port."""
        listening: list[dict[str, Any]] = []

        def said() -> bool:
            listening.extend(line for line in self.log[self._first :] if line.get("event") == "listening")
            assert listening or self._running().poll() is None, f"ended at start:\n{self.tail()}"
            return bool(listening)

        wait_for(said, _READY_SECONDS, "the service listens")
        self.port = int(listening[0]["port"])

    def wait_ready(self) -> None:
        self.wait_listening()
        wait_for(lambda: self.get("/readyz").status == 200, _READY_SECONDS, "the service is ready")

    def kill(self) -> None:
        """SIGKILL, and no more of it when this returns; nothing if it does not run."""
        if self._process is not None:
            self.breaks += 1
            self._process.kill()
            self.wait_exit()

    def terminate(self, timeout: float = _EXIT_SECONDS) -> int:
        """SIGTERM; returns the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(timeout)

    def signal(self, number: signal.Signals) -> None:
        self._running().send_signal(number)
        if number == signal.SIGCONT:
            self.frozen = False

    def freeze(self) -> None:
        """Until SIGCONT nothing of it runs, and its connections stay open."""
        freeze(self._running())
        self.frozen = True
        self.breaks += 1

    def cont(self) -> None:
        """Lets it go on, if it is frozen."""
        if self.frozen:
            self.signal(signal.SIGCONT)

    def connect(self, *, receive_buffer: int | None = None, timeout: float = 10.0) -> Connection:
        """A raw connection to it."""
        return Connection(
            self.port,
            address=self.address,
            seen_from=self.seen_from,
            receive_buffer=receive_buffer,
            timeout=timeout,
        )

    def wait_exit(self, timeout: float = _EXIT_SECONDS) -> int:
        """The exit status; fails when the process lives on."""
        process = self._running()
        status = process.wait(timeout)
        if self._reader is not None:
            self._reader.join()
        if process.stdout is not None:
            process.stdout.close()
        self._process = None
        self.frozen = False
        return status

    def close(self) -> None:
        """Ends the process, in an orderly way if it can be had soon."""
        if self._process is None:
            return
        self.cont()
        try:
            status = self.terminate(10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"SIGTERM did not end the service within 10 s:\n{self.tail()}") from None
        assert status == 0, f"exit status {status}:\n{self.tail()}"

    def expect_errors(self, *events: str) -> None:
        """From here to the next check, log lines of level error with one of these events are no failure."""
        self._expected.update(events)

    def check_log(self) -> None:
        """Fails on what was logged since the last check and should not be there."""
        lines, self._checked = self.log[self._checked :], len(self.log)
        bad = [str(line) for line in lines if self._is_bad(line)] + self._strange
        self._strange, self._expected = [], set()
        assert not bad, "the service logged:\n" + "\n".join(bad)

    def forget_log(self) -> None:
        """Checks what was logged, and keeps none of it: a hundred thousand lines are many."""
        self.check_log()
        self.log.clear()
        self._checked = 0

    def events(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The log lines with this event and these fields."""
        wanted = {"event": event, **fields}.items()
        return [line for line in self.log if wanted <= {k: v for k, v in line.items() if _hashable(v)}.items()]

    def tail(self) -> str:
        return "\n".join([*(str(line) for line in self.log[-20:]), *self._strange[-40:]])

    def stored(self) -> set[str]:
        """The names of the committed images on the disk."""
        return {path.name for path in self.images_dir.iterdir() if _ID.fullmatch(path.name)}

    def incoming(self) -> set[str]:
        """The names of what is in the directory for images being written, the store's own probes left out."""
        return {path.name for path in (self.images_dir / ".incoming").iterdir() if not path.name.startswith(".imgsvc")}

    def census(self) -> Census:
        names = list(filter(None, map(_link, Path(f"/proc/{self.pid}/fd").iterdir())))
        files = sorted(name for name in names if name.startswith("/"))
        sockets = sum(name.startswith("socket:") for name in names)
        return Census(tuple(files), sockets, sum(1 for _ in Path(f"/proc/{self.pid}/task").iterdir()))

    def image_files(self) -> list[str]:
        """The open files that are images, deleted ones included."""
        return [name for name in self.census().files if _ID.search(name.removeprefix(str(self.data_dir)))]

    def memory(self, which: str = "VmRSS") -> int:
        """Bytes of resident memory; VmHWM is the highest so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split(f"{which}:")[1].split()[0]) * 1024

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the service does not run"
        return self._process

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMGSVC_")}
        settings = {f"IMGSVC_{name.upper()}": _setting(value) for name, value in self.settings.items()}
        # A warning becomes a line that is not JSON, and so fails the test.
        return inherited | settings | {"PYTHONWARNINGS": "default::ResourceWarning", "PYTHONFAULTHANDLER": "1"}

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                parsed = json.loads(line)
            except ValueError:
                parsed = None
            if isinstance(parsed, dict):
                self.log.append(parsed)
            else:
                self._strange.append(line.decode(errors="replace").rstrip())

    def _is_bad(self, line: dict[str, Any]) -> bool:
        if line.get("event") in self._expected:
            return False
        return line.get("level") in _BAD_LEVELS or "exception" in line or "Traceback" in str(line)

    def _kill_if_running(self) -> None:
        if self._process is not None:
            self._process.kill()


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)


def _hashable(value: object) -> bool:
    return not isinstance(value, (list, dict))


def _link(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except FileNotFoundError:
        return None
