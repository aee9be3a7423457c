"""Self Forcing: a student draws its own films, a critic learns them, and the teacher stays."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from models.worlds.video.config import DiffusionForcingConfig, FilmTransformerConfig
from models.worlds.video.schedules import ddim_levels, noised, told_apart
from models.worlds.video.self_forcing import SelfForcing
from tests.helpers import SMALL_FORCED, SMALL_PINFALL, SMALL_WORLD, train
from tests.models.test_film_transformer import FRESH, WINDOW, clip, drawn
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.recipes import self_forcing
from training.worlds import open_world


def forced() -> SelfForcing:
    layers = FilmTransformerConfig(12, 4, 2, window=WINDOW, time_every=2)
    config = DiffusionForcingConfig(
        channels=3,
        image_size=8,
        actions=3,
        steps=3,
        outcome_width=4,
        fresh=True,
        transformer=layers,
    )
    return drawn(SelfForcing(config))  # type: ignore[return-value]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(FRESH + seed))


def test_films_are_those_that_the_student_dreams_when_it_is_played() -> None:
    model, (frames, actions), episodes = forced(), clip(8), torch.tensor([3, 8])
    student, before = model.student, torch.nn.functional.pad(actions, (1, 0), value=3)
    memory = student.init_cache(frames[:, :4], actions[:, :3], episodes, seed=5)
    told, noise = [], []
    for t in range(4):
        noise.append(student.noise(memory))
        frame, memory = student.step(memory, actions[:, 3 + t])
        told.append(frame)
    film = model.roll(frames[:, :4] * 2 - 1, before, torch.stack(noise, dim=1), last=2)
    torch.testing.assert_close((film + 1) / 2, torch.stack(told, dim=1), atol=1e-4, rtol=1e-4)


def test_a_gradient_flows_through_the_last_step_of_a_frame_alone() -> None:
    """What is told at an earlier step is the same number whatever follows from it."""
    model, (frames, actions) = forced(), clip(6)
    before, seen = torch.nn.functional.pad(actions, (1, 0), value=3), frames[:, :4] * 2 - 1
    noise, student = numbers(2, 2, 3, 3, 8, 8), model.student
    for last in (0, 1, 2):
        model.zero_grad()
        film = model.roll(seen, before, noise, last)
        film.sum().backward()
        found = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        model.zero_grad()
        with torch.no_grad():
            cache = student.show(seen, before[:, :4], seen, None)
        total = torch.zeros(())
        for frame in range(2):
            done, z = before[:, 4 + frame, None], noise[:, frame, :1].clamp(-6, 6)
            for step, (now, then) in enumerate(pairwise(ddim_levels(3))):
                level, abar = torch.full((2, 1), now), student.abar
                clean = told_apart(z, student(z, level, done, cache)[0], abar[now])[0].clamp(-1, 1)
                if step == last:
                    break
                z = noised(clean, noise[:, frame, step + 1, None].clamp(-6, 6), abar[then]).detach()
            total = total + clean.sum()
            with torch.no_grad():
                cache = student.show(clean.detach(), done, clean, cache)
        total.backward()
        wanted = [p.grad for p in student.parameters() if p.grad is not None]
        assert len(found) == len(wanted) > 0
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert not model.roll(seen, before, noise, 2).requires_grad


def test_the_students_gradient_points_from_what_the_critic_sees_to_what_the_teacher_sees() -> None:
    model, (frames, actions) = forced(), clip(6)
    before, seen = torch.nn.functional.pad(actions, (1, 0), value=3), frames[:, :4] * 2 - 1
    film, eps = numbers(2, 2, 3, 8, 8).requires_grad_(), numbers(2, 2, 3, 8, 8, seed=1)
    level = torch.tensor([300, 700])
    model.match(seen, film, before, level, eps).backward()
    for i in range(2):
        abar = model.teacher.abar[level[i]]
        x_k = noised(film.detach()[i : i + 1], eps[i : i + 1], abar)
        clean = {}
        for name in ("teacher", "critic"):
            by = getattr(model, name)
            label = by.config.stabilise - 1
            x = torch.cat([seen[i : i + 1] * by.abar[label].sqrt(), x_k], dim=1)
            levels = torch.tensor([[label] * 4 + [int(level[i])] * 2])
            v = by(x, levels, before[i : i + 1])[0][:, 4:]
            clean[name] = told_apart(x_k, v, abar)[0]
        size = (film[i] - clean["teacher"][0]).abs().mean()
        wanted = (clean["critic"] - clean["teacher"])[0] / size / film.numel()
        torch.testing.assert_close(film.grad[i], wanted.detach(), atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in model.parameters())
    model.begin()  # the critic is as the teacher is: there is nowhere to go
    film.grad = None
    model.match(seen, film, before, level, eps).backward()
    assert film.grad.abs().max() == 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("teachers")
    done = train(
        runs, *SMALL_PINFALL["diffusion_forcing"], *SMALL_WORLD, "loop.steps=2", "run=x",
        "optim.lr=0.05",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return next(runs.glob("*/*/x"))


def recipe(*overrides: str) -> self_forcing.SelfForcingTraining:
    return self_forcing.build(
        compose([*SMALL_FORCED, *overrides]), Processes(), torch.device("cpu")
    )


def test_critic_and_student_learn_in_turn_and_the_teacher_never(teacher: Path) -> None:
    made = recipe(f"recipe.teacher={teacher}", "recipe.critic_steps=2", "optim.ema_decay=null")
    names = ("student", "critic", "teacher")
    own = open_world(teacher).model.state_dict()
    for name in names:
        given = getattr(made.model, name).state_dict()
        assert all(torch.equal(given[k], v) for k, v in own.items())
    moved = []
    for step in range(6):
        before = {n: {k: p.clone() for k, p in getattr(made.model, n).named_parameters()}
                  for n in names}  # fmt: skip
        metrics = made.step(made.data.batch(step))
        moved.append({
            n for n in names
            for k, p in getattr(made.model, n).named_parameters()
            if k.startswith("network") and not torch.equal(p, before[n][k])
        })  # fmt: skip
        assert ("train/student" in metrics) == (step % 3 == 2)
    assert moved == [{"critic"}, {"critic"}, {"student"}] * 2


def test_a_run_leaves_the_student_as_a_world_that_can_be_played(
    teacher: Path, tmp_path: Path
) -> None:
    done = train(tmp_path, *SMALL_FORCED, f"recipe.teacher={teacher}", "loop.steps=6", "run=x")
    assert done.returncode == 0, done.stderr[-3000:]
    directory = next(tmp_path.glob("*/*/x"))
    world = open_world(directory)
    config = world.model.config  # type: ignore[attr-defined]
    assert config.name == "diffusion_forcing" and config.fresh and config.steps == 2
    metrics = json.loads((directory / "results.json").read_text())["metrics"]
    rows = [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {"train/student", "train/critic"} <= rows[0].keys(), "some steps have the one, some both"
    assert {"eval/over_copy/5", "eval/teacher/over_copy/5", "eval/teacher_few/over_copy/5"} <= {
        *metrics
    }
    start = world.start(0, torch.device("cpu"))
    cache = world.model.init_cache(start.frames, start.actions, torch.zeros(1, dtype=torch.long))
    frame, _ = world.model.step(cache, torch.ones(1, dtype=torch.long))
    assert frame.shape == (1, 3, 16, 16)


def test_what_cannot_be_is_refused(teacher: Path, tmp_path: Path) -> None:
    for overrides, says in (
        ([], r"recipe\.teacher=null: name the directory"),
        (["recipe.teacher=nowhere"], r"recipe\.teacher=nowhere: there is no such directory"),
        (
            [f"recipe.teacher={teacher}", "model.transformer.dim=24"],
            r"has model\.transformer=.*'dim': 12.*give the student the teacher's",
        ),
        ([f"recipe.teacher={teacher}", "model.patch=8"], r"has model\.patch=2, the student 8"),
        (["recipe.critic_steps=0"], r"recipe\.critic_steps=0"),
    ):
        with pytest.raises(UserError, match=says):
            recipe(*overrides)
