"""What a world model dreams, beside what the simulator says: one judge for every model and stub.

A dream begins from frames that were seen and goes on by itself, with the actions that were really
taken. Its errors are those of the state that is read off its frames (pinfall.py), beside

    the last frame seen, over again           the floor that every error is divided by
    the ball going straight on                which is right until it meets something
    what is read off true frames              the least error that could be measured

The first two are worlds too (stub_worlds.py), and are judged by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.worlds.video.outcome import BEFORE, steps_of
from models.worlds.video.world import WorldModel
from training.data.config_worlds import Split, Variant
from training.envs.pinfall import (
    ACTIONS,
    PLATE_HALF,
    SIZE,
    STRIDE,
    State,
    frame_of,
    is_open,
    serve,
    step,
)
from training.evaluation.dream_physics import (
    Exam,
    alive,
    half_life,
    momentum,
    permanence,
    physics,
)
from training.evaluation.pinfall import (
    ALIVE,
    Parsed,
    foreground_psnr,
    parse,
    psnr,
    ssim,
    turned,
)

HORIZONS, FAR = (1, 5, 10, 20, 30), (5, 10, 20)
APART = 8  # frames of the same action, for what an action changes
FLOWN, ASIDE = 6, 2.0  # frames after a fork, and how far from the middle a ball is then
AGAIN = 8  # dreams of each beginning
CHUNK = 64  # dreams at once
TIMED, WARM = 40, 5  # frames whose latency is taken, and those before them


@torch.no_grad()
def dream(
    world: WorldModel,
    seen: Float[Tensor, "n c 3 s s"],
    actions: Int64[Tensor, "n c+h-1"],
    first: int = 0,
    seed: int = 0,
) -> Float[Tensor, "n h 3 s s"]:
    """The frames that follow, one for each action from the last of `seen` on.

    Args:
        first: number of the first episode; what noise there is depends on it.
    """
    context, parts = seen.shape[1], []
    for start in range(0, len(seen), CHUNK):
        rows = slice(start, start + CHUNK)
        episodes = first + torch.arange(len(seen), device=seen.device)[rows]
        cache = world.init_cache(seen[rows], actions[rows, : context - 1], episodes, seed)
        drawn = []
        for action in actions[rows, context - 1 :].unbind(1):
            frame, cache = world.step(cache, action)
            drawn.append(frame)
        parts.append(torch.stack(drawn, dim=1))
    return torch.cat(parts)


def judge(
    world: WorldModel, exam: Exam, steering: bool = True
) -> tuple[dict[str, float], dict[str, list[float]], Tensor]:
    """Errors of a dream by horizon, and what else is to be asked of one.

    Args:
        steering: ask, with more dreams, whether the paddle obeys.

    Returns:
        Metrics; series over the horizon; the dream.
    """
    clips, context, ahead = exam.clips, exam.context, exam.ahead
    device = exam.frames.device
    seen, truth = exam.frames[:, :context], exam.frames[:, context:]
    actions = torch.from_numpy(clips.actions).to(device)
    hue = torch.from_numpy(clips.hue[:, 0]).to(device)
    told = dream(world, seen, actions)
    read, true, begun = (parse(frames, hue) for frames in (told, truth, seen))
    x = torch.from_numpy(clips.x).to(device)
    ball, start = x[:, context:], x[:, context - 1 : context]

    def error(guess: Tensor) -> Tensor:
        return (guess - ball).norm(dim=-1).mean(-1)  # [n, h]

    steps = torch.arange(1, ahead + 1, device=device)[:, None, None]
    speed = (begun.ball[:, -1] - begun.ball[:, -2])[:, None]
    errors = {
        "error": error(read.ball),
        "copy": error(start.expand_as(ball)),
        "straight": error(begun.ball[:, -1:] + steps * speed),
        "parser": error(true.ball),
    }
    series = {name: value.mean(0).tolist() for name, value in errors.items()}
    found: dict[str, float] = {}
    exact = torch.from_numpy(clips.v[:, context - 1 :]).to(device)
    met = turned(exact, frame_of(exam.variant).gravity).any(-1)
    bounced = met.cumsum(1) > 0  # [n, h]: by then
    for h in (h for h in HORIZONS if h <= ahead):
        found |= {f"{name}/{h}": curve[h - 1] for name, curve in series.items()}
        found[f"over_copy/{h}"] = series["error"][h - 1] / series["copy"][h - 1]
        if h in FAR:
            found["over_copy/worst"] = max(found[f"over_copy/{h}"], found.get("over_copy/worst", 0))
        if (rows := bounced[:, h - 1]).any():
            for name in ("error", "straight"):
                found[f"bounced/{name}/{h}"] = errors[name][rows, h - 1].mean().item()
    found["half_life"] = half_life(errors["error"], torch.from_numpy(clips.radius).to(device))
    found |= alive(read, begun, HORIZONS)
    found |= {f"parser_{name}": share for name, share in alive(true, begun, HORIZONS).items()}
    found |= physics(read, true, exam, met)
    if exam.variant == Variant.occlude:
        found |= permanence(read, exam)
    if exam.variant == Variant.collide:
        found |= momentum(read, true, exam)
    likeness, alike = likeness_of(told, truth, seen)
    found |= likeness
    series |= alike
    if steering and is_open(exam.variant):
        found |= steered(world, exam, read, true)
    return found, series, told


def likeness_of(
    told: Float[Tensor, "n h 3 s s"],
    truth: Float[Tensor, "n h 3 s s"],
    seen: Float[Tensor, "n c 3 s s"],
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """How alike frames are, by horizon, and how much more than the last one seen."""
    found: dict[str, float] = {}
    measures = {"psnr": psnr, "foreground_psnr": foreground_psnr, "ssim": ssim}
    series = {name: measure(told, truth).tolist() for name, measure in measures.items()}
    copied = psnr(seen[:, -1:].expand_as(truth), truth)
    for h in (h for h in HORIZONS if h <= truth.shape[1]):
        found |= {f"{name}/{h}": values[h - 1] for name, values in series.items()}
        found[f"psnr_over_copy/{h}"] = series["psnr"][h - 1] - copied[h - 1].item()
    return found, series


def compare(
    world: WorldModel, exam: Exam, count: int
) -> tuple[dict[str, float], dict[str, list[float]], Tensor]:
    """What can be asked of films whose state nobody knows; as `judge` returns it.

    Args:
        count: how many actions there are.
    """
    context = exam.context
    seen, truth = exam.frames[:, :context], exam.frames[:, context:]
    actions = torch.from_numpy(exam.clips.actions).to(exam.frames.device)
    told = dream(world, seen, actions)
    found, series = likeness_of(told, truth, seen)
    return found | {"delta_psnr": worth_of_actions(world, exam, count)}, series, told


def worth_of_actions(world: WorldModel, exam: Exam, count: int) -> float:
    """By how many decibels a frame is worse that follows other actions, drawn with the same noise.

    Args:
        count: how many actions there are.
    """
    context, short = exam.context, min(4, exam.ahead)
    seen = exam.frames[:, :context]
    actions = torch.from_numpy(exam.clips.actions).to(seen.device)
    rng = np.random.default_rng(0)
    other = torch.from_numpy(rng.integers(count, size=(len(seen), short))).to(seen.device)
    truth = exam.frames[:, context : context + short]
    right, wrong = (
        psnr(dream(world, seen, torch.cat([actions[:, : context - 1], after], 1)), truth)[-1]
        for after in (actions[:, context - 1 : context - 1 + short], other)
    )
    return (right - wrong).item()


def steered(world: WorldModel, exam: Exam, read: Parsed, true: Parsed) -> dict[str, float]:
    """Whether the paddle does what it is told."""
    clips, context = exam.clips, exam.context
    device = exam.frames.device
    hue = torch.from_numpy(clips.hue[:, 0]).to(device)
    seen = exam.frames[:, :context]
    actions = torch.from_numpy(clips.actions).to(device)
    found, apart = {}, min(APART, exam.ahead)
    off = (read.plate - torch.from_numpy(clips.plate[:, context:]).to(device)).abs().mean(0)
    found |= {f"plate/{h}": off[h - 1].item() for h in HORIZONS if h <= len(off)}

    def always(action: int) -> Tensor:
        """Where the paddle is after the same action, `apart` times over."""
        after = torch.full((len(seen), apart), action, device=device)
        frames = dream(world, seen, torch.cat([actions[:, : context - 1], after], dim=1))
        return parse(frames[:, -1:], hue).plate[:, 0]

    plate = torch.from_numpy(clips.plate[:, context - 1]).to(device)
    left, right = (
        (plate + side * apart * STRIDE).clamp(PLATE_HALF, SIZE - PLATE_HALF) for side in (-1, 1)
    )
    found["separation"] = ((always(2) - always(0)).mean() / (right - left).mean()).item()
    found["separation/off"] = abs(found["separation"] - 1)

    found["delta_psnr"] = worth_of_actions(world, exam, ACTIONS)

    def obeyed(parsed: Parsed) -> float:
        """How often the paddle's move between two frames says which action it was."""
        move = parsed.plate.diff(dim=1)
        said = 1 + torch.where(move.abs() > STRIDE / 2, move.sign(), 0.0).long()
        done = actions[:, context : context + said.shape[1]]
        exact = torch.from_numpy(clips.plate[:, context:]).to(device).diff(dim=1)
        free = (exact - STRIDE * (done - 1)).abs() < 1e-3  # no border held it
        return (said == done)[free].float().mean().item()

    found["actions_read"], found["actions_read_truth"] = obeyed(read), obeyed(true)
    return found


def forked(
    world: WorldModel,
    draw: Callable[[State], Tensor],
    count: int,
    device: torch.device,
    hang: int,
) -> dict[str, float]:
    """Which way a ball goes that hung still, when it may go either; the same noise every time.

    Each beginning is dreamed `AGAIN` times. One that tells a mean may go to either side too, by
    what the beginning happens to be, but then always to the same (`alike`: the share of the pairs
    of dreams of a beginning that go the same way).

    Args:
        draw: a state -> its frames [n, 3, s, s].
        count: of beginnings.
        hang: frames that the ball hung for, all of which are seen.
    """
    state = serve(np.random.default_rng(0), count, Variant.fork, Split.shown, hang)
    frames, stay = [draw(state)], torch.ones(count, dtype=torch.long)
    for _ in range(hang - 1):
        state = step(state, stay, Variant.fork).state
        frames.append(draw(state))
    seen = torch.stack(frames, dim=1).to(device).repeat_interleave(AGAIN, dim=0)
    hue = state.hue.to(device).repeat_interleave(AGAIN, dim=0)
    actions = torch.ones(len(seen), hang - 1 + FLOWN, dtype=torch.long, device=device)
    read = parse(dream(world, seen, actions)[:, -1:], hue)
    x, kept = read.ball[:, 0, 0, 0] - SIZE / 2, parse(seen[:, -1:], hue).area
    whole = (read.area / kept)[:, 0, 0]
    went = (x.abs() > ASIDE) & (whole >= ALIVE[0]) & (whole <= ALIVE[1])
    sides = torch.stack([went & (x < 0), went & (x > 0)]).unflatten(1, (count, AGAIN)).sum(2)
    both, all_of = (n * (n - 1) for n in (sides, sides.sum(0)))  # twice the pairs
    left = (sides[0].sum() / sides.sum()).item() if went.any() else 1.0
    alike = (both.sum() / all_of.sum()).item() if all_of.any() else 1.0
    return {"fork/decided": went.float().mean().item(), "fork/left": left,
            "fork/uneven": abs(left - 0.5), "fork/alike": alike}  # fmt: skip


def outcomes(world: WorldModel, exam: Exam) -> dict[str, float]:
    """How many rewards and ends are found between true frames, and how many of those told are."""
    if exam.variant is not None and not is_open(exam.variant):
        return {}
    actions = torch.from_numpy(exam.clips.actions).to(exam.frames.device)
    parts = zip(*(x.split(8 * CHUNK) for x in steps_of(exam.frames, actions)), strict=True)
    told = [world.outcome(*part) for part in parts]
    signs, ends = (torch.cat(x).argmax(1).cpu().numpy() for x in zip(*told, strict=True))
    reward, end = (x[:, BEFORE - 1 :].flatten() for x in (exam.clips.rewards, exam.clips.ends))
    found = {}
    for name, said, true in (
        ("hits", signs == 2, reward > 0),
        ("misses", signs == 0, reward < 0),
        ("ends", ends == 1, end),
    ):
        right = float((said & true).sum())
        if true.any():
            found[f"{name}/found"] = right / float(true.sum())
        if said.any():
            found[f"{name}/true"] = right / float(said.sum())
    return found


def latency(world: WorldModel, exam: Exam) -> dict[str, float]:
    """Frames per second of one dream alone, and how long an action takes to become a frame.

    `over_uncached`, of a world that remembers frames in a cache: how much longer it takes if all
    that it remembers is computed anew for every frame. `cache_mb`: what the dream is remembered in.
    """
    clips, context = exam.clips, exam.context
    device = exam.frames.device
    actions = torch.from_numpy(clips.actions[:1]).to(device)
    episode = torch.zeros(1, dtype=torch.long, device=device)

    def begun(frames: int) -> Any:
        return world.init_cache(exam.frames[:1, :frames], actions[:, : frames - 1], episode)

    def timed(tell: Callable[[int], Tensor]) -> list[float]:
        took = []
        for count in range(WARM + TIMED):
            began = time.perf_counter()
            tell(count)[0].mul(255).byte().cpu()
            took.append(time.perf_counter() - began)
        return took[WARM:]

    config = getattr(world, "config", None)
    remembered = getattr(config, "transformer", None)
    kept = context
    if remembered is not None:
        kept = max(context, min(remembered.window - 1, exam.frames.shape[1]))
    cache = begun(kept)

    def beside(count: int) -> Tensor:
        nonlocal cache
        frame, cache = world.step(cache, actions[:, count % actions.shape[1]])
        return frame

    took = timed(beside)
    half, most, worst = np.percentile(took, [50, 95, 99]) * 1e3
    found = {
        "fps": 1 / float(np.mean(took)),
        "p50_ms": float(half),
        "p95_ms": float(most),
        "p99_ms": float(worst),
        "cache_mb": bytes_of(cache) / 1e6,
        "steps": float(getattr(config, "steps", 0)),
    }
    if remembered is not None:
        anew = timed(lambda count: world.step(begun(kept), actions[:, 0])[0])
        found["over_uncached"] = float(np.median(anew) / np.median(took))
    return found


def endurance(world: WorldModel, exam: Exam, frames: int) -> dict[str, float]:
    """Whether one long dream, alone, takes more time and memory at its end than at its beginning.

    Compared are `TIMED` frames at either end, the first after the cache is full; `memory_growth` is
    that of the cache, or of all that is allocated on a GPU, whichever grew more.

    Args:
        frames: of the dream, `shortest` or more.
    """
    device, context = exam.frames.device, exam.context
    rng, start = np.random.default_rng(0), shortest(getattr(world, "config", None)) - 2 * TIMED
    actions = torch.from_numpy(exam.clips.actions[:1]).to(device)
    after = torch.from_numpy(rng.choice(exam.clips.actions[0], size=(frames, 1))).to(device)
    episode = torch.zeros(1, dtype=torch.long, device=device)
    cache = world.init_cache(exam.frames[:1, :context], actions[:, : context - 1], episode)
    took, held = [], []
    for count in range(frames):
        began = time.perf_counter()
        frame, cache = world.step(cache, after[count])
        frame.mul(255).byte().cpu()
        took.append(time.perf_counter() - began)
        if count in (start, frames - 1):
            whole = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            held.append((bytes_of(cache), whole))
    early, late = np.median(took[start : start + TIMED]), np.median(took[-TIMED:])
    return {
        "endured": float(frames),
        "late_over_early": float(late / early),
        "memory_growth": max(b / a for a, b in zip(*held, strict=True) if a),
    }


def shortest(config: Any) -> int:
    """Frames of the shortest dream of a model of that configuration whose ends can be compared."""
    remembered = getattr(config, "transformer", None)
    return 2 * TIMED + (remembered.window + remembered.sinks if remembered is not None else WARM)


def bytes_of(cache: Any) -> int:
    """Of all tensors in dataclasses and tuples."""
    if isinstance(cache, Tensor):
        return cache.numel() * cache.element_size()
    if is_dataclass(cache):
        return sum(bytes_of(getattr(cache, part.name)) for part in fields(cache))
    return sum(map(bytes_of, cache)) if isinstance(cache, tuple | list) else 0
