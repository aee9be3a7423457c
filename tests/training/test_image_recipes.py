"""Image encoders: what their losses compare, what collapses, what nothing flows back from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.worlds.jepa.config import EncoderConfig, EncoderKind, LeJEPAConfig
from models.worlds.jepa.lejepa import LeJEPA
from tests.helpers import SMALL_BATCH, SMALL_IMAGES
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.recipes import ijepa, lejepa

RECIPES = {"lejepa": lejepa, "ijepa": ijepa}


def recipe(paper: str, *overrides: str):
    config = compose([*SMALL_IMAGES[paper], *SMALL_BATCH, *overrides])
    return RECIPES[paper].build(config, Processes(), torch.device("cpu"))


def test_views_that_agree_cost_nothing_and_the_mean_is_of_the_global_ones() -> None:
    torch.manual_seed(0)
    config = LeJEPAConfig(
        channels=1, image_size=16, projector=[8],
        encoder=EncoderConfig(kind=EncoderKind.vit, dim=12, depth=1),
    )  # fmt: skip
    model = LeJEPA(config)
    views, local = torch.randn(5, 2, 1, 16, 16), torch.randn(5, 3, 1, 8, 8)
    same = model(views[:, :1].expand(-1, 2, -1, -1, -1))
    assert (same.predicted - same.target).abs().max() < 1e-6
    found = model(views, local)
    assert found.z.shape == (5, 5, 8)
    centre = found.z[:, :2].mean(dim=1, keepdim=True)
    torch.testing.assert_close(found.target, centre.expand(-1, 5, -1))
    spread = (found.z[:, :2] - centre).square().mean()
    half = (found.z[:, 0] - found.z[:, 1]).square().mean() / 4
    torch.testing.assert_close(spread, half)


def test_an_average_is_of_the_other_views_and_gets_no_gradient() -> None:
    made = recipe("lejepa", "recipe.regularizer=ema")
    made.model.train()
    batch = made.trainer.to_device(made.data.batch(0))
    found, _ = made.latents(batch)
    kept = made.model.average(made.see(batch))
    torch.testing.assert_close(found.target, kept.flip(1), atol=1e-5, rtol=1e-5)
    made.loss(batch).backward()
    assert all(p.grad is None for p in made.model.average.parameters())
    with pytest.raises(UserError, match=r"data\.views\.count=1: an averaged target"):
        recipe("lejepa", "recipe.regularizer=ema", "data.views.count=1")


COARSE = "model.patch=[4,4]", "recipe.targets=1"


def masked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.randn(3, 1, 16, 16)
    context = torch.tensor([[0, 1, 5], [2, 3, 9], [4, 8, 12]])
    targets = torch.tensor([[[6, 7], [10, 11]], [[6, 7], [13, 14]], [[1, 2], [10, 11]]])
    return images, context, targets


def test_each_block_is_told_by_itself_from_the_context_alone() -> None:
    made = recipe("ijepa", *COARSE)
    images, context, targets = masked()
    base = made.model(images, [(context, targets)])
    assert base.predicted.shape == base.target.shape == (3, 4, 24)
    hidden = images.clone()
    hidden[0, :, 4:8, 8:] = 5.0  # patches 6 and 7 of the first image
    found = made.model(hidden, [(context, targets)])
    torch.testing.assert_close(found.predicted, base.predicted)
    assert not torch.allclose(found.target[0], base.target[0])
    moved = targets.clone()
    moved[:, 1] = torch.tensor([13, 15])
    found = made.model(images, [(context, moved)])
    torch.testing.assert_close(found.predicted[:, :2], base.predicted[:, :2])
    assert not torch.allclose(found.predicted[:, 2:], base.predicted[:, 2:])


def test_targets_are_normalised_latents_of_the_average_in_the_order_of_the_blocks() -> None:
    made = recipe("ijepa", *COARSE)
    images, context, targets = masked()
    for parameter in made.model.average.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    found = made.model(images, [(context, targets)])
    whole = made.model.average(images)
    whole = (whole - whole.mean(-1, keepdim=True)) / whole.std(-1, unbiased=False, keepdim=True)
    torch.testing.assert_close(found.target[1, 2:], whole[1, [13, 14]], atol=1e-4, rtol=1e-3)
    error = made.prediction_error(torch.tensor([0.0, 0.5]), torch.tensor([2.0, 0.0]))
    assert error.item() == pytest.approx((1.5 + 0.125) / 2), "smooth L1 with beta 1"


def test_what_spreads_latents_is_about_images_and_not_about_places() -> None:
    made = recipe("ijepa", *COARSE, "recipe.regularizer=vicreg", "recipe.target=ema")
    images, context, targets = masked()
    alike = made.model(images[:1].expand_as(images), [(context[:1].expand_as(context), targets)])
    different = made.model(images, [(context, targets)])
    assert different.z.shape == (3, 1, 24)
    spread = [made.regularize(latents, None)["std"].item() for latents in (alike, different)]
    assert spread[0] == pytest.approx(0.99, abs=1e-3) and spread[1] < spread[0] - 1e-3


def test_masks_are_drawn_anew_and_logged() -> None:
    made = recipe("ijepa")
    shares = [float(made.step(made.data.batch(i))["train/context_share"]) for i in range(4)]
    assert all(0.1 < share < 0.8 for share in shares) and len(set(shares)) > 1


@pytest.mark.parametrize("paper", RECIPES)
def test_probes_send_nothing_back_and_pictures_are_drawn(paper: str, tmp_path: Path) -> None:
    made = recipe(paper)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    metrics = made.evaluate(final=True)
    assert all(p.grad is None for p in made.model.parameters())
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name}: an evaluation changes no statistics"
    assert metrics["eval/chance"] < 0.2 < metrics["eval/pixels"]
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    drawn = {file.stem: file.read_text() for file in (tmp_path / "figures").glob("*.svg")}
    assert drawn.keys() == {"views", "neighbours", "latents"}
    assert all("<svg" in text for text in drawn.values())


def test_what_batches_are_normalised_by_is_exported_and_judged_with(tmp_path: Path) -> None:
    made = recipe("lejepa")
    made.step(made.data.batch(0))
    made.evaluate(final=True)
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    means = [name for name in weights if name.endswith("running_mean")]
    assert means and weights[means[0]].abs().sum() > 0
    fresh = LeJEPA(made.model_config)
    fresh.load_state_dict(weights)
    images = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(fresh.eval().embed(images), made.model.eval().embed(images))


@pytest.mark.slow
@pytest.mark.parametrize("paper", RECIPES)
def test_without_anything_against_it_the_encoder_collapses(paper: str) -> None:
    stds = {}
    for kind in ("none", "vicreg"):
        made = recipe(paper, f"recipe.regularizer={kind}", "loop.steps=150", "optim.lr=3e-3")
        for step in range(150):
            made.step(made.data.batch(step))
        stds[kind] = made.evaluate()["eval/std"]
        assert ("collapse" in str(made.alarm)) == (kind == "none"), (kind, made.alarm)
    assert stds["none"] < 0.05 < stds["vicreg"]


def test_batch_statistics_of_one_process_of_several_are_refused() -> None:
    config = compose([*SMALL_IMAGES["lejepa"], *SMALL_BATCH])
    with pytest.raises(UserError, match=r"2 processes .* cannot share its statistics: use one"):
        lejepa.build(config, Processes(rank=0, world=2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("paper", "override", "says"),
    [
        ("lejepa", "recipe.regularizer=vc_idm", r"tells actions, which recipe=lejepa has not"),
        ("lejepa", "data.views.local_count=2", r"sees images of one size, 16; use that, or kind="),
        ("lejepa", "model.encoder.heads=5", None),
        ("lejepa", "data.views.count=1", r"data\.views\.count=1, local_count=0: a view alone"),
        ("lejepa", "optim.accumulate=2", r"optim\.accumulate=2: .* set optim\.accumulate=1"),
        ("lejepa", "recipe.pred_weight=inf", r"recipe\.pred_weight=inf must be .* finite"),
        ("ijepa", "model.patch=[5,5]", r"model\.patch=\[5, 5\] .* divide data\.image_size=16"),
        ("ijepa", "data.views.count=2", r"data\.views\.count=2.*masks one view"),
        ("ijepa", "recipe.target_scale=[0.8,0.9]", r"leave no 4 of a grid of 8 x 8"),
        ("ijepa", "recipe.target_scale=[0.2,0.1]", r"recipe\.target_scale=\[0\.2, 0\.1\] must be"),
        ("lejepa", "data.views.area=[0,1]", r"data\.views\.area=\[0.*\] must be \[least, largest"),
    ],
)
def test_what_cannot_be_is_refused(paper: str, override: str, says: str | None) -> None:
    extra = ["data.views.local_size=8"] if "local_count" in override else []
    if says is None:  # heads matter to a transformer only
        recipe(paper, override, *extra)
        return
    with pytest.raises(UserError, match=says):
        recipe(paper, override, *extra)
