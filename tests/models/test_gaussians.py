"""Gaussians that grow and shrink: edits, density control, chains, poses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels import rasterize
from models.worlds.splats.density import densify
from models.worlds.splats.gaussian_splatting import exponential
from models.worlds.splats.gaussians import Edit, Gaussians, activated, begin, neighbour_distances
from models.worlds.splats.mcmc import DEAD, MOST_COPIES, relocate, shared_out, stir
from models.worlds.splats.ssim import ssim
from training.evaluation import images

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails


def some(n: int, seed: int = FRESH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = begin(
        torch.randn(n, 3, generator=generator), torch.rand(n, 3, generator=generator), 0.3, 1
    )
    first["quats"] = torch.randn(n, 4, generator=generator)
    first["opacities"] = torch.randn(n, generator=generator)
    return first


def held(n: int, capacity: int) -> Gaussians:
    found = Gaussians(capacity, 1)
    found.apply_edit(Edit(torch.zeros(0, dtype=torch.long), some(n)))
    return found


def test_rows_and_what_belongs_to_them_move_together_and_new_ones_begin_at_zero() -> None:
    gaussians, before = held(6, 10), some(6)
    moment = torch.arange(10.0)
    added = {name: x[:2] + 1 for name, x in before.items()}
    gaussians.apply_edit(Edit(torch.tensor([4, 0, 2]), added), [moment])
    assert gaussians.count == 5 and moment.tolist() == [4, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    for name, x in gaussians.fields().items():
        torch.testing.assert_close(x, torch.cat([before[name][[4, 0, 2]], added[name]]))
        assert (getattr(gaussians, name)[5:] == 0).all()
    with pytest.raises(ValueError, match="12 Gaussians, and room for 10"):
        gaussians.apply_edit(Edit(torch.arange(5), some(7)))


def test_the_first_ones_are_as_wide_as_their_neighbours_are_far() -> None:
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [50, 0, 0]])
    first = begin(points, torch.rand(5, 3), 0.25, 2, scale=0.5)
    assert first["scales"][0].exp().tolist() == pytest.approx(
        [0.5 * math.sqrt((1 + 4 + 9) / 3)] * 3
    )
    assert activated(first)["opacities"].tolist() == pytest.approx([0.25] * 5)
    assert first["shN"].shape == (5, 8, 3)
    many = torch.randn(300, 3)
    wanted = torch.cdist(many, many).sort(dim=1).values[:, 1:4]
    torch.testing.assert_close(neighbour_distances(many, 3), wanted, atol=1e-4, rtol=0)
    assert neighbour_distances(many[:1], 3).tolist() == [[1.0]]


def density(
    fields: dict[str, torch.Tensor], pull: torch.Tensor, room: int, **changes: object
) -> Edit:
    options = {"pull_least": 0.5, "small": 0.1, "opacity_least": 0.05, "largest": 2.0} | changes
    return densify(fields, pull, room, torch.Generator().manual_seed(1), **options)  # type: ignore[arg-type]


def test_what_is_pulled_is_cloned_if_small_and_halved_if_large() -> None:
    fields = some(4)
    fields["scales"] = torch.tensor([0.05, 0.05, 1.0, 1.0]).log()[:, None].repeat(1, 3)
    fields["opacities"] = torch.logit(torch.full((4,), 0.6))
    edit = density(fields, torch.tensor([1.0, 0.1, 1.0, 0.1]), 10)
    assert edit.stay.tolist() == [0, 1, 3]
    clone, *halves = range(3)
    torch.testing.assert_close(edit.new["means"][clone], fields["means"][0])
    torch.testing.assert_close(edit.new["scales"][halves].exp(), torch.full((2, 3), 1 / 1.6))
    assert (edit.new["means"][halves] != fields["means"][2]).all()
    torch.testing.assert_close(edit.new["opacities"], fields["opacities"][:3])
    revised = density(fields, torch.tensor([1.0, 0.1, 1.0, 0.1]), 10, revised=True).new
    left = 1 - revised["opacities"][halves].sigmoid()
    torch.testing.assert_close(left[0] * left[1], torch.tensor(0.4))


def test_halves_are_drawn_from_the_gaussian_that_they_replace() -> None:
    one = {name: x.repeat(4000, *[1] * (x.ndim - 1)) for name, x in some(1).items()}
    one["scales"] = torch.tensor([0.2, 0.5, 0.9]).log().repeat(4000, 1)
    one["opacities"] = torch.zeros(4000)
    drawn = density(one, torch.ones(4000), 9000).new["means"] - one["means"][0]
    R = torch.linalg.eigh(drawn.T @ drawn / len(drawn)).eigenvalues.sqrt()
    torch.testing.assert_close(R, torch.tensor([0.2, 0.5, 0.9]), rtol=0.05, atol=0)


def test_the_transparent_and_the_huge_go_and_room_is_for_the_most_pulled() -> None:
    fields = some(5)
    fields["scales"] = torch.tensor([0.05, 0.05, 0.05, 0.05, 3.0]).log()[:, None].repeat(1, 3)
    fields["opacities"] = torch.logit(torch.tensor([0.5, 0.5, 0.5, 0.01, 0.5]))
    edit = density(fields, torch.tensor([0.9, 2.0, 1.0, 9.0, 9.0]), 5)
    assert edit.stay.tolist() == [0, 1, 2]
    torch.testing.assert_close(edit.new["means"], fields["means"][[1, 2]])
    assert len(density(fields, torch.ones(5), 3).new["means"]) == 0


def image(count: int, opacity: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How much of a camera's image so many Gaussians of one place cover."""
    means, quats = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    K = torch.tensor([[[40.0, 0, 16], [0, 40, 16], [0, 0, 1]]])
    rows = (x.repeat(count, 1) for x in (means, quats, scale))
    shown = {"colors": torch.ones(count, 1), "width": 32, "height": 32}
    return rasterize(*rows, opacity.repeat(count), torch.eye(4)[None], K, **shown).alpha


def test_copies_cover_as_much_of_a_line_through_the_middle_as_the_one_did() -> None:
    """The sum is that along a line; of the whole image copies cover a little less or more."""
    for n in (2, 3, 8, 51):
        o, s = torch.tensor([0.9]), torch.tensor([[0.2, 0.2, 0.2]])
        each, scales = shared_out(o, s, torch.tensor([n]))
        assert (1 - (1 - each) ** n).item() == pytest.approx(0.9, abs=1e-5) or each.item() == DEAD

        before, after = image(1, o, s), image(n, each, scales)
        naive = image(n, o, s)
        line, own = after[0, 16].sum().item(), before[0, 16].sum().item()
        assert line == pytest.approx(own, rel=0.05), n  # faint copies end sooner, at 1/255
        assert (after - before).abs().mean() < 0.4 * (naive - before).abs().mean(), n


def test_the_sum_over_copies_is_the_plain_double_sum() -> None:
    rng = np.random.default_rng(FRESH)
    for n in (1, 2, 7, 30, MOST_COPIES):
        o = rng.uniform(0.05, 0.95)
        each = 1 - (1 - o) ** (1 / n)
        total = sum(
            math.comb(i - 1, k) * (-1) ** k * each ** (k + 1) / math.sqrt(k + 1)
            for i in range(1, n + 1)
            for k in range(i)
        )
        _, scales = shared_out(
            torch.tensor([o]).double(), torch.ones(1, 3).double(), torch.tensor([n])
        )
        assert scales[0, 0].item() == pytest.approx(o / total, rel=1e-7)


def test_the_dead_move_to_the_living_by_their_opacity() -> None:
    fields = some(1000)
    fields["opacities"] = torch.logit(torch.full((1000,), 0.001))
    fields["opacities"][:2] = torch.logit(torch.tensor([0.2, 0.8]))
    edit = relocate(fields, 1000, torch.Generator().manual_seed(FRESH))
    assert len(edit.stay) == 0  # all living ones were copied, and count as new
    places = [(edit.new["means"] == fields["means"][i]).all(1).sum().item() for i in (0, 1)]
    assert places == [MOST_COPIES, MOST_COPIES]
    fields["opacities"][2:] = 3.0
    edit = relocate(fields, 1100, torch.Generator().manual_seed(FRESH))
    assert len(edit.stay) + len(edit.new["means"]) == 1100
    still = relocate(fields, 1000, torch.Generator().manual_seed(FRESH))
    assert len(still.stay) == 1000 and len(still.new["means"]) == 0


def test_the_opaque_hardly_stir_and_others_along_their_own_shape() -> None:
    fields = {name: x.repeat(5000, *[1] * (x.ndim - 1)) for name, x in some(1).items()}
    fields["scales"] = torch.tensor([0.1, 0.3, 1.0]).log().repeat(5000, 1)
    generator = torch.Generator().manual_seed(FRESH)
    fields["opacities"] = torch.full((5000,), -12.0)
    moved = stir(fields, 2.0, generator) / torch.sigmoid(torch.tensor(0.5)) / 2
    spread = torch.linalg.eigh(moved.T @ moved / 5000).eigenvalues.sqrt()
    torch.testing.assert_close(spread, torch.tensor([0.01, 0.09, 1.0]), rtol=0.06, atol=0)
    fields["opacities"] = torch.full((5000,), 2.0)
    assert stir(fields, 2.0, generator).abs().max() < 1e-6


def test_poses_move_rigidly_and_not_at_all_at_first() -> None:
    twists = torch.randn(5, 6, dtype=torch.float64)
    moved = exponential(twists)
    R = moved[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand(5, 3, 3))
    assert (moved[:, 3] == torch.tensor([0.0, 0, 0, 1]).double()).all()
    torch.testing.assert_close(exponential(-twists) @ moved, torch.eye(4).double().expand(5, 4, 4))
    assert (exponential(0 * twists) == torch.eye(4).double()).all()
    straight = torch.cat([torch.tensor([[1.0, 2, 3]]), torch.zeros(1, 3)], dim=1)
    assert exponential(straight)[0, :3, 3].tolist() == [1, 2, 3]


def test_the_loss_is_the_metric_away_from_the_border() -> None:
    generator = torch.Generator().manual_seed(FRESH)
    x = torch.rand(2, 40, 40, 3, generator=generator)
    y = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    assert ssim(x, x).item() == pytest.approx(1)
    whole, inside = ssim(x, y).item(), images.ssim(x, y).mean().item()
    assert whole == pytest.approx(inside, abs=0.03) and 0 < whole < 0.99
    x.requires_grad_()
    ssim(x, y).backward()
    assert x.grad is not None and x.grad.isfinite().all()
