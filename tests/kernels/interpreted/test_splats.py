"""The compositing kernels, interpreted: values, gradients, the same bits again, operators."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from kernels import rasterize, record
from kernels.parity.splats import cases, draw, with_gradients
from kernels.splats import launch, triton
from kernels.splats.bins import Grid, bin_gaussians
from kernels.splats.project import project

CPU = torch.device("cpu")


def test_these_kernels_are_interpreted() -> None:
    for kernel in (triton.splat_forward, triton.splat_backward, triton.splat_sum):
        assert type(kernel).__name__ == "InterpretedFunction"
    inputs, options = draw("small", 1)
    with record() as ran:
        rasterize(**{k: x.float() for k, x in inputs.items()}, **options, impl="interpret")
    assert [choice.impl for choice in ran] == ["interpret"]


def test_values_and_gradients_agree_with_the_definition() -> None:
    for case in cases("small", 12, torch.float32):
        wrong = [c for c in case.run("interpret", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


@pytest.mark.parametrize("tile", [8, 16])
def test_gradients_have_the_same_bits_every_time_and_probes_their_sizes(tile: int) -> None:
    inputs, options = draw("small", 4)
    narrow = {k: x.float() for k, x in inputs.items()}
    narrow["probe"] = torch.zeros(len(narrow["viewmats"]), len(narrow["means"]), 2)
    first, again, plain = (
        with_gradients(rasterize, narrow, options, impl=impl, tile=tile)
        for impl in ("interpret", "interpret", "torch")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["d probe"].max() > 0
    torch.testing.assert_close(first["d probe"], plain["d probe"], rtol=1e-4, atol=1e-5)


def test_no_gaussians_have_no_gradients() -> None:
    inputs, options = draw("small", 1)
    few = {k: (x[:0] if k not in ("viewmats", "Ks", "background") else x).float()
           for k, x in inputs.items()}  # fmt: skip
    few = {k: x for k, x in few.items() if k not in ("sh", "colors", "background")}
    few |= {"colors": torch.zeros(0, 3), "means": few["means"].requires_grad_()}
    seen = rasterize(**few, **options, impl="interpret")
    (slope,) = torch.autograd.grad(seen.color.sum(), few["means"])
    assert slope.shape == (0, 3) and not seen.color.any()


def test_the_operators_pass_opcheck() -> None:
    inputs, options = draw("small", 2)
    given = {k: x.float() for k, x in inputs.items()}
    width, height = options["width"], options["height"]
    names = ("means", "quats", "scales", "opacities", "viewmats", "Ks")
    seen = project(*(given[k] for k in names), width, height)
    grid = Grid(len(given["viewmats"]), width, height, 16)
    bins = bin_gaussians(seen.centers, seen.extents, seen.depths, grid)
    leaves = [seen.centers.flatten(0, 1), seen.conics.flatten(0, 1), seen.opacities.flatten(),
              torch.rand(seen.opacities.numel(), 3)]  # fmt: skip
    leaves = [x.detach().requires_grad_() for x in leaves]
    rows = bins.ids, bins.offsets, bins.slots, bins.order, bins.starts
    numbers = grid.cameras, grid.width, grid.height, grid.tile
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(launch.splat, (*leaves, torch.zeros(0, 2), *rows, *numbers), test_utils=tests)
    with torch.no_grad():
        image, left = launch.splat(*leaves, torch.zeros(0, 2), *rows, *numbers)
    given = (image, left, image, left, *(x.detach() for x in leaves))
    opcheck(launch.splat_backward, (*given, *rows, *numbers, False), test_utils=tests)


def test_second_derivatives_are_refused() -> None:
    inputs, options = draw("small", 3)
    narrow = {k: x.float() for k, x in inputs.items()}
    narrow["means"].requires_grad_()
    seen = rasterize(**narrow, **options, impl="interpret")
    (first,) = torch.autograd.grad(seen.color.square().sum(), narrow["means"], create_graph=True)
    with pytest.raises(RuntimeError, match="rasterize has first derivatives only"):
        first.sum().backward()
