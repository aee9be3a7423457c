"""Quantised prefixes: the error of a code, the bytes to the last one, bad input."""

from __future__ import annotations

import pytest
import torch

from models.language.prefix import Prefix
from models.language.quantised import BITS, quantise


def random_prefix(p: int, kv: int = 2, hd: int = 32, b: int = 3, layers: int = 2) -> Prefix:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(layers, 2, b, p, kv, hd, generator=generator)
    rows[:, 0, ..., 3] *= 20  # a channel of large keys
    return Prefix(tuple((k, v) for k, v in rows), p)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("hd", [16, 64])
def test_no_number_is_off_by_more_than_half_a_step(bits, hd):
    prefix = random_prefix(100, hd=hd)
    back = quantise(prefix, bits, group=32, residual=10).prefix()
    assert back.position == 100
    for (k, v), (k_back, v_back) in zip(prefix.layers, back.layers, strict=True):
        assert torch.equal(k[:, 64:], k_back[:, 64:]) and torch.equal(v[:, 64:], v_back[:, 64:])
        keys = k[:, :64].unflatten(1, (2, 32))
        step = (keys.amax(2) - keys.amin(2)) / (2**bits - 1)
        error = (k_back[:, :64].unflatten(1, (2, 32)) - keys).abs().amax(2)
        assert (error <= 0.51 * step + 2e-3 * keys.abs().amax(2)).all()
        values = v[:, :64].unflatten(-1, (-1, min(32, hd)))
        step = (values.amax(-1) - values.amin(-1)) / (2**bits - 1)
        error = (v_back[:, :64].unflatten(-1, (-1, min(32, hd))) - values).abs().amax(-1)
        assert (error <= 0.51 * step + 2e-3 * values.abs().amax(-1)).all()


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_codes_scales_and_what_stays(bits):
    p, kv, hd, b, layers = 100, 2, 32, 3, 2
    found = quantise(random_prefix(p), bits, group=32, residual=10)
    codes = 64 * kv * hd * bits // 8
    key_scales, value_scales = 2 * (kv * hd) * 2 * 2, 64 * kv * 2 * 2
    recent = 36 * kv * hd * 4
    assert found.num_bytes == layers * b * (2 * codes + key_scales + value_scales + 2 * recent)


def test_fewer_bits_are_smaller_and_worse():
    prefix = random_prefix(128)
    quantised = [quantise(prefix, bits, residual=0) for bits in BITS]
    sizes = [x.num_bytes for x in quantised]
    errors = [
        (x.prefix().layers[0][0] - prefix.layers[0][0]).square().mean().item() for x in quantised
    ]
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_constants_and_nothing_survive():
    still = Prefix(((torch.full((1, 32, 1, 8), 3.0), torch.zeros(1, 32, 1, 8)),), 32)
    for bits in BITS:
        (k, v) = quantise(still, bits, residual=0).prefix().layers[0]
        torch.testing.assert_close(k, still.layers[0][0])
        torch.testing.assert_close(v, still.layers[0][1])
    assert quantise(random_prefix(5), 4).prefix().rows == 5


def test_what_cannot_be_coded_is_refused():
    prefix = random_prefix(64)
    with pytest.raises(ValueError, match="bits=3 must be one of 2, 4, 8"):
        quantise(prefix, 3)
    with pytest.raises(ValueError, match="must divide the head width 32"):
        quantise(prefix, 4, group=24)
