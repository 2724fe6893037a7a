"""Programs that the benchmark starts beside the service."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.etcd_cluster import etcd_program
from tests.harness import wait_for

_PACKAGES = {
    "nginx": "nginx-light",
    "wrk": "wrk",
    "curl": "curl",
    "openssl": "openssl",
    "bash": "bash",
    "sync": "coreutils",
    "tee": "coreutils",
    "etcd": "etcd-server",
}
_END_SECONDS = 10.0

_NGINX = """
{user}
worker_processes auto;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    default_type application/octet-stream;
    sendfile on;
    sendfile_max_chunk 0;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def complain_of_missing(programs: Sequence[str]) -> None:
    """Ends the benchmark, saying what to install, unless all of them are there."""
    missing = [program for program in programs if program_path(program) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES.get(program, program) for program in missing}))
        sys.exit(f"bench: not installed: {', '.join(missing)}; on Debian and Ubuntu: apt install {packages}")


def program_path(program: str) -> str | None:
    """Also where Debian puts servers, which need not be on a user's PATH, and what pip brought."""
    if program == "etcd":
        return etcd_program()
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def timed(*command: str | Path) -> tuple[float, str]:
    """Runs a command, which must succeed; its seconds and what it printed."""
    began = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, text=True)
    return time.monotonic() - began, done.stdout


def cpu_seconds(pid: int) -> float:
    """User and system time so far of a process, all its threads, and its living children."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def end(process: subprocess.Popen[str], seconds: float = _END_SECONDS) -> None:
    """Ends a child of ours, in whatever state it is."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def children(*commands: Sequence[str | Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """These commands, all at once; whatever still runs is ended at the end."""
    running: list[subprocess.Popen[str]] = []
    try:
        running.extend(
            # A session of its own: Ctrl-C is for us alone, and we end it.
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            for command in commands
        )
        yield running
    finally:
        for child in running:
            with suppress(ProcessLookupError):
                child.terminate()
        for child in running:
            end(child)


@contextmanager
def helper(module: str, *arguments: object) -> Iterator[str]:
    """A server of ours in a process of its own, which prints its URL when it listens."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)]
    with children(command) as (process,):
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http"), f"{module} did not start"
        yield url


def asked(module: str, *arguments: object) -> list[str | Path]:
    """The command of a client of ours, which prints JSON in the end."""
    return [sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)]


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What such a client printed, once it has ended."""
    assert process.stdout is not None
    text = process.stdout.read()
    assert process.wait() == 0, process.args
    return dict(json.loads(text))


class Nginx:
    """nginx with a worker for each core, serving the files of `root`."""

    def __init__(self, directory: Path, root: Path) -> None:
        directory.mkdir()
        port = _free_port()
        # Workers of a master that runs as root become nobody, who may not look into our directory.
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        config = directory / "nginx.conf"
        config.write_text(_NGINX.format(user=user, directory=directory, root=root, port=port))
        self.url = f"http://127.0.0.1:{port}"
        command = [str(program_path("nginx")), "-e", f"{directory}/error.log", "-p", str(directory), "-c", str(config)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, start_new_session=True)
        try:
            wait_for(lambda: self._listens(port), _END_SECONDS, "nginx listens")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        end(self._process)

    def _listens(self, port: int) -> bool:
        assert self._process.poll() is None, "nginx ended at start"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
