"""Logs: one event a line on stderr, JSON for machines and coloured text on a terminal, whoever wrote it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TextIO, cast

import structlog

_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode


def setup(level: str, log_format: str) -> None:
    """Sends this process's logs to stderr, from `level` on; `log_format` is "json", "console" or "auto".

    What libraries log, what Python warns of and exceptions that nobody caught come out in the same form.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    terminal = sys.stderr.isatty()
    console = log_format == "console" or (log_format == "auto" and terminal)
    structlog.configure(
        processors=_console(colours=terminal) if console else [_Json()],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Stderr(sys.stderr.fileno()))),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=threshold, force=True)
    logging.captureWarnings(capture=True)
    # We log each request ourselves, with what Tornado's line does not know.
    logging.getLogger("tornado.access").disabled = True
    _catch_uncaught()


# How long the rest of a long line may take.
_MOMENT_MS = 100


class _Stderr:
    """Takes lines, and neither raises nor waits: where the disk or the pipe behind it takes no more, a line is lost,
    and no image with it. Unbuffered, so that none is left to fail when the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)

    def write(self, line: str) -> None:
        data = line.encode(errors="backslashreplace")
        with self._lock, contextlib.suppress(OSError):
            # A pipe that has room takes so much at once; whoever reads it may need a moment for the rest.
            patience = 0
            for start in range(0, len(data), select.PIPE_BUF):
                if not self._room.poll(patience):
                    return
                os.write(self._descriptor, data[start : start + select.PIPE_BUF])
                patience = _MOMENT_MS

    def flush(self) -> None: ...


class _ToStructlog(logging.Handler):
    """Hands the standard library's records over, so that there is one renderer and one stream."""

    def emit(self, record: logging.LogRecord) -> None:
        # A level between two of the five that structlog knows is the lower one.
        level = max(logging.DEBUG, min(record.levelno // 10 * 10, logging.CRITICAL))
        try:
            structlog.get_logger().log(
                level,
                record.getMessage(),
                logger=record.name,
                exc_info=record.exc_info,
            )
        except Exception:  # noqa: BLE001 - a handler reports through handleError, whatever it was
            self.handleError(record)


class _Json:
    """All that becomes of an event: structlog's processors, one for each step, take twice the time, and there is a
    line for each request."""

    def __init__(self) -> None:
        # A second, and how each moment in it begins.
        self._second = (0, "")

    def __call__(self, logger: Any, level: str, event: MutableMapping[str, Any]) -> str:
        if "exc_info" in event:
            event = structlog.processors.format_exc_info(logger, level, event)
        head = {"timestamp": self._now(), "level": level, "event": event.pop("event")}
        return _encode({**head, **structlog.contextvars.get_contextvars(), **event})

    def _now(self) -> str:
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        second, text = self._second
        if seconds != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
            self._second = (seconds, text)
        return f"{text}.{rest // 1000:06}Z"


def _console(*, colours: bool) -> list[Any]:
    plain = structlog.dev.plain_traceback
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain),
    ]


def _catch_uncaught() -> None:
    log = structlog.get_logger()

    def of_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("uncaught exception", exc_info=(kind, error, trace))

    def of_thread(hook: threading.ExceptHookArgs) -> None:
        name = hook.thread.name if hook.thread is not None else ""
        log.critical("uncaught exception", thread=name, exc_info=(hook.exc_type, hook.exc_value, hook.exc_traceback))

    def unraisable(hook: Any) -> None:
        error = (hook.exc_type, hook.exc_value, hook.exc_traceback)
        log.error(hook.err_msg or "exception ignored", where=repr(hook.object), exc_info=error)

    sys.excepthook = of_process
    threading.excepthook = of_thread
    sys.unraisablehook = unraisable
