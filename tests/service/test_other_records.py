"""A directory meets records that it was not filled with: by a typo, or because etcd was set up anew."""

from __future__ import annotations

import pytest

from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.service.conftest import StartService, on_etcd

RESTORED = "etcd was restored from a backup: what was recorded since is lost"
LEFT_ALONE = "images without a record are left alone: the directory was not filled with these records"


@pytest.mark.parametrize("running", [False, True])
def test_etcd_is_set_up_anew(start_service: StartService, own_etcd: EtcdCluster, running: bool) -> None:
    """With the same command line and no data: no image goes, neither at the next start nor under a running service."""
    service = start_service(**on_etcd(own_etcd, "/anew"))
    kept = service.upload(b"precious")["id"]
    if not running:
        service.terminate()
    own_etcd.kill(0)
    own_etcd.wipe(0)
    own_etcd.start(0)
    own_etcd.wait_healthy()
    service.expect_errors(LEFT_ALONE)
    if running:
        service.wait_ready()
        service.upload(b"more")
        service.terminate()
    service.start()
    wait_for(lambda: service.events(LEFT_ALONE), 5, "the service says that it leaves the images alone")
    assert kept in service.stored()
    assert service.get(f"/images/{kept}").status == 404


@pytest.mark.parametrize("running", [False, True])
def test_etcd_is_restored_from_a_backup(start_service: StartService, own_etcd: EtcdCluster, running: bool) -> None:
    """It is the etcd that it was, and lacks what came since: that was not deleted, and its bytes stay, neither under a
    running service nor at the next start are they taken for orphans. What the backup has is served as before."""
    service = start_service(**on_etcd(own_etcd, "/restored"))
    before = service.upload(b"before")["id"]
    own_etcd.kill(0)
    saved = own_etcd.save(0)
    own_etcd.start(0)
    own_etcd.wait_healthy()
    service.wait_ready()
    since = service.upload(b"since the backup")["id"]
    if not running:
        service.terminate()
    own_etcd.kill(0)
    own_etcd.put_back(0, saved)
    own_etcd.start(0)
    own_etcd.wait_healthy()
    service.expect_errors(LEFT_ALONE, RESTORED)
    if not running:
        service.start()
    wait_for(lambda: service.events(LEFT_ALONE), 15, "the service says that it leaves the images alone")
    service.wait_ready()
    assert service.stored() == {before, since}
    assert service.download(before).body == b"before"
    assert service.get(f"/images/{since}").status == 404
    service.terminate()
    service.start()
    assert service.stored() == {before, since}


def test_etcd_is_restored_and_goes_on(start_service: StartService, own_etcd: EtcdCluster) -> None:
    """The same when it has come further than it was before this member looks at it again, as it has when others write,
    or when it was restored with a revision that is higher than any."""
    service = start_service(**on_etcd(own_etcd, "/restored"))
    own_etcd.kill(0)
    saved = own_etcd.save(0)
    own_etcd.start(0)
    own_etcd.wait_healthy()
    service.wait_ready()
    since = service.upload(b"since the backup")["id"]
    service.terminate()
    own_etcd.kill(0)
    own_etcd.put_back(0, saved)
    own_etcd.start(0)
    own_etcd.wait_healthy()
    for _ in range(50):
        own_etcd.call("/v3/kv/put", {"key": "AA=="})
    service.expect_errors(LEFT_ALONE, RESTORED)
    service.start()
    wait_for(lambda: service.events(LEFT_ALONE), 15, "the service says that it leaves the images alone")
    assert service.stored() == {since}


def test_the_directory_of_another_service(start_service: StartService) -> None:
    """One typo in the settings does not turn every record to `error`: the start is refused, and names the
    directory."""
    service, other = start_service(), start_service()
    image = service.upload(b"content")
    other.upload(b"other content")
    service.terminate()
    other.terminate()
    right = service.settings["image_store_config_dir"]
    service.settings["image_store_config_dir"] = other.images_dir
    assert f"{other.images_dir} has none of the images" in service.start_refused()
    service.settings["image_store_config_dir"] = right
    service.start()
    assert service.image(image["id"]) == image
    assert service.download(image["id"]).body == b"content"
