"""Opens a store in a real etcd, with the connection and the lease that it needs."""

from __future__ import annotations

from collections.abc import Sequence

from imgsvc.cluster.membership import LEASE_SECONDS, Membership
from imgsvc.cluster.this_member import ThisMember
from imgsvc.etcd import Etcd
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.etcd import EtcdMetadataStore
from imgsvc.metadata.image import new_id
from imgsvc.metadata.mirror import Mirror
from imgsvc.metadata.store import Member


class OwnedEtcdStore(EtcdMetadataStore):
    """As one `member` has it; its `close` also closes its `membership` and its `etcd`."""

    def __init__(
        self, etcd: Etcd, prefix: str, member: Member, ttl: int = LEASE_SECONDS, *, position: str = ""
    ) -> None:
        self.etcd = etcd
        self.member = member
        self.membership = Membership(etcd, prefix, ThisMember(member, MemoryImageStore()), seat=member.site, ttl=ttl)
        self.mirror = Mirror()
        super().__init__(etcd, prefix, member, self.membership, self.mirror, position=position)

    def close(self) -> None:
        super().close()
        self.membership.close()
        self.etcd.close()


def new_member(name: str = "some") -> Member:
    """On a site of its own."""
    member_id = new_id()
    return Member(id=member_id, site=f"{name}.example:/{member_id}", url=f"http://{name}.example:20000")


def open_store(
    endpoints: Sequence[str], prefix: str, member: Member | None = None, ttl: int = LEASE_SECONDS
) -> OwnedEtcdStore:
    """A store of its own at these endpoints, as another host would have it."""
    return OwnedEtcdStore(Etcd(endpoints), prefix, member or new_member(), ttl)
