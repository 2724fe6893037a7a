"""A program for a test to kill: works on an SQLite metadata file, and says on stdout what is done once it is.

Each image is created, then completed, and every third is deleted again.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.sqlite import SqliteMetadataStore
from imgsvc.metadata.store import Member


def acknowledge(state: str, image_id: str) -> None:
    sys.stdout.write(f"{state} {image_id}\n")
    sys.stdout.flush()


def main(filename: Path) -> None:
    store = SqliteMetadataStore(filename, Member(id=new_id(), site="here", url="http://here"))
    for number in itertools.count():
        image_id = new_id()
        image = store.create(Image(id=image_id, type=ImageType.KVM, source=f"http://source.example/{image_id}"))
        acknowledge("pending", image_id)
        store.update(image.completed(number, "ab" * 32))
        acknowledge("complete", image_id)
        if number % 3 == 2:
            store.delete(image_id)
            acknowledge("deleted", image_id)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
