"""Resumable uploads by clients that others wrote."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pytest
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError

from tests.etcd_cluster import free_port
from tests.harness import Service, wait_for
from tests.service.conftest import StartService
from tests.tus import Tus

MIB = 1 << 20
CONTENT = os.urandom(8 * MIB + 17)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
JS_VERSION = "4.3.1"
# Uploads a file in chunks, and stops after so many bytes unless that is 0; the next run goes on with what it finds in
# its store of earlier uploads. Prints the upload's URL and how many bytes this run has sent.
JS = """
const fs = require('fs');
const tus = require('tus-js-client');
const { FileUrlStorage } = require('tus-js-client');
const [endpoint, file, store, stopAfter] = process.argv.slice(2);
let from = -1;
const upload = new tus.Upload(fs.createReadStream(file), {
  endpoint,
  chunkSize: 1 << 20,
  uploadSize: fs.statSync(file).size,
  fingerprint: () => Promise.resolve('the file'),
  urlStorage: new FileUrlStorage(store),
  storeFingerprintForResuming: true,
  retryDelays: [100, 200, 500, 1000, 2000],
  metadata: { type: 'kvm', comment: 'from JavaScript', filename: 'guest.img' },
  onChunkComplete: (size, accepted) => {
    if (from < 0) from = accepted - size;
    if (+stopAfter && accepted >= +stopAfter) { done(); }
  },
  onSuccess: done,
  onError: (error) => { console.error(String(error)); process.exit(1); },
});
function done() { console.log(JSON.stringify({ url: upload.url, from })); process.exit(0); }
upload.findPreviousUploads().then((previous) => {
  if (previous.length) upload.resumeFromPreviousUpload(previous[0]);
  upload.start();
});
"""


@pytest.fixture
def guest() -> BinaryIO:
    """What is to be uploaded; tuspy does not close a file that it opens itself."""
    return BytesIO(CONTENT)


@pytest.fixture
def service(start_service: StartService) -> Service:
    return start_service()


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the program above."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node, or no npm, here")
    directory = tmp_path_factory.mktemp("javascript")
    (directory / "upload.js").write_text(JS)
    install = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--prefer-offline",
        f"tus-js-client@{JS_VERSION}",
    ]
    try:
        done = subprocess.run(install, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if done.returncode != 0:
        pytest.skip(f"tus-js-client cannot be installed: {done.stderr.strip()[-300:]}")
    return ["node", str(directory / "upload.js")]


def assert_whole(service: Service, url: str, comment: str) -> None:
    image = service.image(url.rsplit("/", 1)[1])
    assert (image["status"], image["sha256"], image["comment"]) == ("complete", DIGEST, comment)
    assert service.download(image["id"]).body == CONTENT
    assert len(service.images()) == 1


@pytest.mark.parametrize("slash", ["", "/"])
def test_tuspy(service: Service, guest: BinaryIO, slash: str) -> None:
    """In chunks with their checksums, and the digest of it all."""
    metadata = {"type": "kvm", "comment": "from Python", "sha256": DIGEST, "filename": "guest.img"}
    client = TusClient(f"{service.url}/uploads{slash}")
    uploader = client.uploader(file_stream=guest, chunk_size=MIB, metadata=metadata, upload_checksum=True)
    uploader.upload()
    assert_whole(service, str(uploader.url), "from Python")


def test_tuspy_when_the_service_is_killed(service: Service, guest: BinaryIO) -> None:
    """In mid-upload: it goes on by itself once the service is back, which has another port here."""
    client = TusClient(f"{service.url}/uploads")
    metadata = {"type": "container", "comment": "killed"}
    uploader = client.uploader(file_stream=guest, chunk_size=MIB, metadata=metadata)
    uploader.upload(stop_at=3 * MIB)
    assert uploader.offset == 3 * MIB
    service.kill()
    with pytest.raises(TusCommunicationError):
        uploader.upload(stop_at=4 * MIB)
    service.start()
    path = f"/uploads/{str(uploader.url).rsplit('/', 1)[1]}"
    assert Tus(service).offset(path) == 3 * MIB
    resumed = TusClient(f"{service.url}/uploads").uploader(file_stream=guest, url=service.url + path, chunk_size=MIB)
    assert resumed.offset == 3 * MIB
    resumed.upload()
    assert_whole(service, str(resumed.url), "killed")


def test_tuspy_through_a_kill_and_a_start(start_service: StartService, guest: BinaryIO) -> None:
    """While it is sending: it tries again, asks for the offset and goes on, and never knows what happened."""
    service = start_service()
    service.command += ["--port", str(free_port())]
    service.terminate()
    service.start()
    client = TusClient(f"{service.url}/uploads")
    uploader = client.uploader(
        file_stream=guest,
        chunk_size=MIB // 2,
        metadata={"type": "kvm", "comment": "through"},
        retries=100,
        retry_delay=0.1,
    )
    sending = threading.Thread(target=uploader.upload)
    sending.start()
    wait_for(lambda: (uploader.offset or 0) >= MIB, 10, "it is sending")
    service.kill()
    time.sleep(0.3)
    service.start()
    sending.join(30)
    assert not sending.is_alive()
    assert_whole(service, str(uploader.url), "through")


def test_tus_js_client(javascript: list[str], service: Service, tmp_path: Path) -> None:
    """In chunks, stopped in the middle; the next run finds the upload, asks how far it is, and goes on."""
    guest = tmp_path / "guest.img"
    guest.write_bytes(CONTENT)
    endpoint = f"{service.url}/uploads"

    def run(stop_after: int) -> dict[str, object]:
        command = [*javascript, endpoint, str(guest), str(tmp_path / "store"), str(stop_after)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    stopped = run(3 * MIB)
    image = service.image(str(stopped["url"]).rsplit("/", 1)[1])
    assert image["status"] == "downloading"
    resumed = run(0)
    assert resumed["url"] == stopped["url"]
    assert int(str(resumed["from"])) >= 3 * MIB
    assert_whole(service, str(resumed["url"]), "from JavaScript")
