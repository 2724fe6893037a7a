"""What is on the disks of a cluster's members, whether they run or not; and what happens to disks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tests.cluster_of_three import Member

_MIB = 1 << 20
_FILLER = "filler"


class Disks:
    """Looks at files, and remembers the digests of those that have not changed since."""

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, int, int], str] = {}
        # What was made to rot: names of members, images, and the files' numbers.
        self._rotten: set[tuple[str, str, int]] = set()

    def digest(self, member: Member, image_id: str) -> str:
        """Of the image's file; empty when there is none."""
        path = member.images_dir / image_id
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                key = path, status.st_ino, status.st_mtime_ns
                if key not in self._digests:
                    self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
                return self._digests[key]
        except FileNotFoundError:
            return ""

    def rot(self, member: Member, image_id: str, offset: int) -> None:
        """Changes a bit of its file, where it stands."""
        with (member.images_dir / image_id).open("r+b", buffering=0) as file:
            status = os.fstat(file.fileno())
            self._rotten.add((member.name, image_id, status.st_ino))
            offset %= status.st_size
            byte = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), offset)

    def is_rotten(self, member: Member, image_id: str) -> bool:
        """Whether the file is one of which we changed a bit."""
        try:
            number = (member.images_dir / image_id).stat().st_ino
        except FileNotFoundError:
            return False
        return (member.name, image_id, number) in self._rotten

    def fill(self, member: Member) -> None:
        """Another program takes every last byte."""
        with (member.data_dir / _FILLER).open("wb", buffering=0) as file:
            for size in (_MIB, 4096):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self, member: Member) -> None:
        (member.data_dir / _FILLER).unlink(missing_ok=True)
