"""What systemd asks of a service of Type=notify: to say when it is ready, and that it is alive."""

from __future__ import annotations

import os
import socket

import structlog

_log = structlog.get_logger()

# The event loop waits for this, and a journal that is behind must not stop it for long.
_TIMEOUT = 1.0


def notify(state: str) -> None:
    """Tells systemd a state such as "READY=1", "STOPPING=1" or "WATCHDOG=1". Does nothing when it does not listen.

    Never raises: a service that cannot say that it is well still is.
    """
    address = os.fsencode(os.environ.get("NOTIFY_SOCKET", ""))
    if not address:
        return
    if address.startswith(b"@"):
        address = b"\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(_TIMEOUT)
            channel.sendto(state.encode(), address)
    except OSError as error:
        _log.warning("systemd was not told", state=state, reason=str(error))


def watchdog_interval() -> float | None:
    """Seconds between two "WATCHDOG=1", half of what systemd waits for; None when it does not watch this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    patience = os.environ.get("WATCHDOG_USEC", "")
    if not patience.isdecimal() or int(patience) == 0:
        return None
    return int(patience) / 2_000_000
