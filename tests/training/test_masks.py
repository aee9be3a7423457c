"""Masks: sizes as published, targets that are never seen, one length per batch."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.masks import multi_block, tubes


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("side", "min_keep", "context", "target", "union"),
    [(16, 10, 0.336, 0.173, 0.448), (14, 10, 0.328, 0.170, 0.444), (8, 4, 0.246, 0.166, 0.427)],
)
def test_blocks_cover_what_the_published_ones_do(
    side: int, min_keep: int, context: float, target: float, union: float
) -> None:
    """Measured with the authors' generator: batches of 8, 300 of them."""
    draw, found = rng(), []
    for _ in range(300):
        masks = multi_block(draw, (side, side), 8, min_keep=min_keep)
        covered = np.mean([len(np.unique(image)) for image in masks.targets])
        found.append((masks.context.shape[1], masks.targets.shape[2], covered))
    shares = np.mean(found, axis=0) / side**2
    assert np.abs(shares - (context, target, union)).max() < 0.02, shares


@pytest.mark.parametrize(
    ("blocks", "scale", "context", "told"), [(8, 0.15, 0.284, 0.508), (2, 0.7, 0.094, 0.725)]
)
def test_tubes_cover_what_the_published_ones_do(
    blocks: int, scale: float, context: float, told: float
) -> None:
    draw, found = rng(), []
    for _ in range(300):
        masks = tubes(draw, (8, 16, 16), 8, blocks=blocks, scale=scale)
        found.append((masks.context.shape[1], masks.targets.shape[2]))
    shares = np.mean(found, axis=0) / (8 * 16 * 16)
    assert np.abs(shares - (context, told)).max() < 0.02, shares


def test_what_is_to_be_told_is_never_seen() -> None:
    for draw in (rng(1), rng(2)):
        for masks in (multi_block(draw, (8, 8), 32, min_keep=4), tubes(draw, (3, 8, 8), 32)):
            for seen, told in zip(masks.context, masks.targets, strict=True):
                assert not set(seen) & set(told.ravel())
                assert len(set(seen)) == len(seen), "no patch twice"
            assert masks.context.min() >= 0


def test_a_block_is_a_rectangle_and_a_tube_goes_through_all_frames() -> None:
    masks = multi_block(rng(3), (14, 14), 4)
    for block in masks.targets.reshape(16, -1):
        rows, columns = np.divmod(block, 14)
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert area == len(np.unique(block)) == len(block)
    masks = tubes(rng(3), (4, 6, 6), 5)
    for seen in masks.context:
        frames, places = np.divmod(seen, 36)
        per_frame = [set(places[frames == f]) for f in range(4)]
        assert all(found == per_frame[0] for found in per_frame) and per_frame[0]


def test_places_differ_between_images_and_sizes_between_batches() -> None:
    masks = multi_block(rng(4), (14, 14), 16)
    assert len({tuple(block) for block in masks.targets[:, 0]}) > 8
    lengths = {multi_block(draw, (14, 14), 2).targets.shape[2] for draw in [rng(4)] * 20}
    assert len(lengths) > 2
    again = multi_block(rng(4), (14, 14), 16)
    assert all(np.array_equal(a, b) for a, b in zip(masks, again, strict=True))


def test_a_larger_batch_sees_less() -> None:
    """All masks get the length of the shortest."""
    shares = [
        np.mean([multi_block(draw, (16, 16), batch).context.shape[1] for _ in range(60)])
        for draw, batch in ((rng(5), 2), (rng(5), 64))
    ]
    assert shares[1] < 0.8 * shares[0]


def test_masks_that_leave_no_context_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leave no 10 of a grid of 4 x 4.*smaller patches"):
        multi_block(rng(), (4, 4), 8, targets=6, target_scale=(0.5, 0.6))
    with pytest.raises(ValueError, match=r"leave no 1 of"):
        tubes(rng(), (2, 2, 2), 4, blocks=8, scale=0.9)
