"""The torch step: schedule, accumulation, averaging, what each optimiser takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from training.distributed import Processes
from training.errors import UserError
from training.schedules import lr_scale, lr_table
from training.schema import OptimConfig, Optimiser, ScaleConfig, Schedule
from training.torch_step import TorchStep, split_parameters


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11))


def trainer(net: nn.Sequential, steps: int = 10, **optim) -> TorchStep:
    config = OptimConfig(**{"lr": 1e-2, "clip_norm": None, "schedule": Schedule.constant, **optim})
    return TorchStep(net, [net[1]], config, ScaleConfig(), Processes(), steps)


def batch(rows: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).integers(0, 11, (rows, 4))}


def loss_of(net: nn.Module):
    return lambda b: nn.functional.cross_entropy(net(b["x"]).flatten(0, 1), b["x"].flatten())


@pytest.mark.parametrize("optimiser", list(Optimiser))
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_changes_nothing_but_rounding(optimiser: Optimiser, parts: int) -> None:
    ends = []
    for accumulate in (1, parts):
        net = model().double()
        step = trainer(net, name=optimiser, accumulate=accumulate)
        for i in range(3):
            step.update(batch(seed=i), loss_of(net))
        ends.append(net)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        # Muon iterates in bfloat16, whatever the weights are.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 if optimiser == "adamw" else 2e-3)


def test_accumulation_that_does_not_divide_is_refused() -> None:
    net = model()
    with pytest.raises(UserError, match=r"optim\.accumulate=3 does not divide the 8 rows"):
        trainer(net, accumulate=3).update(batch(), loss_of(net))


def test_muon_takes_the_matrices_inside_blocks_only() -> None:
    net = model()
    matrices, tables, vectors = split_parameters(net, [net[1]])
    assert [id(p) for p in matrices] == [id(net[1].weight)]
    assert {id(p) for p in tables} == {id(net[0].weight), id(net[2].weight)}
    assert len(vectors) == 2


def test_clipping_bounds_the_update_and_reports_the_norm_before() -> None:
    net = model()
    reported = trainer(net, clip_norm=1e-3).update(batch(), loss_of(net))["opt/grad_norm"]
    other = model()
    loss_of(other)({"x": torch.from_numpy(batch()["x"])}).backward()
    expected = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
    torch.testing.assert_close(reported, expected)
    assert expected > 1e-3


def test_averaged_weights_are_swapped_in_and_out() -> None:
    net = model()
    step = trainer(net, ema_decay=0.5)
    first = net[1].weight.detach().clone()
    step.update(batch(), loss_of(net))
    live = net[1].weight.detach().clone()
    weight = 1 - min(0.5, 2 / 11)
    with step.averaged_weights():
        torch.testing.assert_close(net[1].weight.detach(), first + weight * (live - first))
    assert torch.equal(net[1].weight.detach(), live)


def test_state_before_the_first_step_loads_into_a_fresh_trainer() -> None:
    net, other = model(), model(1)
    a, b = trainer(net, name=Optimiser.muon), trainer(other, name=Optimiser.muon)
    for i in range(2):
        a.update(batch(seed=i), loss_of(net))
    b.load_state_dict(a.state_dict())
    for step, owner in ((a, net), (b, other)):
        step.update(batch(seed=5), loss_of(owner))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_schedules_warm_up_peak_at_one_and_end_at_the_ratio(schedule: Schedule) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=10, final_lr_ratio=0.1)
    table = lr_table(config, 100)
    np.testing.assert_allclose(table[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert table.max() == 1.0 and (np.diff(table[10:]) <= 0).all()
    end = 1.0 if schedule == Schedule.constant else 0.1
    assert lr_scale(config, 100, 100) == pytest.approx(end)
    if schedule == Schedule.wsd:
        assert (table[10:70] == 1.0).all() and table[80] < 1.0
    again = lr_table(replace(config, restart=0.4), 250)  # anew, after what was a whole of its own
    np.testing.assert_array_equal(again, [*lr_table(config, 100), *lr_table(config, 150)])
