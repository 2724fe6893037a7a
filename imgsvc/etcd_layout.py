"""Where things are in etcd. Other programs read these keys; their names and values never change."""

from __future__ import annotations

import hashlib

RECORD = "metadata"
OWNER = "owner"
CARRIER = "transfer"
REPLICAS = "replicas"


class Layout:
    """The keys under one prefix; '/lochness', 'lochness' and '/lochness/' are the same, and '' is none."""

    def __init__(self, prefix: str) -> None:
        self.prefix = "".join(f"/{part}" for part in prefix.split("/") if part)
        self.images = f"{self.prefix}/images/"
        self.sources = f"{self.prefix}/image-sources/"
        self.members = f"{self.prefix}/image-members/"
        # Which directory a member was last started on, by the id in its marker.
        self.homes = f"{self.prefix}/image-homes/"
        # A UUID, made with the first use of the prefix and never again: names this set of records.
        self.records = f"{self.prefix}/image-records"

    def image(self, image_id: str) -> str:
        """What all keys of one image begin with."""
        return f"{self.images}{image_id}/"

    def record(self, image_id: str) -> str:
        """The image's document."""
        return f"{self.images}{image_id}/{RECORD}"

    def owner(self, image_id: str) -> str:
        """The id of the member that is transferring it; on that member's lease."""
        return f"{self.images}{image_id}/{OWNER}"

    def carrier(self, image_id: str) -> str:
        """Who brings the image in, and until when nobody else may end that; made with the owner, on no lease, and gone
        when the transfer is over."""
        return f"{self.images}{image_id}/{CARRIER}"

    def replica(self, image_id: str, member: str) -> str:
        """A note of that member, which holds the bytes."""
        return f"{self.images}{image_id}/{REPLICAS}/{member}"

    def replicas(self, image_id: str) -> str:
        """What all notes of members that hold the bytes begin with."""
        return f"{self.images}{image_id}/{REPLICAS}/"

    def source(self, source: str) -> str:
        """The id of the image that was made from this source."""
        return f"{self.sources}{hashlib.sha256(source.encode(errors='surrogatepass')).hexdigest()}"

    def member(self, member: str) -> str:
        """What a running member says of itself; on its lease."""
        return f"{self.members}{member}"

    def history(self, name: str) -> str:
        """How often it was noted, here and with the images of one directory, how far the records had come."""
        return f"{self.prefix}/image-history/{name}"

    def split(self, key: str) -> tuple[str, str]:
        """Image id, and the rest, of a key below `images`."""
        image_id, _, rest = key.removeprefix(self.images).partition("/")
        return image_id, rest


def is_replica(name: str) -> bool:
    """Whether the rest of a key below an image's is a note of a member that holds the bytes."""
    return name.startswith(f"{REPLICAS}/")


def end_of(start: str) -> str:
    """Where the range of the keys that begin with `start` ends."""
    return start[:-1] + chr(ord(start[-1]) + 1)
