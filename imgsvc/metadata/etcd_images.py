"""What the keys of one image in etcd say."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import structlog

from imgsvc.etcd_layout import CARRIER, OWNER, RECORD, REPLICAS, Layout, is_replica
from imgsvc.etcd_messages import KeyValue
from imgsvc.foreign import read_json
from imgsvc.metadata.image import LARGEST, Image, ImageType, Status, is_id
from imgsvc.metadata.mirror import Carrier, Known, LiveMember, shared

_SAMPLE = Image("", ImageType.KVM, expected_sha256="-").to_document()
# Of a record as this program writes it.
_KEYS = (tuple(_SAMPLE), tuple(key for key in _SAMPLE if key != "expected_sha256"))

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Found:
    """All keys of one image, as they were at one revision: `parts` by what they are named below the image."""

    id: str
    parts: Mapping[str, KeyValue]
    revision: int

    @property
    def record(self) -> KeyValue | None:
        return self.parts.get(RECORD)

    @property
    def revision_of_record(self) -> int:
        """0 when it is not there."""
        return 0 if self.record is None else self.record.modified

    @property
    def owner(self) -> KeyValue | None:
        return self.parts.get(OWNER)

    @property
    def carrier(self) -> Carrier | None:
        return read_carrier(self.parts.get(CARRIER))

    @property
    def notes(self) -> dict[str, dict[str, str]]:
        """What each member that holds the bytes has noted, by its id."""
        return {member: read_note(item) for member, item in self.notes_by_member.items()}

    @property
    def notes_by_member(self) -> dict[str, KeyValue]:
        """The same, as etcd has it."""
        return {name.removeprefix(f"{REPLICAS}/"): item for name, item in self.parts.items() if is_replica(name)}

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(sorted(self.notes_by_member))

    @property
    def known(self) -> Known | None:
        """As the mirror keeps it; a record that is no image's counts as one that is not there."""
        return changed(None, self.id, self.parts)

    def image(self) -> Image:
        """Raises ValueError when there is no record, or it is no image's, or another image's, or under what is no id."""
        if self.record is None:
            raise ValueError("it is not there")
        return dataclasses.replace(_read_record(self.id, self.record)[0], replicas=self.replicas)


def grouped(layout: Layout, items: Iterable[KeyValue], revision: int = 0) -> Iterator[Found]:
    """Keys below `images`, in their order, image by image."""
    for image_id, group in itertools.groupby(items, lambda item: layout.split(item.key)[0]):
        yield Found(image_id, {layout.split(item.key)[1]: item for item in group}, revision)


def changed(
    known: Known | None, image_id: str, parts: Mapping[str, KeyValue | None], *, complain: bool = False
) -> Known | None:
    """What is known of an image once these of its keys have these values; None is one that is gone. A record that is no
    image's counts as gone; `complain` has it in the log."""
    now = known or Known(image_id, "", 0, Status.PENDING, ImageType.KVM, 0)
    document, revision, status, image_type, size = now.document, now.revision, now.status, now.type, now.size
    owner, carrier, replicas = now.owner, now.carrier, set(now.replicas)
    for name, item in parts.items():
        if name == RECORD:
            document, revision = "", 0
            if item is not None and (read := _parsed(image_id, item, complain=complain)) is not None:
                (image, document), revision = read, item.modified
                status, image_type, size = image.status, image.type, image.size
        elif name == OWNER:
            owner = None if item is None else item.text
        elif name == CARRIER:
            carrier = read_carrier(item)
        elif is_replica(name):
            member = name.removeprefix(f"{REPLICAS}/")
            (replicas.discard if item is None else replicas.add)(member)
    if not (document or owner or carrier or replicas):
        return None
    return Known(
        image_id, document, revision, status, image_type, size, owner, carrier, replicas=shared(tuple(sorted(replicas)))
    )


def parsed(image_id: str, item: KeyValue) -> Image | None:
    """The image of a record, or None when it is none, which is logged."""
    read = _parsed(image_id, item, complain=True)
    return None if read is None else read[0]


def _parsed(image_id: str, item: KeyValue, *, complain: bool) -> tuple[Image, str] | None:
    try:
        return _read_record(image_id, item)
    except ValueError as error:
        if complain:
            log.warning("no image document", key=item.key, reason=str(error))
        return None


def _read_record(image_id: str, item: KeyValue) -> tuple[Image, str]:
    """The image, and its document as `Image.to_json` writes it, or with the same keys in the same order: to write each
    anew would take most of the time of reading all. Raises ValueError."""
    text = item.value.decode()
    document = read_json(text)
    image = Image.from_document(document, item.modified)
    if image.id != image_id or not is_id(image_id):
        raise ValueError(f"its id is {image.id!r}")
    ours = tuple(document) in _KEYS and text[0] == "{" and text[-1] == "}"
    return image, text if ours else image.to_json()


def stored_document(image: Image) -> str:
    """The record as it is stored."""
    return dataclasses.replace(image, replicas=None).to_json()


def read_carrier(item: KeyValue | None) -> Carrier | None:
    """None also when another program has written something else."""
    note = {} if item is None else item.document
    member, url, until = note.get("member"), note.get("url"), note.get("until")
    if isinstance(member, str) and isinstance(url, str) and isinstance(until, int | float):
        with contextlib.suppress(OverflowError):
            return Carrier(member, url, float(until))
    return None


def read_member(member: str, item: KeyValue) -> LiveMember:
    """What a live member says of itself, as far as it makes sense."""
    note = item.document

    def text(name: str) -> str:
        value = note.get(name, "")
        return value if isinstance(value, str) else ""

    def number(name: str) -> int | None:
        value = note.get(name)
        sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
        return value if sound else None

    return LiveMember(
        id=member,
        url=text("url"),
        version=text("version"),
        free=number("free"),
        total=number("total"),
        images=number("images") or 0,
        started=text("started"),
    )


def read_note(item: KeyValue) -> dict[str, str]:
    """What a member wrote; nothing, when another program wrote something else."""
    return {key: value for key, value in item.document.items() if isinstance(value, str)}


def is_foreign(item: KeyValue) -> bool:
    """Whether the Go program wrote the record; ours always have all keys."""
    return "error" not in item.document
