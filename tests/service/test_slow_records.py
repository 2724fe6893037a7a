"""A metadata store that takes its time."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

from imgsvc.transfer import REPORT_INTERVAL
from tests.service.conftest import StartService


def test_a_record_that_is_slow_to_be_created(start_service: StartService) -> None:
    """An upload whose record takes longer to be created than progress takes to be reported is not taken for deleted."""
    service = start_service()
    with (
        ThreadPoolExecutor(1) as pool,
        contextlib.closing(sqlite3.connect(service.data_dir / "imgsvc.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        upload = pool.submit(service.upload, b"content")
        time.sleep(REPORT_INTERVAL + 1)
        assert not upload.done()
        other.execute("ROLLBACK")
        assert upload.result()["status"] == "complete"
