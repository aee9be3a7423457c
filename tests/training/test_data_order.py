"""The visiting order: bijective, epoch-wise, independent of the number of processes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.data.order import permute, rank_slice, visit


def window_ids(step: int, batch_size: int, num_windows: int, seed: int) -> np.ndarray:
    """Windows of one optimiser step, as `LanguageData` asks for them."""
    return visit(step * batch_size, batch_size, num_windows, seed)


SIZES = [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 255, 1000, 4097]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**63, -5])
def test_permute_is_a_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permute_is_pointwise():
    n = 1000
    whole = permute(np.arange(n), n, 7)
    some = np.array([999, 0, 5, 5])
    assert np.array_equal(permute(some, n, 7), whole[some])


@pytest.mark.parametrize("n", [2, 5, 11])
def test_permute_is_uniform_over_keys(n):
    keys = 3000
    images = np.stack([permute(np.arange(n), n, key) for key in range(keys)])
    expected = keys / n
    for position in range(n):
        counts = np.bincount(images[:, position], minlength=n)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < (n - 1) + 6 * np.sqrt(2 * (n - 1))


def test_permute_looks_unordered():
    n = 20_000
    image = permute(np.arange(n), n, 3)
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.03
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.03
    assert np.mean(image == permute(np.arange(n), n, 4)) < 0.002


@pytest.mark.parametrize(("index", "n"), [([3], 3), ([-1], 3), ([0], 0)])
def test_permute_refuses_what_is_out_of_range(index, n):
    with pytest.raises(ValueError, match="permute"):
        permute(np.array(index), n, 0)


@pytest.mark.parametrize(("num_windows", "batch_size"), [(24, 8), (10, 4), (3, 8), (1, 2)])
def test_each_window_comes_once_per_epoch(num_windows, batch_size):
    epochs = 3 * batch_size  # a whole number of steps
    steps = epochs * num_windows // batch_size
    ids = np.concatenate([window_ids(s, batch_size, num_windows, 0) for s in range(steps)])
    for epoch in ids.reshape(epochs, num_windows):
        assert np.array_equal(np.sort(epoch), np.arange(num_windows))


def test_epochs_and_seeds_differ():
    first, second, other = (
        window_ids(step, 500, 500, seed) for step, seed in [(0, 0), (1, 0), (0, 1)]
    )
    assert np.mean(first == second) < 0.05
    assert np.mean(first == other) < 0.05


def test_order_depends_on_seed_and_step_only():
    forward = [window_ids(step, 8, 100, 5) for step in range(30)]
    for step in (29, 3, 17):
        assert np.array_equal(window_ids(step, 8, 100, 5), forward[step])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_concatenate_to_the_batch(world):
    ids = window_ids(9, 16, 100, 0)
    shares = [rank_slice(ids, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares), ids)


def test_rank_slice_names_the_key_to_change():
    with pytest.raises(ValueError, match=r"data\.batch_size=16 .* 3 processes.* multiple of 3"):
        rank_slice(np.arange(16), 0, 3)
    with pytest.raises(ValueError, match="rank=2"):
        rank_slice(np.arange(16), 2, 2)


def shuffle_buffer(source, size, rng):
    """What streaming libraries do: yield a random element of a buffer that is refilled."""
    buffer = []
    for item in source:
        if len(buffer) < size:
            buffer.append(item)
            continue
        at = rng.randrange(size)
        buffer[at], item = item, buffer[at]
        yield item


def test_negative_control_a_shuffle_buffer_does_not_resume():
    whole = list(shuffle_buffer(range(400), 50, random.Random(0)))
    consumed = 100  # elements given out; the source stands 50 further, the buffer is lost
    resumed = list(shuffle_buffer(range(consumed + 50, 400), 50, random.Random(0)))
    assert whole[consumed : consumed + len(resumed)] != resumed
    tail = [window_ids(step, 4, 100, 0).tolist() for step in range(10, 20)]
    assert [window_ids(step, 4, 100, 0).tolist() for step in range(10, 20)] == tail
