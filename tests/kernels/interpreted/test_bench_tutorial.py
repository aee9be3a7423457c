"""The tutorial-style peer computes attention: only then is its time one to be compared with."""

from __future__ import annotations

import math
from types import MappingProxyType

import pytest
import torch

from kernels.attention import reference
from kernels.bench import tutorial
from kernels.dispatch import interpreting
from kernels.tiles import Tile

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

FORWARD = Tile(MappingProxyType({"BLOCK_M": 32, "BLOCK_N": 16}))
BACKWARD = Tile(MappingProxyType({"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}))


def random(seed: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, [b, h, n, d]."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, n, 32, generator=rng).to(dtype) for _ in range(4)]


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("causal", "dtype", "cap"),
    [(True, torch.float32, 1e-5), (False, torch.float32, 1e-5), (True, torch.float16, 3e-3)],
)
def test_values_and_gradients_are_those_of_the_definition(causal, dtype, cap) -> None:
    assert type(tutorial.tutorial_forward).__name__ == "InterpretedFunction"
    *qkv, dout = random(0, 128, dtype)
    leaves = [x.requires_grad_() for x in qkv]
    scale = 1 / math.sqrt(32)
    out = tutorial.TutorialAttention.apply(*leaves, causal, scale, FORWARD, BACKWARD)
    got = torch.autograd.grad(out, leaves, dout)

    exact = [x.detach().double().transpose(1, 2).requires_grad_() for x in qkv]
    expected, _ = reference.attention(*exact, causal=causal)
    wanted = torch.autograd.grad(expected, exact, dout.double().transpose(1, 2))
    assert relative(out, expected.transpose(1, 2)) < cap
    for x, y in zip(got, wanted, strict=True):
        assert relative(x, y.transpose(1, 2)) < cap


def test_the_saved_log_sum_exp_is_of_base_two() -> None:
    q, k, v, _ = random(1, 64, torch.float32)
    _, logsum = tutorial.forward(q, k, v, True, 0.2, FORWARD)
    _, lse = reference.attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), causal=True, scale=0.2
    )
    assert relative(logsum * math.log(2), lse) < 1e-6


def test_what_its_tiles_cannot_divide_is_refused() -> None:
    q, k, v, _ = random(2, 80, torch.float32)
    with pytest.raises(ValueError, match=r"tiles \[16, 32, 64\] divide, got \[1, 2, 80, 32\]"):
        tutorial.TutorialAttention.apply(q, k, v, True, 1.0, FORWARD, BACKWARD)
