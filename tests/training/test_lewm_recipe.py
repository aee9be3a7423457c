"""LeWorldModel: causal, blind to actions at first, the same whole or step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import SMALL_COLOURED_ROOMS
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.recipes import lewm


def recipe(*overrides: str) -> lewm.LeWMTraining:
    config = compose([*SMALL_COLOURED_ROOMS, *overrides])
    return lewm.build(config, Processes(), torch.device("cpu"))


def test_actions_have_no_influence_at_first_and_some_after_one_step() -> None:
    made = recipe()
    batch = made.trainer.to_device(made.data.batch(0))
    made.model.eval()
    z, actions = torch.randn(3, 3, 12), torch.randn(3, 3, 10, requires_grad=True)
    made.model.predictor(z, actions).sum().backward()
    assert actions.grad.abs().max() == 0
    made.step(made.data.batch(0))
    made.step(made.data.batch(1))
    made.model.eval()
    with torch.no_grad():
        told = made.model.predictor(z, actions)
        assert not torch.allclose(told, made.model.predictor(z, -actions))
    assert batch["actions"].shape == (8, 3, 10)


def trained() -> lewm.LeWMTraining:
    """After some steps, when actions count; no gradients any more."""
    made = recipe("optim.lr=1e-2")
    for step in range(3):
        made.step(made.data.batch(step))
    made.model.eval().requires_grad_(False)
    return made


def test_later_states_and_actions_never_change_earlier_predictions() -> None:
    model = trained().model
    z, actions = torch.randn(4, 3, 12), torch.randn(4, 3, 10)
    base = model.predictor(z, actions)
    later, other = z.clone(), actions.clone()
    later[:, 2:] += 1.0
    other[:, 2:] -= 1.0
    found = model.predictor(later, other)
    torch.testing.assert_close(found[:, :2], base[:, :2])
    assert not torch.allclose(found[:, 2], base[:, 2])


def test_a_rollout_is_its_steps_and_looks_back_no_further_than_the_history() -> None:
    model = trained().model
    z, actions = torch.randn(4, 12), torch.randn(4, 5, 10)
    whole = model.rollout(z, actions)
    states = [z]
    for t in range(5):
        seen = slice(max(0, t - 2), t + 1)
        known = torch.stack(states[seen], dim=1)
        states.append(model.predictor(known, actions[:, seen])[:, -1])
        torch.testing.assert_close(states[-1], whole[:, t])
    many = model.imagine(z, actions[:, None].expand(-1, 3, -1, -1))
    torch.testing.assert_close(many[:, 1], whole, atol=1e-5, rtol=1e-5)


def test_dropout_is_a_function_of_the_step() -> None:
    losses = []
    for _ in range(2):
        torch.rand(7)  # whatever was drawn before
        made = recipe("model.dropout=0.5")
        made.step(made.data.batch(0))
        losses.append(float(made.step(made.data.batch(1))["train/loss"]))
    assert losses[0] == losses[1]


def test_an_evaluation_plays_every_policy_and_leaves_the_model_alone(tmp_path: Path) -> None:
    made = recipe()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    metrics = made.evaluate(final=True)
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items())
    assert metrics["eval/oracle"] == 1.0
    assert metrics["eval/zero"] == pytest.approx(metrics["eval/at_start"])
    assert metrics["eval/true_dynamics"] >= metrics["eval/random"]
    assert {"eval/model", "eval/surprise/teleport", "eval/surprise/reversed"} <= metrics.keys()
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    assert "<svg" in (tmp_path / "figures" / "plans.svg").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recipe.regularizer=vc_idm", r"needs a network that tells actions"),
        ("data.image_size=30", r"model\.patch=8 must divide data\.image_size=30"),
        ("data.seq_len=6", r"its 5 states are more than the predictor looks back at"),
        ("recipe.planning.horizon=11", r"reach beyond recipe\.episode_steps=50: lower it to 10"),
        ("data.walk=21", r"data\.walk=21, data\.skip=5: .* a walk has 4; raise data\.walk"),
        ("recipe.goal_steps=93", r"recipe\.goal_steps=93 must be fewer than data\.walk=93"),
        ("recipe.policies=[greedy]", r"recipe\.policies=\['greedy'\] are unknown: use model"),
        ("model.dropout=1.0", r"model\.dropout=1\.0 must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(override)
