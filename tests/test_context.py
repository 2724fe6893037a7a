"""How the parts are put together, where that takes a decision."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from imgsvc.cluster.member_key import MemberKey
from imgsvc.cluster.membership import Membership
from imgsvc.config import load
from imgsvc.context import Context
from imgsvc.errors import Unavailable
from imgsvc.metadata.mirror import Mirror
from imgsvc.stores import reachable
from tests.etcd_cluster import EtcdCluster


@pytest.mark.parametrize(("images", "records"), [("fs", "memory"), ("memory", "sqlite")])
def test_the_data_directory_is_made_only_for_what_is_put_into_it(tmp_path: Path, images: str, records: str) -> None:
    """A default that the type of the other store makes no use of does not count."""
    environ = {
        "IMGSVC_DATA_DIR": str(tmp_path / "data"),
        "IMGSVC_IMAGE_STORE_TYPE": images,
        "IMGSVC_METADATA_STORE_TYPE": records,
    }
    elsewhere = {
        "fs": {"IMGSVC_IMAGE_STORE_CONFIG_DIR": str(tmp_path / "images")},
        "sqlite": {"IMGSVC_METADATA_STORE_CONFIG_FILENAME": str(tmp_path / "imgsvc.db")},
    }
    for given in (elsewhere.get(images, {}) | elsewhere.get(records, {}), {}):
        assert not (tmp_path / "data").exists()
        Context(load(None, {}, environ | given), port=0).close()
    assert (tmp_path / "data").is_dir()


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("images.example", "images.example"),
        ("fd00::1", "[fd00::1]"),
        *((every, socket.gethostname()) for every in ("", "0.0.0.0", "::")),
    ],
)
def test_what_other_hosts_are_told_of_the_address(host: str, shown: str) -> None:
    """It is for a URL, and an address that stands for all of them leads nowhere."""
    assert reachable(host) == shown


@pytest.fixture
def shared(tmp_path: Path, etcd_cluster: EtcdCluster, etcd_prefix: str) -> dict[str, str]:
    """The environment of a member of a cluster."""
    return {
        "IMGSVC_DATA_DIR": str(tmp_path / "data"),
        "IMGSVC_METADATA_STORE_TYPE": "etcd",
        "IMGSVC_METADATA_STORE_CONFIG_MACHINES": ",".join(etcd_cluster.endpoints),
        "IMGSVC_METADATA_STORE_CONFIG_PREFIX": etcd_prefix,
    }


def test_a_member_that_begins_knows_that_it_is_live(shared: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if its key comes after the records have been read, and etcd is slow to tell of it; also when that of an
    earlier run, which was killed, is still there."""
    putting, joining = MemberKey.put, Mirror.join

    def put_late(*args: Any) -> None:
        time.sleep(0.5)
        putting(*args)

    def join_late(*args: Any) -> None:
        time.sleep(0.5)
        joining(*args)

    monkeypatch.setattr(MemberKey, "put", put_late)
    monkeypatch.setattr(Mirror, "join", join_late)
    monkeypatch.setattr(Membership, "_end_lease", lambda _: None)
    for port in (1, 2):
        with closing(Context(load(None, {}, shared), port)) as context:
            context.settle()
            assert [member.url.rsplit(":", 1)[1] for member in context.members()] == [str(port)]


def test_a_member_of_which_etcd_does_not_tell(shared: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not begin, and says why."""
    monkeypatch.setattr(Mirror, "members", lambda _: {})
    with closing(Context(load(None, {}, shared), port=1)) as context:
        with pytest.raises(Unavailable, match="etcd has not told of this member yet"):
            context.settle()
        assert context.not_ready
