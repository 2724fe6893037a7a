"""What the network delivers, gathered into blocks: nothing is lost, and blocks end where the disk likes them to."""

from __future__ import annotations

import time
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc import blocks as blocks_module
from imgsvc.blocks import BLOCK, PATIENCE, Blocks

SMALL = 16


@given(st.lists(st.tuples(st.binary(max_size=3 * SMALL), st.booleans())))
def test_nothing_is_lost(pieces: list[tuple[bytes, bool]]) -> None:
    """Whatever the pieces, and whenever some are taken early: all bytes come in order, and no block spans a multiple
    of the block size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK", SMALL)
        blocks = Blocks()
        taken: list[bytes] = []
        for piece, early in pieces:
            blocks.add(piece)
            while blocks.due():
                taken.append(bytes(blocks.take()))
            if early:
                taken.append(bytes(blocks.take()))
        while block := blocks.take():
            taken.append(bytes(block))
    assert b"".join(taken) == b"".join(piece for piece, _ in pieces)
    ends = list(accumulate(map(len, taken), initial=0))
    assert all(end - 1 < (begin // SMALL + 1) * SMALL for begin, end in pairwise(ends))


def test_full_blocks() -> None:
    """A block is due when it is full, and not a byte earlier; what is beyond it waits."""
    blocks = Blocks()
    blocks.add(bytes(BLOCK - 1))
    assert not blocks.due()
    blocks.add(b"a")
    assert blocks.due()
    blocks.add(b"b")
    assert len(blocks.take()) == BLOCK
    assert not blocks.due()
    assert bytes(blocks.take()) == b"b"


def test_a_block_after_an_early_one() -> None:
    """It makes up for what was taken early, so that the next one begins at a multiple again."""
    blocks = Blocks()
    blocks.add(b"early")
    assert bytes(blocks.take()) == b"early"
    blocks.add(bytes(BLOCK - 6))
    assert not blocks.due()
    blocks.add(bytes(1))
    assert blocks.due()
    blocks.add(bytes(5))
    assert len(blocks.take()) == BLOCK - 5
    assert len(blocks.take()) == 5


def test_patience() -> None:
    """Few bytes are due after a while, so that a slow sender's progress shows; none never are."""
    blocks = Blocks()
    time.sleep(PATIENCE)
    assert not blocks.due()
    blocks = Blocks()
    blocks.add(b"few")
    assert not blocks.due()
    time.sleep(PATIENCE)
    assert blocks.due()
    blocks.take()
    blocks.add(b"more")
    assert not blocks.due()


def test_nothing() -> None:
    """Taking from nothing gives nothing."""
    assert bytes(Blocks().take()) == b""


def test_larger_blocks() -> None:
    """Who wants larger ones gets them; they too end at a multiple of their size."""
    blocks = Blocks(BLOCK, 4 * BLOCK)
    for _ in range(5):
        blocks.add(bytes(BLOCK))
    assert blocks.due()
    assert len(blocks.take()) == 3 * BLOCK
    assert not blocks.due()
    assert len(blocks.take()) == 2 * BLOCK
