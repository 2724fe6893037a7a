"""Logs as the process that reads them sees them: the stderr of a program that uses ours."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest


def run(body: str, level: str = "info", log_format: str = "json") -> str:
    """The stderr of a program that sets up logs and runs `body`."""
    program = f"import structlog\nfrom imgsvc import log\nlog.setup({level!r}, {log_format!r})\n{textwrap.dedent(body)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == ""
    return done.stderr


def lines(body: str, level: str = "info") -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(body, level).splitlines()]


def test_a_line_is_one_object_with_time_level_and_event_first() -> None:
    (line,) = lines(
        """structlog.get_logger().info("image stored", image="a", bytes=5, path=__import__("pathlib").Path("/x"))"""
    )

    assert list(line) == ["timestamp", "level", "event", "image", "bytes", "path"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("timestamp"))
    assert line == {"level": "info", "event": "image stored", "image": "a", "bytes": 5, "path": "/x"}


def test_what_was_bound_to_the_context_is_on_each_line() -> None:
    (line,) = lines("""
        structlog.contextvars.bind_contextvars(request_id="r1")
        structlog.get_logger().info("request")
    """)

    assert line["request_id"] == "r1"


def test_text_from_outside_cannot_begin_a_line() -> None:
    (line,) = lines(r"""structlog.get_logger().info("request", path="/a\n{}\u2028\x1b[2J\udcff")""")

    assert line["path"] == "/a\n{}\u2028\x1b[2J\udcff"


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error", "critical"]),
        ("warning", ["warning", "error", "critical"]),
        ("critical", ["critical"]),
    ],
)
def test_lines_below_the_level_are_left_out_whoever_writes_them(level: str, shown: list[str]) -> None:
    body = """
        import logging
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr({}, level)("event")
    """
    ours = lines(body.format("structlog.get_logger()"), level)
    theirs = lines(body.format("logging.getLogger('asyncio')"), level)

    assert [line["level"] for line in ours] == shown
    assert [line["level"] for line in theirs] == shown


def test_an_exception_is_a_field() -> None:
    (line,) = lines("""
        try:
            1 / 0
        except ZeroDivisionError:
            structlog.get_logger().exception("it broke", image="a")
    """)

    assert (line["level"], line["event"], line["image"]) == ("error", "it broke", "a")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ZeroDivisionError: division by zero")


def test_what_libraries_log_has_the_same_form() -> None:
    first, second, third = lines("""
        import logging
        logging.getLogger("tornado.application").error("%s of %d", "one", 2, exc_info=ValueError("why"))
        logging.getLogger("x").error("outside of an except", exc_info=True)
        logging.getLogger("x").log(35, "a level of its own")
    """)

    assert (first["logger"], first["level"], first["event"]) == ("tornado.application", "error", "one of 2")
    assert first["exception"] == "ValueError: why"
    assert second["event"] == "outside of an except"
    assert (third["level"], third["event"]) == ("warning", "a level of its own")


def test_tornados_own_line_for_a_request_is_left_out() -> None:
    assert run("""import logging; logging.getLogger("tornado.access").error("500 GET / (::1) 1ms")""", "debug") == ""


def test_warnings_and_exceptions_that_nobody_caught_have_the_same_form() -> None:
    warning, of_thread, unraisable, of_process = lines("""
        import threading, warnings

        class Bad:
            def __del__(self):
                raise ValueError("in del")

        def broken():
            raise ValueError("in a thread")

        warnings.warn("careful")
        thread = threading.Thread(target=broken, name="worker")
        thread.start()
        thread.join()
        bad = Bad()
        del bad
        raise ValueError("at the end")
    """)

    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "careful" in warning["event"]
    assert of_thread["thread"] == "worker"
    assert of_thread["exception"].endswith("ValueError: in a thread")
    assert unraisable["exception"].endswith("ValueError: in del")
    assert "__del__" in unraisable["where"]
    assert (of_process["level"], of_process["event"]) == ("critical", "uncaught exception")
    assert of_process["exception"].endswith("ValueError: at the end")


def test_a_record_that_cannot_be_formatted_does_not_stop_the_program() -> None:
    out = run("""
        import logging
        logging.getLogger("x").error("%d", "no number")
        structlog.get_logger().info("still here")
    """)

    assert json.loads(out.splitlines()[-1])["event"] == "still here"


def test_the_console_form_is_for_people() -> None:
    out = run("""structlog.get_logger().info("image stored", bytes=5)""", log_format="console")

    assert "\x1b" not in out
    assert re.fullmatch(r"\S+Z \[info\s*\] image stored\s+bytes=5\n", out)


def test_the_console_form_shows_a_traceback_as_python_does() -> None:
    out = run(
        """
        try:
            1 / 0
        except ZeroDivisionError:
            structlog.get_logger().exception("it broke")
    """,
        log_format="console",
    )

    assert out.endswith("ZeroDivisionError: division by zero\n")
    assert "\nTraceback (most recent call last):\n" in out


def test_logs_that_nobody_takes_do_not_stop_the_program() -> None:
    """A full disk, and a pipe whose reader has gone."""
    program = (
        "import structlog, logging\nfrom imgsvc import log\nlog.setup('info', 'json')\n"
        "for _ in range(1000): structlog.get_logger().info('hello'); logging.error('hello')\n"
        "print('done')"
    )
    ours, theirs = os.pipe()
    os.close(ours)
    with open("/dev/full", "wb") as full, open(theirs, "wb") as broken:  # noqa: PTH123 - a descriptor is no path
        for stderr in (full, broken):
            done = subprocess.run(
                [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=stderr, check=False, timeout=30
            )
            assert (done.returncode, done.stdout) == (0, b"done\n")


@pytest.mark.parametrize(("log_format", "on_terminal"), [("auto", "console"), ("json", "json")])
def test_auto_is_console_on_a_terminal(log_format: str, on_terminal: str) -> None:
    program = f"import structlog\nfrom imgsvc import log\nlog.setup('info', {log_format!r})\nstructlog.get_logger().info('hello')"
    ours, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], stderr=theirs, check=True, timeout=30)
        out = os.read(ours, 1000).decode()
    finally:
        os.close(ours)
        os.close(theirs)

    assert "hello" in out
    assert ("json" if out.startswith("{") else "console") == on_terminal
    assert run("structlog.get_logger().info('hello')", log_format=log_format).startswith("{")


def test_a_pipe_that_nobody_reads_holds_up_nobody() -> None:
    """What it does not take is lost; the lines that it took are whole, and the program goes on to its end."""
    program = """if True:
        from imgsvc import log
        import structlog
        log.setup("info", "json")
        for number in range(5000):
            structlog.get_logger().info("a line", number=number, filling="x" * 100)
    """
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as silent:
        assert silent.wait(20) == 0
        assert silent.stderr is not None
        written = silent.stderr.read().splitlines()
    assert 0 < len(written) < 5000
    assert [json.loads(line)["number"] for line in written] == list(range(len(written)))
