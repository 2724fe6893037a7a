"""The least that Tornado can do: a handler that writes 400 fixed bytes. Run it as a program."""

from __future__ import annotations

import asyncio
import sys

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

_BODY = b"x" * 400


class _Fixed(RequestHandler):
    def get(self) -> None:
        self.write(_BODY)


async def _serve() -> None:
    sockets = bind_sockets(0, "127.0.0.1")
    HTTPServer(Application([("/.*", _Fixed)])).add_sockets(sockets)
    sys.stdout.write(f"http://127.0.0.1:{sockets[0].getsockname()[1]}/\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
