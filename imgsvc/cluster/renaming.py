"""A member gets another id: what is on record as held or carried by the one that it had, is the new one's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import structlog

from imgsvc.errors import ConfigError, Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import CARRIER, REPLICAS, Layout
from imgsvc.etcd_messages import delete, has_value, modified_at, put
from imgsvc.etcd_scan import scan
from imgsvc.images.store import ImageStore

# Notes at once: one after the other, 100,000 of them would take minutes.
_AT_ONCE = 8

log = structlog.get_logger()


class Renaming:
    """Makes the id that this member has among the others that of its directory, too.

    etcd says of each id which directory it is. It does so for the new one before a note is moved to it, and of the old
    one no more after all are moved and the marker has the new one. So whoever dies in between goes on at the next
    start, also under the old id again; and at each moment one of the ids is on record for each image.
    """

    def __init__(self, etcd: Etcd, prefix: str, images: ImageStore, member_id: str) -> None:
        self._etcd = etcd
        self._layout = Layout(prefix)
        self._images = images
        self._id = member_id

    def settle(self) -> None:
        """Does nothing when the id is known to be this directory's, which has no other. To be called before anything
        goes by the directory's id, while nobody else has the new one. Raises Unavailable, and may then be called again;
        ConfigError when the id is another directory's, whose images would be taken for lost."""
        home, start = self._images.home, self._layout.homes
        homes = {item.key.removeprefix(start): item.text for item in scan(self._etcd, start, may_tear=True)}
        former = {member for member, its in homes.items() if its == home} | {self._images.member}
        former.discard(self._id)
        if homes.get(self._id) == home and not former:
            return
        # What is fresh may be a directory that is not mounted: it has no notes of its own to move, and the start sweep
        # has a better word for it.
        move = not self._images.fresh and (former or self._id in homes)
        notes = self._notes(former) if move else []
        self._etcd.transact([], [put(start + self._id, home)])
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="renaming") as threads:
            list(threads.map(lambda key: self._move(key, former), notes))
        if self._images.member != self._id:
            self._images.rename(self._id)
        if notes:
            log.info("member renamed", new=self._id, old=sorted(former), images=len(notes))
        for member in former & homes.keys():
            self._etcd.transact([has_value(start + member, home)], [delete(start + member)])

    def _notes(self, former: set[str]) -> list[str]:
        """The keys of what may be on record under former ids. Raises ConfigError when the new one is another's."""
        for member in former:
            self._require_dead(member)
        # A marker made by hand, after the images were lost, has no home but the id: then a person says whose it is.
        says_so = self._images.home == self._id
        notes, held = list[str](), set[str]()
        for item in scan(self._etcd, self._layout.images, keys_only=True, may_tear=True):
            image_id, rest = self._layout.split(item.key)
            kind, _, member = rest.partition("/")
            if rest == CARRIER or (kind == REPLICAS and member in former):
                notes.append(item.key)
            elif kind == REPLICAS and member == self._id and not says_so:
                held.add(image_id)
        if elsewhere := held.difference(self._images.ids()):
            raise ConfigError(
                f"the member id {self._id} is that of another directory: it is on record as holding images that"
                f" {self._images.place} has not (such as {min(elsewhere)}); cluster.memberId must be another one here"
            )
        return notes

    def _require_dead(self, member: str) -> None:
        """Whoever is live under that id is this directory's last process, whose lease has not ended yet, or runs on the
        directory that this one is a copy of; then that one's notes are not ours."""
        if self._etcd.range(self._layout.member(member)).items:
            raise Unavailable(
                f"{self._images.place} is that of member {member}, which seems to be live: if one is a copy of the"
                " other, the copy must not have the marker .imgsvc"
            )

    def _move(self, key: str, former: set[str]) -> None:
        """One that is gone or new by now was deleted with its image, or is another member's: then nothing is to move."""
        image_id, rest = self._layout.split(key)
        for note in self._etcd.range(key).items:
            if rest != CARRIER:
                moved = [put(self._layout.replica(image_id, self._id), note.text), delete(key)]
            elif (carrier := note.document).get("member") in former:
                moved = [put(key, json.dumps({**carrier, "member": self._id}))]
            else:
                return
            self._etcd.transact([modified_at(key, note.modified)], moved)
