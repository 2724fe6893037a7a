"""Real stores that fail on command: a fault stands in the way of a call, and the store itself is sound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from imgsvc.errors import NoSpace, Unavailable, Unreadable
from imgsvc.images.store import ImageStore, ImageWriter
from imgsvc.metadata.store import MetadataStore

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """What a call ends with. One that is `applied` has done its work before: the caller cannot know."""

    error: BaseException
    applied: bool = False


LOST = Fault(Unavailable("the call was lost"))
UNKNOWN = Fault(Unavailable("the answer was lost"), applied=True)
FULL = Fault(NoSpace("there is no space"))
DAMAGED = Fault(Unreadable("cannot read: Input/output error"))


class Killed(BaseException):
    """The process is dead: nothing that follows is done."""


# What each call of a store may end with, as its protocol has it; the calls that are not here always succeed. A commit
# that fails was not applied, and a claim or a writer that nobody got is the next start's business.
FAULTS: dict[str, tuple[Fault, ...]] = {
    "create": (LOST, UNKNOWN, FULL),
    "update": (LOST, UNKNOWN, FULL),
    "delete": (LOST, UNKNOWN),
    "get": (LOST,),
    "get_by_source": (LOST,),
    "may_own": (LOST,),
    "carrier": (LOST,),
    "expect": (LOST, UNKNOWN, FULL),
    "page": (LOST,),
    "hold": (LOST, UNKNOWN),
    "release": (LOST, UNKNOWN),
    "holders": (LOST,),
    "drop_copy": (LOST, UNKNOWN, FULL),
    "lose_copy": (LOST, UNKNOWN, FULL),
    "claim": (LOST, FULL),
    "unclaim": (LOST, UNKNOWN),
    "space": (LOST,),
    "writer": (LOST, FULL),
    "write": (LOST, FULL),
    "note": (LOST, FULL),
    "notes": (LOST,),
    "truncate": (LOST, FULL),
    "commit": (LOST, FULL),
    "open": (LOST,),
    "read": (LOST, DAMAGED),
    "quarantine": (LOST, DAMAGED, FULL),
}


class Faults:
    """The calls so far, by name, and what becomes of the next ones: `plan` is asked before each call, with its number
    and name, and may also do things in that gap. `writers` are those that were given out."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.writers: list[ImageWriter] = []
        self.plan: Callable[[int, str], Fault | None] = _no_fault
        self._lock = threading.Lock()

    def next(self, call: str, fault: Fault, times: int = 1) -> None:
        """The next so many calls of this name end with the fault."""
        left = iter(range(times))

        def plan(_number: int, name: str) -> Fault | None:
            return fault if name == call and next(left, None) is not None else None

        self.plan = plan

    def at(self, call: str, time: int, happens: Callable[[], object]) -> None:
        """Before the call of this name for the first, second … `time`, something else happens."""
        times = iter(range(1, time + 1))

        def plan(_number: int, name: str) -> Fault | None:
            if name == call and next(times, None) == time:
                happens()
            return None

        self.plan = plan

    def always(self, *calls: str, fault: Fault = LOST) -> None:
        """From now on every call ends with the fault, or every one of these names."""
        self.plan = lambda _number, name: fault if not calls or name in calls else None

    def kill(self, step: int, *, applied: bool) -> None:
        """The process dies right after the call of this number, or right before it is applied."""
        self.plan = lambda number, _name: None if number < step else Fault(Killed(), applied=applied and number == step)

    def heal(self) -> None:
        self.plan = _no_fault

    def perform(self, name: str, call: Callable[[], T]) -> T:
        with self._lock:
            number = len(self.calls)
            self.calls.append(name)
        fault = self.plan(number, name)
        if fault is None:
            return call()
        if fault.applied:
            call()
        raise fault.error


def flaky_records(store: MetadataStore, faults: Faults) -> MetadataStore:
    """Each page of a list, of a survey or of what is held is a call named `page`."""
    return cast("MetadataStore", _Flaky(store, faults))


def flaky_images(store: ImageStore, faults: Faults) -> ImageStore:
    """The calls of its writers and readers have faults too."""
    return cast("ImageStore", _Flaky(store, faults))


class _Flaky:
    def __init__(self, store: object, faults: Faults) -> None:
        self._store = store
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        if not callable(attribute):
            return attribute

        def apply(*args: Any, **kwargs: Any) -> Any:
            result = attribute(*(arg._store if isinstance(arg, _Flaky) else arg for arg in args), **kwargs)
            if name == "writer":
                self._faults.writers.append(result)
            if name in ("writer", "open"):
                return _Flaky(result, self._faults)
            return self._pages(result) if name in ("list", "survey", "held") else result

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._faults.perform(name, lambda: apply(*args, **kwargs))

        return call

    def _pages(self, pages: Iterator[T]) -> Iterator[T]:
        while True:
            page = self._faults.perform("page", lambda: next(pages, None))
            if page is None:
                return
            yield page


def _no_fault(_number: int, _name: str) -> Fault | None:
    return None
