"""Pinfall: its rules, its clips byte for byte, what is read off a frame, and a judge of dreams."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training.data.config_worlds import PinfallConfig, Split, Variant
from training.data.pinfall import Clips, PinfallData, windows
from training.envs import pinfall
from training.envs.pinfall import (
    PLATE,
    PLATE_HALF,
    SIZE,
    STRIDE,
    State,
    frame_of,
    oracle,
    see,
    serve,
    step,
)
from training.evaluation import dreams
from training.evaluation.dream_physics import Exam, half_life
from training.evaluation.dreams import AGAIN, forked, judge, shortest
from training.evaluation.pinfall import first_turn, parse, ssim, turned
from training.evaluation.stub_worlds import (
    ConstantVelocity,
    CopyLast,
    MeanFrame,
    Retrieval,
    Simulator,
)

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def data(variant: Variant = Variant.paddle, seed: int = FRESH, **changes: object) -> PinfallData:
    sizes = {"worlds": 32, "batch_size": 8}
    return PinfallData(PinfallConfig(variant=variant, **(sizes | changes)), seed=seed)  # type: ignore[arg-type]


def frames_of(clips: Clips, variant: Variant, size: int = 32) -> torch.Tensor:
    return see({k: torch.from_numpy(v) for k, v in clips._asdict().items()}, variant, size)


def begun(variant: Variant, n: int = 64, split: Split = Split.shown) -> State:
    return serve(np.random.default_rng(FRESH), n, variant, split)


def test_a_hit_is_worth_one_and_a_miss_ends_it() -> None:
    """Whoever knows where the ball lands never misses; whoever does nothing mostly does."""
    for act, most in (
        (lambda s: oracle(s, Variant.paddle), True),
        (lambda s: 1 + 0 * s.hang, False),
    ):
        state, hits, ends = (
            begun(Variant.paddle),
            torch.zeros(64),
            torch.zeros(64, dtype=torch.bool),
        )
        for _ in range(120):
            after, reward, end = step(state, act(state), Variant.paddle)
            turned = (state.v[:, 0, 1] > 0) & (after.v[:, 0, 1] < 0)
            low = after.x[:, 0, 1] > SIZE / 2
            live = ~ends
            assert torch.equal((reward > 0)[live], (turned & low)[live]), "hits turn a ball upwards"
            assert torch.equal((reward < 0)[live], end[live])
            assert (
                after.x[end & live][:, 0, 1] + after.radius[end & live][:, 0] > pinfall.PLATE
            ).all()
            hits, ends, state = hits + (reward > 0) * live, ends | end, after
        early = ends.float().mean()
        assert (hits.mean() > 1.5 and early < 0.2) if most else (hits.mean() < 1 and early > 0.5)


def test_the_paddle_moves_by_its_stride_and_stops_at_the_frame() -> None:
    state = begun(Variant.paddle)
    for action in (0, 1, 2):
        after = step(state, torch.full((64,), action), Variant.paddle).state
        told = (state.plate + STRIDE * (action - 1)).clamp(PLATE_HALF, SIZE - PLATE_HALF)
        assert torch.equal(after.plate, told)
    with pytest.raises(ValueError, match=r"actions are 0 \(left\), 1 \(stay\), 2 \(right\): .*3"):
        step(state, torch.full((64,), 3), Variant.paddle)


@pytest.mark.parametrize("variant", [v for v in Variant if v != Variant.fork])
def test_a_ball_has_met_something_where_it_is_not_where_it_would_have_flown(
    variant: Variant,
) -> None:
    clips = data(variant, worlds=128, length=40).draw_round(0)[0]
    gravity = frame_of(variant).gravity
    x, v = torch.from_numpy(clips.x), torch.from_numpy(clips.v)
    free = x[:, :-1] + v[:, :-1] + torch.tensor([0.0, gravity / 2])
    going = torch.from_numpy(~clips.begins & ~clips.ends)[..., None]
    away = ((x[:, 1:] - free).abs().amax(-1) > 1e-2) & going
    met = turned(v, gravity) & going
    assert away.sum() > 100 and met[away].float().mean() > 0.99
    assert away[met].float().mean() > 0.9, "what was met as the frame ended is not seen yet"


def test_whoever_acts_before_a_fork_does_not_know_either() -> None:
    """Nor in worlds that are served again after a ball was lost."""
    made = data(Variant.fork, length=64, hang=8, seq_len=4, worlds=2048)
    clips = made.draw_round(0)[0]
    hangs, side = clips.hang[:, :-1] > 0, np.sign(clips.v[:, :-1, 0, 0])
    moved = np.diff(clips.plate, axis=1)
    apart = moved[hangs & (side > 0)].mean() - moved[hangs & (side < 0)].mean()
    assert abs(apart) < 0.25 and hangs.sum() > 5000
    again = np.argwhere(clips.begins)
    assert len(again) > 100, "some were lost"
    assert (clips.hang[again[:, 0], again[:, 1] + 1] == 7).all()


def test_before_a_fork_nothing_says_where_the_ball_will_go() -> None:
    hang = 6
    state = serve(np.random.default_rng(FRESH), 512, Variant.fork, Split.shown, hang)
    parts = {name: getattr(state, name) for name in ("x", "radius", "hue")}
    for _ in range(hang - 1):
        state = step(state, torch.ones(512, dtype=torch.long), Variant.fork).state
        assert torch.equal(state.x, parts["x"])
    left = state.v[:, 0, 0] < 0
    assert 0.4 < left.double().mean() < 0.6
    for _ in range(4):
        state = step(state, torch.ones(512, dtype=torch.long), Variant.fork).state
    assert torch.equal(state.x[:, 0, 0] < SIZE / 2, left)


def test_splits_hold_other_balls() -> None:
    shown, fast, large, pairs = (begun(Variant.paddle, 3000, split) for split in Split)
    pace = [state.v.norm(dim=-1) for state in (shown, fast)]
    assert pace[0].max() < 1.6 < 1.8 <= pace[1].min()
    assert shown.radius.max() < 2.25 < 2.75 <= large.radius.min()
    low, high = pinfall.SPEEDS

    def kinds(state: State) -> set[tuple[int, int]]:
        band = ((state.v.norm(dim=-1) - low) / (high - low) * pinfall.BANDS).long()
        return set(zip(state.hue[:, 0].tolist(), band[:, 0].tolist(), strict=True))

    known, new = kinds(shown), kinds(pairs)
    assert not known & new and len(known | new) == 18
    assert {hue for hue, _ in new} == {hue for hue, _ in known} == set(range(6))
    assert {band for _, band in new} == {band for _, band in known} == {0, 1, 2}


@pytest.mark.parametrize("variant", list(Variant))
def test_windows_hold_no_new_beginning_and_the_simulator_goes_on_as_they_do(
    variant: Variant,
) -> None:
    made = data(variant, seq_len=9)
    batch = Clips(**made.batch(3))
    assert batch.x.shape == (8, 9, 1 if variant != Variant.collide else 3, 2)
    assert not batch.begins.any()
    state = batch.state(0)
    for t in range(8):
        state, reward, end = step(state, torch.from_numpy(batch.actions[:, t]), variant)
        np.testing.assert_allclose(state.x, batch.x[:, t + 1], atol=1e-3)
        np.testing.assert_array_equal(end, batch.ends[:, t])
        np.testing.assert_array_equal(reward, batch.rewards[:, t])


def test_a_batch_is_the_same_bytes_for_one_seed_and_the_parts_of_processes_are_it() -> None:
    def digest(made: PinfallData, at: int) -> str:
        clips = Clips(**made.batch(at))
        seen = frames_of(clips, Variant.paddle)
        return hashlib.sha256((seen * 255).byte().numpy().tobytes()).hexdigest()

    assert digest(data(seed=3), 5) == digest(data(seed=3), 5)
    assert len({digest(data(seed=3), 5), digest(data(seed=3), 6), digest(data(seed=4), 5)}) == 3
    config = PinfallConfig(worlds=32, batch_size=8)
    parts = [PinfallData(config, seed=3, rank=i, world=2).batch(5)["x"] for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), data(seed=3).batch(5)["x"])


def test_windows_are_all_that_no_beginning_lies_in() -> None:
    begins = np.array([[False, False, True, False, False]])
    assert windows(begins, 3).tolist() == [[0, 0], [0, 3]]


@pytest.mark.parametrize("size", [32, 64])
def test_what_is_read_off_a_frame_is_the_state(size: int) -> None:
    for variant in (Variant.paddle, Variant.collide):
        clips = data(variant).heldout(32, 6)
        hue = torch.from_numpy(clips.hue[:, 0])
        read = parse(frames_of(clips, variant, size), hue)
        apart = torch.cdist(torch.from_numpy(clips.x), torch.from_numpy(clips.x)) + 99 * torch.eye(
            clips.x.shape[2]
        )
        reach = (
            torch.from_numpy(clips.radius)[..., None] + torch.from_numpy(clips.radius)[:, :, None]
        )
        free = (apart > reach + 1.5).all(-1)  # hues of balls that touch are mixed
        if variant == Variant.paddle:  # so is a ball's with the paddle's white
            free &= torch.from_numpy(clips.x[..., 1] + clips.radius) < PLATE
        off = (read.ball - torch.from_numpy(clips.x)).norm(dim=-1)
        assert off[free].max() < 0.15
        area = read.area / (torch.pi * torch.from_numpy(clips.radius).square())
        assert (area[free] - 1).abs().max() < 0.15
        if variant == Variant.paddle:
            assert (read.plate - torch.from_numpy(clips.plate)).abs().max() < 0.15


def test_the_first_turn_is_found_between_frames() -> None:
    rng = np.random.default_rng(FRESH)
    when, speed = rng.uniform(2.1, 6.9, 500), rng.uniform(0.5, 2, 500)
    time = np.arange(10)
    x = 20 - speed[:, None] * np.abs(time - when[:, None])
    path = torch.from_numpy(np.stack([x, np.full_like(x, 3.0)], axis=-1))
    np.testing.assert_allclose(first_turn(path), when, atol=1.0)
    inside = np.abs(when - when.round()) > 0.3
    assert np.median(np.abs(first_turn(path).numpy() - when)[inside]) < 0.4
    assert first_turn(path[:, :, 1:].expand(-1, -1, 2)).isinf().all()


def exam(variant: Variant = Variant.paddle, context: int = 4, ahead: int = 22) -> Exam:
    clips = data(variant, seed=FRESH % 100).heldout(48, context + ahead)
    return Exam(clips, frames_of(clips, variant), context, variant)


def passes(found: dict[str, float]) -> dict[str, bool]:
    """What a world model has to do (experiments/diamond/claims.yaml)."""
    return {
        "state": all(found[f"over_copy/{h}"] <= 0.35 for h in (5, 10, 20)),
        "bounce": all(
            found[f"bounced/error/{h}"] < found[f"bounced/straight/{h}"] for h in (10, 20)
        ),
        "action": 0.8 <= found["separation"] <= 1.2 and found["delta_psnr"] >= 2,
        "physics": found["alive/20"] >= 0.9 and found["energy_drift"] <= 0.15,
        "turns": found["turns_in_time"] >= 0.8,
    }


def test_the_judge_passes_the_world_itself_and_none_that_know_nothing() -> None:
    given = exam()
    hue = torch.from_numpy(given.clips.hue[:, 0])
    bank = data(seed=1).bank(200, 26)
    world = Simulator(given.clips.state(3), Variant.paddle, 32, 4)
    found, series, told = judge(world, given)
    assert all(passes(found).values()), found
    assert found["error/20"] == pytest.approx(found["parser/20"], abs=0.02), "the parser's floor"
    assert told.shape == (48, 22, 3, 32, 32) and len(series["error"]) == 22
    stubs = {
        "copy": CopyLast(),
        "mean": MeanFrame(given.frames),
        "straight": ConstantVelocity(Variant.paddle, hue, 32),
        "retrieval": Retrieval(frames_of(bank, Variant.paddle), 4),
    }
    for name, stub in stubs.items():
        verdict = passes(judge(stub, given)[0])
        assert not verdict["state"] and not verdict["action"], (name, verdict)
        assert not all((verdict["physics"], verdict["turns"])), (name, verdict)
    copied = judge(CopyLast(), given)[0]
    assert copied["over_copy/20"] == pytest.approx(1, abs=0.02)
    assert copied["psnr_over_copy/20"] == 0 and copied["separation"] == 0


def test_whoever_tosses_a_coin_at_the_fork_is_told_from_who_does_not() -> None:
    def draw(state: State) -> torch.Tensor:
        return see(state._asdict(), Variant.fork, 32).float()

    hang, count = 5, 100
    state = serve(np.random.default_rng(0), count, Variant.fork, Split.shown, hang)
    for _ in range(hang - 1):
        state = step(state, torch.ones(count, dtype=torch.long), Variant.fork).state
    state = State(*(part.repeat_interleave(AGAIN, dim=0) for part in state))
    tossed = torch.rand(len(state.v), 1, generator=torch.Generator().manual_seed(0)) < 0.5
    either = state.v.clone()
    either[..., 0] *= torch.where(tossed, -1, 1)
    one_way = state.v.clone()
    one_way[..., 0] = one_way[..., 0].abs()
    down = state.v * torch.tensor([0.0, 1.0])

    class Both(Simulator):
        """Half of the one and half of the other, as the least square would have it."""

        def init_cache(self, frames, actions, episodes, seed=0):
            assert torch.equal(frames[:, 0], frames[:, -1]) and frames.shape[1] == hang
            return super().init_cache(frames, actions, episodes, seed)

        def step(self, cache, action):
            frame, cache = super().step(cache, action)
            return (frame + frame.flip(-1)) / 2, cache

    cpu = torch.device("cpu")
    found = {
        name: forked(kind(state._replace(v=v), Variant.fork, 32, hang), draw, count, cpu, hang)
        for name, v, kind in (
            ("true", either, Simulator), ("fixed", state.v, Simulator),
            ("right", one_way, Simulator), ("down", down, Simulator), ("both", either, Both),
        )
    }  # fmt: skip
    assert found["true"]["fork/decided"] == 1 and found["true"]["fork/uneven"] < 0.1
    assert found["true"]["fork/alike"] == pytest.approx(0.5, abs=0.05)
    assert found["fixed"]["fork/uneven"] < 0.2, "by chance of the beginnings, even"
    assert found["fixed"]["fork/alike"] == found["right"]["fork/alike"] == 1
    assert found["right"]["fork/left"] == 0 and found["right"]["fork/uneven"] == 0.5
    assert found["down"]["fork/decided"] == found["both"]["fork/decided"] == 0


@pytest.mark.parametrize("forgets", [True, False])
def test_a_dream_that_hoards_is_told_from_one_that_forgets(
    monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    """By a clock of its own: a step takes as long as there are frames remembered."""
    now = 0.0
    monkeypatch.setattr(dreams.time, "perf_counter", lambda: now)

    class Keeps:
        context, config = 4, SimpleNamespace(transformer=SimpleNamespace(window=6, sinks=2))

        def init_cache(self, frames, actions, episodes, seed=0):
            return tuple(frames[0])

        def step(self, cache, action):
            nonlocal now
            now += len(cache)
            return cache[-1][None], (cache[-7:] if forgets else cache) + (cache[-1],)

    least = shortest(Keeps.config)
    assert least == 8 + 2 * dreams.TIMED
    found = dreams.endurance(Keeps(), exam(), least + 300)
    assert found["endured"] == least + 300
    if forgets:
        assert found["late_over_early"] == found["memory_growth"] == 1
    else:
        assert found["late_over_early"] > 5 and found["memory_growth"] > 20


def test_a_dream_in_which_balls_vanish_or_double_is_not_alive() -> None:
    given = exam(ahead=8)

    class Changed(Simulator):
        def step(self, cache, action):
            frame, cache = super().step(cache, action)
            return self.change(frame), cache

    for change in (lambda x: x * 0, lambda x: torch.maximum(x, x.roll(9, 2).roll(9, 3))):
        world = Changed(given.clips.state(3), Variant.paddle, 32, 4)
        world.change = change  # type: ignore[attr-defined]
        assert judge(world, given)[0]["alive/5"] < 0.3
    world.change = lambda x: x  # type: ignore[attr-defined]
    assert judge(world, given)[0]["alive/5"] == 1


def test_what_hides_must_come_back_where_and_when_it_should() -> None:
    given = exam(Variant.occlude, ahead=40)
    start, size = given.clips.state(3), 32

    class Gone(Simulator):
        """What is once out of sight is out of mind: the ball is not drawn again."""

        def init_cache(self, *args):
            return super().init_cache(*args), torch.zeros(len(args[0]), dtype=torch.bool)

        def step(self, cache, action):
            frame, state = super().step(cache[0], action)
            seen = frame.amax(1) - frame.amin(1)
            gone = cache[1] | (seen.sum((1, 2)) < 0.5)
            grey = frame.amin(1, keepdim=True).expand_as(frame)
            return torch.where(gone[:, None, None, None], grey, frame), (state, gone)

    found = judge(Simulator(start, Variant.occlude, size, 4), given)[0]
    assert found["hidden"] > 0.1 and found["comes_back"] == 1
    assert judge(CopyLast(), given)[0]["comes_back"] < 0.3
    assert judge(Gone(start, Variant.occlude, size, 4), given)[0]["comes_back"] == 0


def test_momentum_is_kept_by_who_keeps_it() -> None:
    clips = data(Variant.collide, worlds=64).heldout(200, 15)
    given = Exam(clips, frames_of(clips, Variant.collide), 4, Variant.collide)
    state = clips.state(3)

    class Stops(Simulator):
        """Balls that meet each other stand still."""

        def step(self, cache, action):
            frame, after = super().step(cache, action)
            turned = ((after.v - cache.v).abs() > 1e-6).any(-1, keepdim=True)
            mass = after.radius.square()[..., None]
            lost = (mass * (after.v - cache.v)).sum(1, keepdim=True).norm(dim=-1, keepdim=True)
            met = turned & (lost < 1e-6)  # by a wall something is lost
            return frame, after._replace(v=torch.where(met, 0.0, after.v))

    found = {kind: judge(kind(state, Variant.collide, 32, 4), given)[0]["momentum"]
             for kind in (Simulator, Stops)}  # fmt: skip
    assert found[Simulator] < 0.06 and found[Stops] > 0.12


def test_half_life_is_when_half_of_the_dreams_are_a_radius_off() -> None:
    error = torch.arange(10.0).expand(4, 10).clone()
    error[3] = 0
    radius = torch.full((4, 12, 1), 2.5)
    assert half_life(error, radius) == 3 and half_life(0 * error, radius) == 10
    found = judge(Simulator(exam().clips.state(3), Variant.paddle, 32, 4), exam())[0]
    assert found["half_life"] == 22
    assert judge(CopyLast(), exam())[0]["half_life"] < 4


def test_structural_similarity_is_that_of_its_formula() -> None:
    """Window by window, as it is defined; 1 for a frame and itself."""
    rng = np.random.default_rng(FRESH)
    a, b = rng.random((2, 13, 13))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    told = []
    for i in range(3):
        for j in range(3):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            both = (window * (x - mx) * (y - my)).sum()
            told.append((2 * mx * my + 1e-4) * (2 * both + 9e-4)
                        / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))  # fmt: skip
    x, y = (torch.from_numpy(z)[None, None, None].expand(2, 4, 3, 13, 13) for z in (a, b))
    torch.testing.assert_close(ssim(x, y), torch.full((4,), np.mean(told), dtype=torch.float64))
    assert torch.allclose(ssim(x, x), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"length": 4}, r"data\.length=4.* at least data\.seq_len=5"),
        ({"noise": 1.5}, r"data\.noise=1\.5"),
        ({"image_size": 8}, r"data\.image_size=8"),
        ({"seq_len": 1}, r"data\.seq_len=1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        data(**changes)
