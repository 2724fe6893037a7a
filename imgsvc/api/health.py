"""What a load balancer and systemd's friends ask."""

from __future__ import annotations

import asyncio

from imgsvc.api.base import BaseHandler
from imgsvc.errors import Unavailable

# Seconds, for a disk that hangs does not fail.
_PATIENCE = 5.0


class HealthHandler(BaseHandler):
    """`/healthz`: 200 while the process lives."""

    allowed = ("GET", "HEAD")
    needs_stores = False

    async def get(self) -> None:
        self.write('{"status":"ok"}\n')

    head = get


class ReadyHandler(HealthHandler):
    """`/readyz`: 200, or 503 with the store that fails and why."""

    async def get(self) -> None:
        if self.context.not_ready is not None:
            raise Unavailable(self.context.not_ready)
        for name, ping in (
            ("image store", self.context.images.ping),
            ("metadata store", self.context.records.ping),
        ):
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self.context.health_pool.run(ping)
            except TimeoutError as error:
                raise Unavailable(f"{name}: no answer for {_PATIENCE:g} seconds") from error
            except Unavailable as error:
                raise Unavailable(f"{name}: {error}") from error
        self.write('{"status":"ready"}\n')

    head = get
