"""Random streams are functions of (seed, stream, counters), and independent."""

from __future__ import annotations

import numpy as np

from training.seeding import numpy_rng, stream_seed, torch_generator


def test_streams_are_reproducible_and_distinct() -> None:
    seeds = {
        stream_seed(seed, stream, *counters)
        for seed in (0, 1)
        for stream in ("data", "init")
        for counters in ((), (0,), (1,), (0, 1), (1, 0))
    }
    assert len(seeds) == 20
    assert stream_seed(3, "data", 7) == stream_seed(3, "data", 7)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_drawing_from_one_stream_moves_no_other() -> None:
    expected = numpy_rng(0, "data", 5).random(4)
    numpy_rng(0, "eval").random(100)
    np.testing.assert_array_equal(numpy_rng(0, "data", 5).random(4), expected)


def test_torch_and_numpy_generators_follow_the_stream() -> None:
    import torch

    a = torch.rand(3, generator=torch_generator(0, "init"))
    b = torch.rand(3, generator=torch_generator(0, "init"))
    c = torch.rand(3, generator=torch_generator(0, "other"))
    assert torch.equal(a, b) and not torch.equal(a, c)
