"""Who is live."""

from __future__ import annotations

import dataclasses
import json

from imgsvc.api.base import BaseHandler


class MembersHandler(BaseHandler):
    """`/members`: the live members of the cluster, in the order of their ids. A service that shares its records with
    nobody is a cluster of one."""

    allowed = ("GET", "HEAD")

    async def get(self) -> None:
        members = await self.context.members_pool.run(self.context.members)
        self.say_stale(self.context.mirror.stale if self.context.mirror is not None else None)
        self.write(json.dumps([dataclasses.asdict(member) for member in members], separators=(",", ":")) + "\n")

    head = get
