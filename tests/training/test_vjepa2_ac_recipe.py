"""Actions on a frozen encoder: causal by frames, nothing trained but the predictor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import SMALL_COLOURED_ROOMS, SMALL_FROZEN, SMALL_ROOM_CLIPS, as_recorded
from training.config import compose
from training.data.corpus import DataError
from training.distributed import Processes
from training.envs.two_rooms_rgb import CANVAS, move
from training.errors import UserError
from training.files import sha256
from training.pretrained import locate
from training.recipes import vjepa2_ac
from training.run import run, run_path
from training.run_directory import plain
from training.schema import identity


def recipe(*overrides: str) -> vjepa2_ac.VJEPA2ACTraining:
    config = compose([*SMALL_FROZEN, *overrides])
    return vjepa2_ac.build(config, Processes(), torch.device("cpu"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a predictor can be put on."""
    config = compose(
        [*SMALL_ROOM_CLIPS, f"runs_dir={tmp_path_factory.mktemp('runs')}", "loop.steps=3"]
    )
    run(config)
    return run_path(config)


def inputs(made: vjepa2_ac.VJEPA2ACTraining) -> tuple[torch.Tensor, ...]:
    n = len(made.model.mean)
    d = made.model.encoder.d
    return torch.randn(2, 3, n, d), torch.randn(2, 3, 10), torch.randn(2, 3, 2)


def test_frames_see_no_later_frame_and_all_of_their_own() -> None:
    made = recipe()
    model, (z, a, s) = made.model.requires_grad_(False), inputs(made)
    base = model.predictor(z, a, s)
    for part, changed in enumerate((z, a, s)):
        other = [x.clone() for x in (z, a, s)]
        other[part][:, 2:] += 1.0
        found = model.predictor(*other)
        torch.testing.assert_close(found[:, :2], base[:, :2])
        assert not torch.allclose(found[:, 2], base[:, 2]), changed.shape
    last = z.clone()
    last[:, 0, -1] += 1.0  # the last patch of the first frame
    found = model.predictor(last, a, s)
    assert not torch.allclose(found[:, 0, 0], base[:, 0, 0]), "patches of a frame see each other"


def test_a_rollout_is_its_steps() -> None:
    made = recipe()
    model, (z, a, s) = made.model.requires_grad_(False), inputs(made)
    whole = model.rollout(z[:, 0], a, s)
    known = [z[:, 0]]
    for t in range(3):
        told = model.predictor(torch.stack(known, dim=1), a[:, : t + 1], s[:, : t + 1])[:, -1]
        torch.testing.assert_close(told, whole[:, t])
        known.append(told)
    many = model.imagine(z[:, 0], *(x[:, None].expand(-1, 4, -1, -1) for x in (a, s)))
    torch.testing.assert_close(many[:, 3], whole, atol=1e-5, rtol=1e-5)


def test_states_are_where_actions_lead_with_nothing_in_the_way() -> None:
    made = recipe()
    start = torch.tensor([[60.0, 150.0]])
    raw = torch.rand(1, 15, 2) * 0.6 - 0.3
    blocks = torch.from_numpy(made.data.blocks(raw.numpy()))
    found = (made.world.guessed(start / CANVAS * 2 - 1, blocks) + 1) * CANVAS / 2
    position = start
    for i in range(15):
        if i % 5 == 0:
            torch.testing.assert_close(found[:, i // 5], position, atol=1e-3, rtol=1e-4)
        position = move(position, raw[:, i])


def test_only_the_predictor_is_trained() -> None:
    made = recipe()
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    for step in range(2):
        metrics = made.step(made.data.batch(step))
    changed = {
        name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed and all(name.startswith("predictor.") for name in changed)
    assert made.parameters == sum(p.numel() for p in made.model.predictor.parameters())
    found, _ = made.latents(made.trainer.to_device(made.data.batch(0)))
    assert found.predicted.shape[1] == 3 + 2 and float(metrics["train/pred"]) > 0
    torch.testing.assert_close(found.target[:, 3:], found.z[:, 1:3])


def test_the_encoder_of_a_run_is_taken_and_others_are_refused(encoder: Path, tmp_path) -> None:
    made = recipe(f"recipe.weights={encoder}")
    weights = vjepa2_ac.load_file(encoder / "model.safetensors")
    for name, p in made.model.encoder.named_parameters():
        assert torch.equal(p, weights[f"average.{name}"]), name
    assert made.model.encoder.grid == (1, 4, 4)
    metrics = made.evaluate(final=True)
    assert metrics["eval/oracle"] == 1.0 and {"eval/model", "eval/probe/rms"} <= metrics.keys()
    with pytest.raises(UserError, match=r"sees frames of 32 x 32 .*this run's are 64 x 64"):
        recipe(f"recipe.weights={encoder}", "data.image_size=64")
    broken = tmp_path / "broken"
    shutil.copytree(encoder, broken)
    name = next(name for name in weights if name.startswith("average."))
    for says, changed in (
        (r" of .* is not finite", {name: weights[name] * torch.nan}),
        (r" has nothing for .* says floats", {name: None}),
        (r" has torch.int32 .* says floats", {name: weights[name].int()}),
    ):
        parts = {k: x for k, x in {**weights, **changed}.items() if x is not None}
        save_file(parts, broken / "model.safetensors")
        with pytest.raises(UserError, match=says):
            recipe(f"recipe.weights={broken}")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        recipe(f"recipe.weights={broken}")
    config = json.loads((broken / "model.json").read_text())
    (broken / "model.json").write_text(json.dumps(config | {"patch": [2, 8, 8]}))
    with pytest.raises(UserError, match=r"tubelets of 2 frames|cannot be cut"):
        recipe(f"recipe.weights={broken}")
    for content in (
        {"name": "transformer", "vocab_size": 3}, [], config | {"dim": "wide"},
        config | {"heads": 0}, config | {"patch": {"t": 2}}, config | {"more": 1},
        config | {"dim": "${oc.env:COLUMNS,24}"},
    ):  # fmt: skip
        (broken / "model.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"no model of recipe=jepa_video_masked or recipe=lewm"):
            recipe(f"recipe.weights={broken}")


def test_so_is_that_of_a_world_model_without_its_class_token(tmp_path: Path) -> None:
    config = compose([*SMALL_COLOURED_ROOMS, f"runs_dir={tmp_path}", "loop.steps=2"])
    run(config)
    made = recipe(f"recipe.weights={run_path(config)}")
    weights = vjepa2_ac.load_file(run_path(config) / "model.safetensors")
    for name, p in made.model.encoder.named_parameters():
        assert torch.equal(p, weights[f"encoder.vit.{name}"]), name
    frames = made.world.film(made.trainer.to_device(made.data.batch(0)))
    z = made.model.encode(frames)
    assert z.shape == (8, 4, 16, 24)
    torch.testing.assert_close(z.mean(-1), torch.zeros(8, 4, 16), atol=1e-5, rtol=0)
    whole = made.model.encoder(frames.flatten(0, 1))
    assert whole.shape[1] == 17 and not torch.allclose(z[0, 0, 0], whole[0, 0])


def test_the_shipped_encoder_is_what_its_command_trains_and_knows_the_place() -> None:
    directory = locate("experiments/vjepa2_ac/encoder")
    lineage = json.loads((directory / "lineage.json").read_text())
    assert lineage["weights_sha256"] == sha256(directory / "model.safetensors")
    config = compose(lineage["command"].removeprefix("afferent train ").split())
    now = plain(identity(config))
    for part, recorded in lineage["configuration"].items():
        assert as_recorded(recorded, getattr(config, part)) == now[part], part
    assert (lineage["steps"], lineage["seed"]) == (config.loop.steps, config.seed)
    made = vjepa2_ac.build(
        compose(["experiment=vjepa2_ac/planning", "seed=12345", "recipe.probe_walks=128"]),
        Processes(),
        torch.device("cpu"),
    )
    assert made.recipe.weights == "experiments/vjepa2_ac/encoder"
    assert made.look()["eval/probe/rms"] < 10, "of 224 pixels"


def test_standardised_latents_have_mean_0_and_deviation_1_over_frames() -> None:
    made = recipe("model.standardise=true")
    z = made.model.encode(made.sample(torch.device("cpu"))).flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), atol=2e-3, rtol=0)
    moves = made.model.deviation > 2e-3  # what a corner shows never changes
    torch.testing.assert_close(z.std(0)[moves], torch.ones(int(moves.sum())), atol=2e-3, rtol=0)
    whole = made.sample(torch.device("cpu"))
    made.data = type(made.data)(made.data.config, seed=made.config.seed, rank=1, world=2)
    assert torch.equal(made.sample(torch.device("cpu")), whole), "every process has the same"
    made.step(made.data.batch(0))
    told, _ = made.latents(made.trainer.to_device(made.data.batch(1)))
    assert (told.predicted.mean(-1).abs() > 1e-2).any(), "predictions are not normed again"


def record(folder: Path, files: int = 4, **changes: np.ndarray) -> list[str]:
    """Trajectories whose actions are what they add to the state; overrides that read them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(files):
        states = rng.normal(0, 1, (12, 3)).astype(np.float32)
        content = {
            "frames": rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8),
            "states": states,
            "actions": np.diff(states, axis=0),
        }
        np.savez(folder / f"{i}.npz", **{**content, **changes})
    return [
        f"data.path={folder}", "data=trajectories", "data.action_dim=3", "data.state_dim=3",
        "data.seq_len=4", "data.skip=2", "recipe.policies=[]",
    ]  # fmt: skip


def test_recorded_trajectories_are_learned_from(tmp_path: Path) -> None:
    made = recipe(*record(tmp_path / "files"))
    batch = made.trainer.to_device(made.data.batch(3))
    assert batch["frames"].shape == (8, 4, 3, 32, 32) and batch["actions"].shape == (8, 3, 3)
    guessed = made.world.guessed(batch["states"][:, 0], batch["actions"])
    torch.testing.assert_close(guessed, batch["states"][:, :-1], atol=1e-5, rtol=1e-5)
    made.step(made.data.batch(0))
    metrics = made.evaluate(final=True)
    assert {"eval/action_use", "eval/error_over_last"} <= metrics.keys()
    again = recipe(*record(tmp_path / "others")).data.batch(3)
    assert all(np.array_equal(again[k], v.numpy()) for k, v in batch.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"actions": np.full((11, 3), np.nan)}, r"actions\[0\] is .nan.*: a number below 1e.06"),
        ({"actions": np.full((11, 3), 1e30)}, r"actions\[0\] is .1.*30.*: a number below"),
        ({"actions": np.zeros((33, 3))}, r"actions must be numbers \[11, 3\], .* \[33, 3\]"),
        ({"actions": np.full((11, 3), "up")}, r"actions must be numbers .* they are <U2"),
        (
            {"frames": np.zeros((12, 16, 16, 3), np.uint8)},
            r"frames must be uint8 .*data\.image",
        ),
        ({"frames": np.zeros((12, 32, 32, 3))}, r"they are float64 \[12, 32, 32, 3\]"),
        ({"states": np.zeros((12, 2))}, r"states must be numbers \[12, 3\], .* \[12, 2\]"),
        ({"actions": np.array([object()] * 11)}, r"cannot be read: Object arrays cannot"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(
    changes: dict[str, np.ndarray], says: str, tmp_path: Path
) -> None:
    overrides = record(tmp_path / "files")
    record(tmp_path / "others", files=1, **changes)
    (tmp_path / "others" / "0.npz").rename(tmp_path / "files" / "9.npz")  # the last one
    with pytest.raises(DataError, match=rf"9\.npz.*{says}"):
        recipe(*overrides)


def test_what_recorded_data_is_changes_with_any_number_in_any_file(tmp_path: Path) -> None:
    first, same, other = (
        recipe(*record(tmp_path / name), f"data.path={tmp_path / name}").data
        for name in ("first", "same", "other")
    )
    assert first.config.path != same.config.path
    with np.load(tmp_path / "other" / "3.npz") as content:
        changed = {name: content[name].copy() for name in content.files}
    changed["frames"][-1, -1, -1, -1] ^= 1
    np.savez(tmp_path / "other" / "3.npz", **changed)
    assert first.content_hash == same.content_hash != other.content_hash


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recipe.regularizer=sigreg", r"is frozen, set none and null"),
        ("recipe.planning.horizon=12", r"reach beyond recipe\.episode_steps=50: lower it to 10"),
        ("recipe.rollout_steps=4", r"recipe\.rollout_steps=4: .* frames has 3 steps"),
        ("data.path=nowhere", r"There is no key `data\.path`"),
        ("recipe.weights=nowhere", r"recipe\.weights=nowhere: there is no such directory"),
        ("data.image_size=30", r"data\.image_size=30 must be a multiple of 4"),
        ("model.predictor_heads=5", r"model\.predictor_heads=5 must divide"),
    ],
)
def test_what_cannot_be_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(override)
