"""A client that uploads small images at a steady rate, over several connections. Run it as a program: putter URL COUNT
RATE. It prints, by the id of each image, when its request was due and when its answer was there, as the system's
monotonic clock has it.

A request that goes out late, because all connections were waiting, counts from when it was due.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

_CONNECTIONS = 16
_BYTES = b"the bytes of a small image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("count", type=int)
    parser.add_argument("rate", type=float)
    options = parser.parse_args()
    began = time.monotonic()
    due = iter([began + number / options.rate for number in range(options.count)])
    with ThreadPoolExecutor(_CONNECTIONS) as clients:
        puts = list(clients.map(lambda _: dict(_puts(options.url, due)), range(_CONNECTIONS)))
    json.dump(dict(itertools.chain.from_iterable(each.items() for each in puts)), sys.stdout)


def _puts(url: str, due: Iterator[float]) -> Iterator[tuple[str, dict[str, float]]]:
    """One connection's; each takes the next that is due, as soon as it is free."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        connection.connect()
        for moment in due:
            time.sleep(max(0.0, moment - time.monotonic()))
            connection.request("PUT", "/images", _BYTES, {"X-Image-Type": "kvm"})
            answer = connection.getresponse()
            body = answer.read()
            answered = time.monotonic()
            assert answer.status == 200, body
            yield json.loads(body)["id"], {"due": moment, "answered": answered}


if __name__ == "__main__":
    main()
