"""A vision transformer: patches as a convolution cuts them, masked ones without any influence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.worlds.initialise import init_uniform
from models.worlds.vit import VisionTransformer, positions


def made(size=(12, 8), patch=(4, 4), channels=3, **options) -> VisionTransformer:
    model = VisionTransformer(size, patch, channels, d=24, depth=2, heads=3, **options)
    init_uniform(model, torch.Generator().manual_seed(0))
    return model


def test_patches_are_those_of_a_convolution_row_by_row() -> None:
    model, images = made(), torch.randn(2, 3, 12, 8)
    kernel = model.embed.weight.view(24, 4, 4, 3).permute(0, 3, 1, 2)
    by_convolution = F.conv2d(images, kernel, model.embed.bias, stride=4).flatten(2).mT
    model.blocks, model.norm = torch.nn.ModuleList(), torch.nn.Identity()
    torch.testing.assert_close(model(images) - positions((3, 2), 24), by_convolution)


def test_clips_are_cut_frame_by_frame() -> None:
    model, clips = made((4, 8, 8), (2, 4, 4)), torch.randn(2, 3, 4, 8, 8)
    kernel = model.embed.weight.view(24, 2, 4, 4, 3).permute(0, 4, 1, 2, 3)
    by_convolution = F.conv3d(clips, kernel, model.embed.bias, stride=(2, 4, 4)).flatten(2).mT
    model.blocks, model.norm = torch.nn.ModuleList(), torch.nn.Identity()
    torch.testing.assert_close(model(clips) - positions((2, 2, 2), 24), by_convolution)


def test_what_is_masked_has_no_influence_and_order_does_not_matter() -> None:
    model, images = made(), torch.randn(2, 3, 12, 8)
    keep = torch.tensor([[4, 0, 3], [1, 2, 5]])
    base = model(images, keep)
    changed = images.clone()
    changed[0, :, :4, 4:] = 9.0  # patch 1 of the first image, which it does not see
    torch.testing.assert_close(model(changed, keep), base)
    changed[1] = changed[0]
    assert not torch.allclose(model(changed, keep)[1], base[1])
    torch.testing.assert_close(model(images, keep.flip(1)), base.flip(1))
    everything = torch.arange(6).expand(2, -1)
    torch.testing.assert_close(model(images, everything), model(images))


def test_places_are_told_apart() -> None:
    """Where a patch is decides what becomes of it, along every axis."""
    where = positions((3, 4, 5), 36)
    assert where.shape == (60, 36)
    apart = torch.cdist(where, where) + 10 * torch.eye(60)
    assert apart.min() > 0.1
    near, far = (where[0] - where[1]).norm(), (where[0] - where[4]).norm()
    assert near < far


def test_smaller_images_are_stretched_over_the_same_grid() -> None:
    """Two positions of a grid of 2 lie in the middle of pairs of positions of a grid of 4."""
    coarse = positions((2, 1), 8, base=(4, 1))
    halves = torch.tensor([0.5, 2.5])
    speed = 10000.0 ** -(torch.arange(2) / 2)
    torch.testing.assert_close(coarse[:, :2], torch.sin(halves[:, None] * speed))
    model = made((16, 16))
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 4, 24)


def test_the_class_token_stands_first_and_is_learned() -> None:
    model, images = made(class_token=True), torch.randn(2, 3, 12, 8)
    out = model(images)
    assert out.shape == (2, 7, 24)
    out[:, 0].square().sum().backward()
    assert model.class_token.grad.abs().sum() > 0


def test_images_that_no_patches_fill_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 13 x 8 cannot be cut into patches of 4 x 4"):
        made((13, 8))
    with pytest.raises(ValueError, match=r"cannot be cut .* the model's patch"):
        made()(torch.randn(1, 3, 12, 10))
