"""`imgsvc serve`: the process around the service, from the first socket to the last request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket

import structlog
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from imgsvc import __version__
from imgsvc.allocator import keep_memory
from imgsvc.api.app import make_app
from imgsvc.api.in_flight import InFlight
from imgsvc.context import Context
from imgsvc.errors import ConfigError, NoSpace, Unavailable
from imgsvc.settings import Settings
from imgsvc.systemd import notify, watchdog_interval

# Bytes that are read from a connection, and handed on, at once.
_CHUNK = 256 * 1024
# Seconds between two tries to settle what the last run left, while a store does not answer.
_RETRY_INTERVAL = 1.0
# What a machine that has just been booted may get over: an address that it is about to have, a name service.
_PASSING = (errno.EADDRNOTAVAIL, socket.EAI_AGAIN)

log = structlog.get_logger()


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, and returns the exit status, 0. Raises ConfigError when it cannot start, and
    Unavailable when it might a little later."""
    keep_memory()
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    sockets = _listen(settings)
    port: int = sockets[0].getsockname()[1]
    stop = asyncio.Event()
    _on_signals(stop)
    context = await asyncio.to_thread(Context, settings, port)
    in_flight = InFlight()
    server = HTTPServer(
        make_app(context, in_flight),
        chunk_size=_CHUNK,
        idle_connection_timeout=settings.idle_timeout,
    )
    server.add_sockets(sockets)
    log.info("listening", host=settings.host, port=port, version=__version__, member=context.member_id)
    watchdog = asyncio.create_task(_feed_watchdog())
    try:
        if await _settle(context, stop):
            notify("READY=1")
            log.info("ready")
            await stop.wait()
        notify("STOPPING=1")
        await _drain(server, context, in_flight)
    finally:
        watchdog.cancel()
        await asyncio.to_thread(context.close)
    log.info("stopped")
    return 0


def _listen(settings: Settings) -> list[socket.socket]:
    try:
        if settings.port == 0:
            # One family, for each would get a port of its own.
            return bind_sockets(0, settings.host or "0.0.0.0", socket.AF_INET)  # noqa: S104 - as the setting says
        return bind_sockets(settings.port, settings.host or None, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason, number = (error.strerror, error.errno) if isinstance(error, OSError) else (str(error), None)
        trouble = f"cannot listen on host {settings.host!r}, port {settings.port}: {reason}"
        raise (Unavailable if number in _PASSING else ConfigError)(trouble) from error


def _on_signals(stop: asyncio.Event) -> None:
    """The first asks to stop; the second does not wait, as a kill would not, and no image is the worse for it."""

    def asked(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(0)
        log.info("stopping", signal=number.name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)


async def _settle(context: Context, stop: asyncio.Event) -> bool:
    """Until it is done; False when the service was asked to stop before."""
    while not stop.is_set():
        try:
            await asyncio.to_thread(context.settle)
        except (Unavailable, NoSpace) as error:
            context.not_ready = f"the service is starting: {error}"
            log.warning("start waits", reason=str(error))
            notify("EXTEND_TIMEOUT_USEC=30000000")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _RETRY_INTERVAL)
        else:
            return True
    return False


async def _drain(server: HTTPServer, context: Context, in_flight: InFlight) -> None:
    """Uploads and downloads get `shutdownTimeout` to end; fetches are left at once, to the next start or another member."""
    server.stop()
    context.not_ready = "the service is stopping"
    stopping_fetches = asyncio.create_task(asyncio.to_thread(context.stop_work))
    await in_flight.drain(context.settings.shutdown_timeout)
    await server.close_all_connections()
    await context.finish_background()
    await stopping_fetches


async def _feed_watchdog() -> None:
    """From the event loop, for that is what must not hang."""
    interval = watchdog_interval()
    while interval is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
