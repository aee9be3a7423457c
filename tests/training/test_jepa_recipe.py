"""Training of JEPAs: one switch, targets, collapse that is seen, several processes as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.worlds.jepa.targets import decay_at
from tests.helpers import SMALL_ROOMS as SMALL
from tests.helpers import train_one_and_two
from training.config import compose
from training.distributed import Processes
from training.errors import RunStopped, UserError
from training.recipes import jepa_planning
from training.run import run


def recipe(*overrides: str) -> jepa_planning.JEPAPlanningTraining:
    config = compose([*SMALL, *overrides])
    return jepa_planning.build(config, Processes(), torch.device("cpu"))


def test_gradients_go_where_the_target_says() -> None:
    """Through the target, unless it is a constant; never into an average."""
    gradients = {}
    for target in ("grad", "stopgrad"):
        made = recipe("recipe.regularizer=none", f"recipe.target={target}")
        made.loss(made.trainer.to_device(made.data.batch(0))).backward()
        gradients[target] = made.model.encoder.network.head[-1].weight.grad.clone()
    assert not torch.allclose(gradients["grad"], gradients["stopgrad"])
    made = recipe("recipe.regularizer=ema")
    made.loss(made.trainer.to_device(made.data.batch(0))).backward()
    assert all(p.grad is None for p in made.model.average.parameters())


def test_the_average_follows_the_encoder() -> None:
    made = recipe("recipe.regularizer=ema", "loop.steps=10")
    encoder, average = made.model.encoder, made.model.average
    name = "network.head.0.weight"
    before = average.get_parameter(name).clone()
    assert torch.equal(before, encoder.get_parameter(name)), "it begins as the encoder"
    made.step(made.data.batch(0))
    after, online = average.get_parameter(name), encoder.get_parameter(name)
    m = decay_at(1, 10, 0.996)
    assert m == pytest.approx(0.996 + 0.1 * 0.004)
    torch.testing.assert_close(after, m * before + (1 - m) * online)
    assert decay_at(10, 10, 0.9) == 1.0 and decay_at(0, 10, 0.9) == 0.9


def test_without_anything_against_it_the_encoder_collapses_and_the_alarm_says_so() -> None:
    """The same few steps with the hinge on the standard deviations do not."""
    stds = {}
    for kind in ("none", "vicreg"):
        made = recipe(f"recipe.regularizer={kind}", "loop.steps=150", "optim.lr=3e-3")
        for step in range(150):
            made.step(made.data.batch(step))
        stds[kind] = made.evaluate()["eval/std"]
        assert ("collapse" in str(made.alarm)) == (kind == "none"), (kind, made.alarm)
    assert stds["none"] < 0.05 < 0.5 < stds["vicreg"]


def test_a_collapse_can_end_the_run(tmp_path: Path) -> None:
    config = compose(
        [*SMALL, "recipe.regularizer=none", "recipe.stop_on_collapse=true", "loop.steps=300",
         "loop.eval_every=50", "optim.lr=3e-3", f"runs_dir={tmp_path}"]
    )  # fmt: skip
    with pytest.raises(RunStopped, match=r"collapse: .*recipe\.regularizer=vicreg"):
        run(config)


def test_probes_and_plans_send_nothing_back() -> None:
    made = recipe(
        "recipe.policies=[model]",
        "recipe.episodes=2",
        "recipe.episode_steps=4",
        "recipe.planning.horizon=4",
        "recipe.planning.replan=4",
    )
    before = [p.clone() for p in made.model.parameters()]
    made.evaluate(final=True)
    assert all(p.grad is None for p in made.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))


def test_a_run_leaves_pictures_of_what_it_imagines(tmp_path: Path) -> None:
    made = recipe(
        "recipe.policies=[model]",
        "recipe.episodes=3",
        "recipe.episode_steps=4",
        "recipe.planning.horizon=4",
        "recipe.planning.replan=4",
    )
    made.evaluate(final=True)
    (tmp_path / "figures").mkdir()  # as a run directory has it
    made.export(tmp_path)
    names = {"plans", "imagined", "distance_to_goal", "energy_of_actions"}
    assert {file.stem for file in (tmp_path / "figures").glob("*.svg")} == names
    assert all("<svg" in file.read_text() for file in (tmp_path / "figures").iterdir())
    assert (tmp_path / "model.safetensors").exists()


def test_later_frames_never_change_earlier_predictions() -> None:
    made = recipe()
    batch = made.trainer.to_device(made.data.batch(0))
    base, _ = made.latents(batch)
    changed = {**batch, "positions": batch["positions"].clone()}
    changed["positions"][:, 5:] = 10.0
    other, _ = made.latents(changed)
    assert torch.equal(base.predicted, other.predicted), "predicted from the first frame alone"
    assert torch.equal(base.z[:, :5], other.z[:, :5])
    later = {**batch, "actions": batch["actions"].clone()}
    later["actions"][:, 5:] *= -1
    other, _ = made.latents(later)
    assert torch.equal(base.predicted[:, :5], other.predicted[:, :5])
    assert not torch.equal(base.predicted[:, 5:], other.predicted[:, 5:])


def test_a_rollout_is_its_steps() -> None:
    for kind, norm in (("mlp", "none"), ("gru", "layer")):
        made = recipe(f"model.predictor.kind={kind}", f"model.encoder.norm={norm}")
        z, actions = torch.randn(3, 16), torch.randn(3, 5, 2)
        whole = made.model.rollout(z, actions)
        for i in range(5):
            z = made.model.rollout(z, actions[:, i : i + 1])[:, 0]
            torch.testing.assert_close(z, whole[:, i])
        many = made.model.imagine(whole[:, 0], actions[:, None].expand(-1, 4, -1, -1))
        torch.testing.assert_close(many[:, 2], made.model.rollout(whole[:, 0], actions))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vc_idm", "sigreg", "ema"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    """Statistics over half of a batch each would be other statistics."""
    sets = [part for part in SMALL if part != "report=false"]
    sets += [f"recipe.regularizer={kind}", "loop.steps=4", "loop.log_every=1", "report=false"]
    found = []
    for directory in train_one_and_two(tmp_path, *sets, "run=x"):
        found.append(json.loads((directory / "results.json").read_text())["metrics"])
        rows = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        found[-1] |= {f"{i}/{k}": v for i, row in enumerate(rows) for k, v in row.items()}
    one, two = found
    assert one.keys() == two.keys()
    for key in one:
        if "train/" in key or "grad_norm" in key or key in ("eval/std", "eval/probe/linear/px"):
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), key


def test_an_average_is_memory_but_is_not_trained() -> None:
    grad, ema = (
        jepa_planning.estimate(compose([SMALL[0], f"recipe.regularizer={kind}"]))
        for kind in ("vicreg", "ema")
    )
    assert grad.parameters == ema.parameters and grad.memory["weights"] == ema.memory["weights"]
    made = jepa_planning.build(
        compose([SMALL[0], "recipe.regularizer=ema"]), Processes(), torch.device("cpu")
    )
    average = sum(p.numel() for p in made.model.average.parameters())
    assert ema.memory["frozen weights"] == 4 * average and "frozen weights" not in grad.memory


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=transformer"], r"trains model=jepa"),
        (["recipe.std_weight=-1"], r"recipe\.std_weight=-1"),
        (["recipe.planning.elites=500"], r"recipe\.planning\.elites=500"),
        (["recipe.policies=[luck]"], r"recipe\.policies=\['luck'\]"),
        (["recipe.contacts=[]"], r"recipe\.contacts=\[\]: no episode is played"),
        (["recipe.planning.replan=99"], r"replan=99 must not be beyond recipe\.planning\.horizon="),
        (["model.image_size=65"], r"model\.image_size=65: the data decides it"),
        (["recipe.regularizer=ema", "recipe.target=grad"], r"recipe\.regularizer=ema"),
        (["model.encoder.channels=[]"], r"model\.encoder\.channels=\[\]"),
        (["optim=muon"], r"use optim=adamw"),
        (
            ["model.encoder.kind=vit", "model.encoder.heads=4", "model.encoder.patch=5"],
            r"encoder\.patch=5 must divide",
        ),
        (["regularizer=sigreg"], r"Did you mean recipe\.regularizer\?"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        jepa_planning.build(compose([SMALL[0], *overrides]), Processes(), torch.device("cpu"))
