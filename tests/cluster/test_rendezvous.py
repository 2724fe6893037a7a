"""Who should hold an image: the same for all who ask, spread evenly, and moved as little as can be."""

from __future__ import annotations

import random
import uuid
from collections import Counter

from imgsvc.cluster.rendezvous import place, ranked

MEMBERS = [f"member-{n}" for n in range(10)]
IMAGES = [str(uuid.UUID(int=n)) for n in range(2_000)]


def test_the_order_in_which_members_are_named_does_not_matter() -> None:
    """Members learn of each other in any order, and must come to the same."""
    shuffled = random.Random(1).sample(MEMBERS, len(MEMBERS))
    for image_id in IMAGES:
        assert ranked(image_id, MEMBERS) == ranked(image_id, shuffled)


def test_a_member_that_leaves_moves_nothing_but_its_own() -> None:
    """The others keep their order, for every image; so does one that joins."""
    for image_id in IMAGES:
        without = [member for member in ranked(image_id, MEMBERS) if member != "member-3"]
        assert ranked(image_id, [member for member in MEMBERS if member != "member-3"]) == without


def test_every_member_has_its_share() -> None:
    """Of being first, and of being second for what any one member is first for: who dies leaves its share to all."""
    orders = [ranked(image_id, MEMBERS) for image_id in IMAGES]
    first = Counter(order[0] for order in orders)
    heirs = Counter(order[1] for order in orders if order[0] == "member-3")
    assert set(first) == set(MEMBERS)
    assert max(first.values()) < 1.35 * len(IMAGES) / len(MEMBERS)
    assert len(heirs) == len(MEMBERS) - 1
    assert max(heirs.values()) < 0.25 * heirs.total()


def test_the_place_is_that_in_the_order() -> None:
    """As far as it is asked for; the member itself may be among the others or not."""
    for image_id in IMAGES[:200]:
        for at, member in enumerate(ranked(image_id, MEMBERS)):
            assert place(image_id, member, MEMBERS, 100) == at
            assert place(image_id, member, set(MEMBERS) - {member}, 3) == min(at, 3)


def test_the_order_is_for_ever() -> None:
    """Members of two versions of the program must come to the same: this is what it always was."""
    assert ranked(IMAGES[7], MEMBERS[:4]) == ["member-3", "member-0", "member-2", "member-1"]


def test_a_name_that_is_no_text() -> None:
    """A key of somebody else may have one, and has a place as any other."""
    odd = [*MEMBERS, "\udcff"]
    orders = [ranked(image_id, odd) for image_id in IMAGES[:100]]
    assert {order[0] for order in orders} == set(odd)
    assert all(place(IMAGES[n], "\udcff", odd, 99) == order.index("\udcff") for n, order in enumerate(orders))
