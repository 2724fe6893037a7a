"""Stores images from several threads until it is killed, and says on stdout what has become durable.

A line "claimed {id}" follows a claim, "committed {id}" a commit. `python -m tests.images.crash_writer DIRECTORY`
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import closing
from pathlib import Path

from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.metadata.image import new_id
from tests.images.helpers import content_of, put, size_of

THREADS = 3
BLOCK = 64 * 1024


def say(line: str) -> None:
    # One system call for a line: a kill does not cut it, and threads do not mix theirs.
    os.write(1, f"{line}\n".encode())


def write_images(store: FilesystemImageStore) -> None:
    while True:
        image_id = new_id()
        content = content_of(image_id, size_of(image_id))
        store.claim(image_id)
        say(f"claimed {image_id}")
        put(store, image_id, content, BLOCK)
        say(f"committed {image_id}")


def main() -> None:
    with closing(FilesystemImageStore(Path(sys.argv[1]))) as store:
        store.mark("the records of a crash test")
        threads = [threading.Thread(target=write_images, args=(store,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
