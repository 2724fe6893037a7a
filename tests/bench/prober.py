"""A client that asks for one path at a steady rate over one connection, and says how long answers took. Run it as a
program: prober URL SECONDS RATE.

A request that goes out late, because the one before it was slow, counts from when it was due: whoever waits behind a
slow answer waits too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import time
from contextlib import closing
from urllib.parse import urlsplit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("seconds", type=float)
    parser.add_argument("rate", type=float)
    options = parser.parse_args()
    took = [1000 * seconds for seconds in _probe(options.url, round(options.seconds * options.rate), options.rate)]
    hundredths = statistics.quantiles(took, n=100)
    json.dump({"p50": hundredths[49], "p99": hundredths[98], "max": max(took)}, sys.stdout)


def _probe(url: str, count: int, rate: float) -> list[float]:
    """Seconds that each answer took."""
    parts = urlsplit(url)
    took = []
    with closing(http.client.HTTPConnection(parts.netloc, timeout=60)) as connection:
        connection.connect()
        began = time.monotonic()
        for number in range(count):
            due = began + number / rate
            time.sleep(max(0.0, due - time.monotonic()))
            connection.request("GET", parts.path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            took.append(time.monotonic() - due)
    return took


if __name__ == "__main__":
    main()
