"""What a start finds: etcd that is away or guarded, and a directory that does not belong to the records."""

from __future__ import annotations

import configparser
import contextlib
import subprocess
import time
from pathlib import Path

import pytest

from tests.client import Connection
from tests.etcd_cluster import Certificates, EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import Settings, StartService, on_etcd
from tests.service.helpers import begin_upload

UNIT = Path(__file__).parents[2] / "systemd" / "imgsvc.service"
MIB = 1 << 20
PASSWORD = "s3cret-of-the-tests"
LEFT_ALONE = "images without a record are left alone: the directory was not filled with these records"


def seen_by_the_unit(command: list[str]) -> list[str]:
    """What runs it with the `/proc` that the systemd unit gives it. Skips where that cannot be made."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(UNIT)
    names = {"ProtectProc": "hidepid", "ProcSubset": "subset"}
    options = ",".join(f"{option}={unit['Service'][name]}" for name, option in names.items() if name in unit["Service"])
    mount = f'mount -t proc -o {options} proc /proc && exec "$@"'
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"]
    tried = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no other /proc can be had here: {tried.stderr.strip()}")
    return [*inside, *command]


def test_a_member_in_the_sandbox_of_its_unit(etcd: EtcdCluster, etcd_prefix: str, tmp_path: Path) -> None:
    """Which hides most of /proc."""
    service = Service(tmp_path / "data", **on_etcd(etcd, etcd_prefix))
    service.command = seen_by_the_unit(service.command)
    with service:
        image = service.upload(b"content")
        assert service.download(image["id"]).body == b"content"


def test_etcd_is_away(own_etcd: EtcdCluster, tmp_path: Path) -> None:
    """The service starts, answers at once, says what it waits for, and is ready by itself once etcd is there."""
    own_etcd.kill(0)
    service = Service(tmp_path / "data", **on_etcd(own_etcd, "/test"))
    service.start(wait=False)
    with contextlib.closing(service):
        service.wait_listening()
        assert service.get("/healthz").status == 200
        wait_for(lambda: "etcd at 127.0.0.1" in service.get("/readyz").message, 15, "/readyz names etcd")
        for answer in (service.get("/readyz"), service.get("/images"), service.put(b"content")):
            assert answer.status == 503
        began = time.monotonic()
        assert service.get("/images").status == 503
        assert time.monotonic() - began < 1
        own_etcd.start(0)
        service.wait_ready()
        assert service.upload(b"content")["status"] == "complete"
    service.check_log()


@pytest.mark.release
def test_a_start_without_etcd_can_be_ended(own_etcd: EtcdCluster, tmp_path: Path) -> None:
    """SIGTERM ends it with exit status 0, long before systemd loses its patience."""
    own_etcd.kill(0)
    service = Service(tmp_path / "data", **on_etcd(own_etcd, "/test"))
    service.start(wait=False)
    service.wait_listening()
    began = time.monotonic()
    assert service.terminate() == 0
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("tls", [True, False])
def test_a_guarded_etcd(start_service: StartService, tmp_path: Path, tls: bool) -> None:
    """With a user and a password, and over TLS or not, hosts share records, and the log has no password."""
    certificates = Certificates.make(tmp_path) if tls else None
    with contextlib.closing(EtcdCluster(certificates=certificates, password=PASSWORD)) as cluster:
        settings = on_etcd(cluster, "/test") | {
            "metadata_store_config_user": "root",
            "metadata_store_config_password": PASSWORD,
        }
        if certificates:
            settings["metadata_store_config_cert"] = certificates.client_cert
            settings["metadata_store_config_key"] = certificates.client_key
            settings["metadata_store_config_ca_cert"] = certificates.ca
        one, other = start_service(**settings), start_service(**settings)
        image = one.upload(b"content")
        wait_for(lambda: other.images() == [image], 1, "the other has heard of it")
        assert other.delete(image["id"]).status == 200
        wait_for(lambda: one.stored() == set(), 10, "the bytes are gone")
        for service in (one, other):
            service.close()
            assert PASSWORD not in service.tail()


def test_a_wrong_password(tmp_path: Path) -> None:
    """The service waits, and says that etcd refuses it; it does not say the password."""
    with contextlib.closing(EtcdCluster(password=PASSWORD)) as cluster:
        settings = {"metadata_store_config_user": "root", "metadata_store_config_password": "wr0ng-one"}
        service = Service(tmp_path / "data", **on_etcd(cluster, "/test"), **settings)
        service.start(wait=False)
        with contextlib.closing(service):
            service.wait_listening()
            wait_for(lambda: "refused" in service.get("/readyz").message, 5, "/readyz says that etcd refuses")
            assert service.get("/readyz").status == 503
            assert "wr0ng-one" not in service.get("/readyz").message + service.tail()


def test_the_images_are_not_mounted(start_service: StartService, records: Settings) -> None:
    """A directory that is empty although this host is on record as holding images: the start is refused with a
    sentence that names the directory, nothing is written there, and all is well once the images are back."""
    service = start_service(**records)
    image = service.upload(b"content")
    service.terminate()
    away = service.images_dir.rename(service.data_dir / "away")
    service.images_dir.mkdir()
    for _ in range(2):
        assert f"imgsvc: {service.images_dir} has none of the images" in service.start_refused()
        assert list(service.images_dir.iterdir()) == []
    service.images_dir.rmdir()
    away.rename(service.images_dir)
    service.start()
    assert service.images() == [image]
    assert service.download(image["id"]).body == b"content"


def test_with_other_records(start_service: StartService, records: Settings) -> None:
    """A directory that was filled with other records: neither its images nor its unfinished uploads are touched, and
    the log says so; new images come and go. With the right records all is as before, and what came in under the wrong
    ones stays, too, until somebody moves it away."""
    service = start_service(**records)
    image = service.upload(b"content")
    with Connection(service.port) as connection:
        interrupted = begin_upload(service, connection, 2 * MIB, bytes(MIB))
        service.kill()
    right = service.settings
    service.settings = right | other_records(service, records)
    for _ in range(2):
        service.expect_errors(LEFT_ALONE)
        service.start()
        assert service.images() == []
        new = service.upload(b"new")
        assert service.delete(new["id"]).status == 200
        assert service.stored() == {image["id"]}
        assert service.incoming() == {interrupted}
        assert [line["count"] for line in service.events(LEFT_ALONE)][-1] == 2
        service.terminate()
    service.start()
    strange = service.upload(b"meanwhile")
    service.terminate()
    service.settings = right
    for _ in range(2):
        service.start()
        assert service.image(image["id"]) == image
        assert service.download(image["id"]).body == b"content"
        assert service.image(interrupted)["status"] == "error"
        assert service.incoming() == set()
        assert service.stored() == {image["id"], strange["id"]}
        assert (service.images_dir / strange["id"]).read_bytes() == b"meanwhile"
        service.terminate()
    (service.images_dir / strange["id"]).unlink()
    before = len(service.events(LEFT_ALONE))
    service.start()
    assert len(service.events(LEFT_ALONE)) == before
    assert service.download(image["id"]).body == b"content"


def other_records(service: Service, records: Settings) -> Settings:
    """Settings for an empty set of records of the same kind."""
    if records:
        return {"metadata_store_config_prefix": f"{records['metadata_store_config_prefix']}-other"}
    return {"metadata_store_config_filename": service.data_dir / "other.db"}
