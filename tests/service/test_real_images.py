"""What the service is for: guest images that others made, through to where they are used."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd_cluster import free_port
from tests.harness import wait_for
from tests.service.conftest import MIB, StartService
from tests.zfs import ZfsPool, zfs

ISO = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")
# A ZFS send stream begins with its record type and its magic number.
SEND_STREAM = bytes(8) + bytes.fromhex("accbbaf502000000")


def curl(*arguments: str) -> bytes:
    return subprocess.run(
        ["curl", "--fail", "--silent", "--show-error", *arguments], check=True, capture_output=True
    ).stdout


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    """The URL of an nginx that serves the ISO's directory."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if program is None:
        pytest.skip("nginx is not installed")
    if not ISO.exists():
        pytest.skip(f"there is no {ISO} (Debian's grub-rescue-pc)")
    port = free_port()
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(f"""
        daemon off; pid {tmp_path}/nginx.pid; error_log stderr; worker_processes 1; events {{}}
        http {{
            access_log off; sendfile on;
            client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path}; fastcgi_temp_path {tmp_path};
            uwsgi_temp_path {tmp_path}; scgi_temp_path {tmp_path};
            server {{ listen 127.0.0.1:{port}; root {ISO.parent}; }}
        }}""")
    with subprocess.Popen(
        [program, "-p", str(tmp_path), "-c", str(configuration)], stderr=subprocess.DEVNULL
    ) as server:
        try:
            wait_for(lambda: _listens(port), 5, "nginx listens")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_zfs_file_system(zfs_pool: ZfsPool, start_service: StartService, tmp_path: Path) -> None:
    """A file system, sent, gzipped and uploaded to a service whose images are on ZFS, is received whole elsewhere."""
    guest = zfs_pool.create("guest")
    (guest / "etc").mkdir()
    (guest / "etc/hostname").write_text("guest\n")
    (guest / "disk").write_bytes(os.urandom(12 * MIB))
    zfs("snapshot", f"{zfs_pool.name}/guest@golden")
    stream = zfs("send", f"{zfs_pool.name}/guest@golden")
    assert stream.startswith(SEND_STREAM)
    sent = tmp_path / "guest.zfs.gz"
    sent.write_bytes(gzip.compress(stream, 1))
    service = start_service(image_store_config_dir=zfs_pool.create("images"))
    curl("-T", str(sent), "-H", "X-Image-Type: container", "-H", "X-Image-Comment: golden", f"{service.url}/images")
    (image,) = service.images("?type=container")
    assert image["sha256"] == hashlib.sha256(sent.read_bytes()).hexdigest()
    received = curl(f"{service.url}/images/{image['id']}/download")
    assert received == sent.read_bytes()
    service.close()
    subprocess.run(["zfs", "receive", f"{zfs_pool.name}/copy"], input=gzip.decompress(received), check=True)
    subprocess.run(["diff", "--recursive", guest, zfs_pool.directory / "copy"], check=True)
    for dataset in ("copy", "guest", "images"):
        zfs_pool.destroy(dataset)


def test_an_iso_from_nginx(nginx: str, start_service: StartService) -> None:
    """An ISO that nginx serves is fetched, and downloaded as the same ISO."""
    service = start_service()
    image = service.wait_status(service.fetch(f"{nginx}/{ISO.name}")["id"], "complete", "error")
    assert (image["status"], image["error"]) == ("complete", "")
    assert image["size"] == image["expected_size"] == ISO.stat().st_size
    content = ISO.read_bytes()
    assert curl(f"{service.url}/images/{image['id']}/download") == content
    assert image["sha256"] == hashlib.sha256(content).hexdigest()
    assert content[0x8001:0x8006] == b"CD001"
