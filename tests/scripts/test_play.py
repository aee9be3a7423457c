"""Playing: actions give frames, in a browser, over the socket, in the terminal; nonsense gives a
sentence."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from scripts import play
from scripts.play import Asked, Server, Stage, in_terminal
from tests.browser import CHROME, Browser
from tests.helpers import SMALL_PINFALL, SMALL_WORLD, train
from training.config import compose
from training.data.config_episodes import ProcgenConfig
from training.distributed import Processes
from training.errors import UserError
from training.evaluation.stub_worlds import Simulator
from training.run_directory import plain
from training.worlds import PROCGEN


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one step has left."""
    runs = tmp_path_factory.mktemp("runs")
    done = train(runs, *SMALL_PINFALL["diamond"], *SMALL_WORLD, "loop.steps=1", "run=x")
    assert done.returncode == 0, done.stderr[-3000:]
    return runs / "diamond" / "pinfall" / "x"


@pytest.fixture
def stage(run: Path) -> Stage:
    """The run's world, dreamed by the simulator itself, so that a paddle can be looked for."""
    made = Stage(Asked(model=str(run), port=0))
    made.world = _Exact(made.world)
    return made


class _Exact:
    """An open world whose model is the simulator."""

    simulated = True

    def __init__(self, world) -> None:
        self.choices, self.size, self.step, self.show = (
            world.choices, world.size, world.step, world.show,
        )  # fmt: skip
        self._world = world

    def start(self, number, device):
        begun = self._world.start(number, device)
        variant = self._world.data.config.variant
        self.model = _First(begun.state, variant, self.size, 4)
        return begun


class _First(Simulator):
    def init_cache(self, frames, actions, episodes, seed=0):
        return super().init_cache(frames, actions, episodes * 0, seed)


@pytest.fixture
def server(stage: Stage) -> Iterator[Server]:
    made = Server(stage)
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    yield made
    made.close()
    thread.join(timeout=10)


def socket(server: Server):
    return connect(f"ws://127.0.0.1:{server.port}/play", max_size=2**20)


def frame(message: bytes) -> tuple[int, float, np.ndarray, np.ndarray]:
    """Number, latency, dream and truth of a message."""
    number, size, latency, _ = struct.unpack("<IIff", message[:16])
    dream, truth = np.frombuffer(message[24:], np.uint8).reshape(2, size, size, 3)
    return number, latency, dream, truth


def paddle(picture: np.ndarray) -> float:
    """Where, across, what is white is."""
    white = picture.min(axis=2).astype(float)[13:]
    return float((white.sum(0) * (np.arange(white.shape[1]) + 0.5)).sum() / white.sum())


def test_a_run_that_was_just_trained_can_be_played(run: Path) -> None:
    game = Stage(Asked(model=str(run))).game()
    first = game.message()
    for count in range(1, 4):
        game.act(2)
        number, latency, dream, truth = frame(game.message())
        assert number == count and latency > 0 and dream.shape == truth.shape == (16, 16, 3)
    again = Stage(Asked(model=str(run))).game()
    assert again.message()[24:] == first[24:]
    for _ in range(3):
        again.act(2)
    np.testing.assert_array_equal(frame(again.message())[2], dream, "the same dream again")
    other = Stage(Asked(model=str(run), seed=1)).game()
    for _ in range(3):
        other.act(2)
    assert (frame(other.message())[2] != dream).any() and frame(other.message())[3].sum() > 0


def test_a_player_is_told_the_score_and_that_the_ball_is_lost(stage: Stage) -> None:
    game = stage.game()
    assert struct.unpack("<fI", game.message()[16:24]) == (0.0, 0)
    for _ in range(400):  # who stays at the wall loses it
        game.act(0)
        score, over = struct.unpack("<fI", game.message()[16:24])
        assert (score, over) == (game.score, game.over)
        if over:
            break
    assert over == 1
    still = frame(game.message())[3]
    game.act(2)
    assert (frame(game.message())[3] == still).all(), "what is over stays so"
    game.reset()
    assert struct.unpack("<fI", game.message()[16:24]) == (0.0, 0)


@pytest.mark.parametrize("name", SMALL_PINFALL)
def test_every_kind_of_world_that_was_exported_can_be_played(name: str, tmp_path: Path) -> None:
    config = compose([*SMALL_PINFALL[name], *SMALL_WORLD])
    recipe = importlib.import_module(f"training.recipes.{config.recipe.name}")
    made = recipe.build(config, Processes(), torch.device("cpu"))
    (tmp_path / "figures").mkdir()
    made.evaluate()
    made.export(tmp_path)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(plain(config)))
    game = Stage(Asked(model=str(tmp_path))).game()
    for count in range(1, 20):  # further than any window
        game.act(count % 3)
        assert frame(game.message())[0] == count
    weights = made.model.state_dict()
    opened = game.world.model.state_dict()
    assert all(torch.equal(weights[key], opened[key]) for key in weights)


def test_worlds_of_films_are_played_without_a_simulator(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "abc":
        arrays = {
            "frames": rng.integers(0, 256, (15, 16, 16, 3), np.uint8),
            "actions": np.arange(14) % 8,
        }
        np.savez(tmp_path / f"{name}.npz", **arrays)
    small = [o for o in (*SMALL_PINFALL["diamond"], *SMALL_WORLD)
             if not o.startswith(("data.worlds", "data.length"))]  # fmt: skip
    own = [*small, "data=episodes", f"data.path={tmp_path}",
           "data.actions=8", "recipe.splits=[]", "recipe.horizon=5", "loop.steps=1"]  # fmt: skip
    done = train(tmp_path / "runs", *own, "data.heldout=0.4", "run=x")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "diamond" / "pinfall" / "x"
    stage = Stage(Asked(model=str(run)))
    game = stage.game()
    held = [stage.world.data.episode(i).frames for i in range(3) if stage.world.data.held[i]]
    (first,) = game.pictures()
    assert any((first == frame).all() for film in held for frame in film), "a frame of a held film"
    game.act(7)
    assert len(game.message()) == 24 + 3 * 16 * 16
    written: list[str] = []
    typed = iter(["7", "", "q"])
    in_terminal(game, lambda seconds: next(typed), written.append)
    assert "simulator" not in written[1] and "dream   0 " in written[1] and "7   " in written[2]
    for file in tmp_path.glob("*.npz"):
        file.unlink()
    with pytest.raises(UserError, match="name a directory with at least two files"):
        Stage(Asked(model=str(run)))


def test_keys_are_told_from_the_names_of_actions() -> None:
    names = ("noop", "fire", "upright", "right", "down")
    assert [sorted(play.meant(name)) for name in names] == [
        [], ["fire"], ["right", "up"], ["right"], ["down"],
    ]  # fmt: skip
    assert play.resting(names) == 0 and play.resting(("left", "stay", "right")) == 1
    assert len(PROCGEN) == ProcgenConfig.actions and PROCGEN[play.resting(PROCGEN)] == "rest"
    assert play.meant(PROCGEN[8]) == {"right", "up"} and not play.meant(PROCGEN[9])
    for typed, action in (
        ("d", 3),
        (" ", 1),
        ("\x1b[B", 4),
        ("a", 0),
        ("2", 2),
        ("7", 4),
        ("x", 4),
    ):
        assert play.chosen(names, typed, 4) == action, typed


def test_fifty_actions_give_fifty_frames_and_the_paddle_obeys(server: Server) -> None:
    with socket(server) as player:
        seen = [frame(player.recv())]
        for _ in range(50):
            at, hues = paddle(seen[-1][2]), np.ptp(seen[-1][2].astype(float), axis=2).sum(0)
            ball = (hues * (np.arange(len(hues)) + 0.5)).sum() / hues.sum()
            action = 2 if ball > at else 0  # follows the ball, as that is lost otherwise
            player.send(json.dumps({"action": action}))
            seen.append(frame(player.recv()))
            if 3 < at < 13:
                assert (paddle(seen[-1][2]) - at) * (action - 1) > 0.2
        assert [number for number, *_ in seen] == list(range(51))
        assert len({picture.tobytes() for _, _, picture, _ in seen}) == 51
        player.send('{"reset": true}')
        number, _, dream, _ = frame(player.recv())
        assert number == 0 and dream.tobytes() != seen[0][2].tobytes()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("nonsense", "must be JSON"),
        ("[" * 200, "must be JSON"),
        ("7", 'must be {"action": number}'),
        ('{"action": 1, "reset": true}', 'must be {"action": number}'),
        ('{"reset": 1}', 'must be {"action": number}'),
        ('{"action": 3}', "action must be 0 (left), 1 (stay), 2 (right), not 3"),
        ('{"action": -1}', "not -1"),
        ('{"action": true}', "not True"),
        ('{"action": 1.0}', "not 1.0"),
        (b"\xff\x00", "must be JSON"),
    ],
)
def test_what_is_not_understood_is_told_and_play_goes_on(
    message: str | bytes, says: str, server: Server
) -> None:
    with socket(server) as player:
        player.recv()
        player.send(message)
        assert says in json.loads(player.recv())["error"]
        player.send('{"action": 1}')
        assert frame(player.recv())[0] == 1


def test_who_sends_nonsense_or_too_much_or_too_often_is_sent_away(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket(server) as player:
        player.recv()
        with pytest.raises(ConnectionClosed, match="10 messages were not understood"):
            for _ in range(20):
                player.send("nonsense")
                player.recv()
    with socket(server) as player:
        player.recv()
        with pytest.raises(ConnectionClosed, match="1009"):
            player.send('{"action": ' + "1" * 1000 + "}")
            player.recv()
    monkeypatch.setattr(play, "MESSAGES_PER_S", 5)
    with socket(server) as player:
        player.recv()
        with pytest.raises(ConnectionClosed, match="more than 5 messages a second"):
            for _ in range(20):
                player.send('{"action": 1}')
            for _ in range(20):
                player.recv()


def test_only_so_many_play_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.places = threading.Semaphore(1)
    with socket(server) as first:
        first.recv()
        with socket(server) as second, pytest.raises(ConnectionClosed, match="play already"):
            second.recv()
    time.sleep(0.5)
    with socket(server) as third:
        assert frame(third.recv())[0] == 0, "a place became free"


def test_pages_of_others_and_other_names_of_this_machine_are_refused(server: Server) -> None:
    url = f"ws://127.0.0.1:{server.port}/play"
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "http://localhost.evil.example"}):
        with pytest.raises(InvalidStatus, match="403"), connect(url, additional_headers=headers):
            pass
    for path, headers, status in (("", {"Host": "evil.example"}, 403), ("secret", {}, 404)):
        asked = urllib.request.Request(server.url + path, headers=headers)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(asked, timeout=10)
        assert error.value.code == status
    with urllib.request.urlopen(server.url, timeout=10) as page:
        text = page.read().decode()
        assert "<canvas" in text and '{"name": "stay", "keys": []}' in text and "{{" not in text
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_it_binds_to_this_machine_alone_unless_told_otherwise(server: Server) -> None:
    assert server.socket.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match=rf"cannot bind to 127\.0\.0\.1:{server.port}"):
        asked = Asked(model="", port=server.port)
        taken = object.__new__(Stage)
        taken.asked = asked
        Server(taken)


SEEN = """(() => {
  const canvas = document.getElementById("dream"), size = canvas.width;
  const data = canvas.getContext("2d").getImageData(0, 0, size, size).data;
  return {frame: Number(document.body.dataset.frame), size, pixels: Array.from(data)};
})()"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROME, reason="no Chromium on this machine")
def test_in_a_real_browser_actions_give_frames_and_the_paddle_obeys(
    server: Server, tmp_path: Path
) -> None:
    browser = Browser(server.url, tmp_path)

    def seen() -> tuple[int, np.ndarray]:
        found = browser.read(SEEN)
        size = found["size"]
        return found["frame"], np.array(found["pixels"]).reshape(size, size, 4)[:, :, :3]

    try:
        browser.until(lambda: browser.read("Number(document.body.dataset.frame)"))
        for name, way in (("ArrowLeft", -1), ("ArrowRight", 1)):
            browser.key(name, "keyDown")
            first, before = seen()
            browser.until(lambda first=first: seen()[0] >= first + 12)
            _, after = seen()
            browser.key(name, "keyUp")
            assert (paddle(after) - paddle(before)) * way > 2
        told = "document.getElementById('score').textContent"
        assert "same actions: score" in browser.read(told)
        browser.until(lambda: "its game is over, R begins anew" in browser.read(told))
        browser.until(lambda: seen()[0] >= 50)
        facts = browser.read("document.getElementById('facts').textContent")
        assert "frames per second" in facts and "ms from action to frame" in facts
        assert browser.read("document.getElementById('why').textContent") == ""
        browser.key("r", "keyDown")
        browser.until(lambda: seen()[0] < 10)
        assert "over" not in browser.read(told)
    finally:
        browser.close()


def test_in_the_terminal_keys_steer_and_q_ends(stage: Stage) -> None:
    typed = iter(["d", "", "", "\x1b[D", "", "x", "r", "q"])
    written: list[str] = []
    acted: list[int] = []
    game = stage.game()
    act = game.act
    game.act = lambda action: (acted.append(action), act(action))  # type: ignore[method-assign]
    in_terminal(game, lambda seconds: next(typed), written.append)
    assert acted == [1, 2, 2, 2, 0, 0, 0, 0]
    screen = next(text for text in written if "\u2580" in text)
    assert screen.count("\u2580") == 2 * 16 * 8 and "frames/s" in screen and "score" in screen
    assert written[0].startswith("\x1b[2J") and "\x1b[?25h" in written[-1], "the cursor is back"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: shutil.rmtree(run), r"holds no model\.json: name the directory of a finished"),
        (lambda run: (run / "model.json").write_text("{"), r"does not describe a video world"),
        (lambda run: (run / "model.json").write_text('{"name": "lewm"}'), r"it is a lewm, not one"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x"), r"missing or damaged"),
        (lambda run: (run / "config.yaml").unlink(), r"config\.yaml is missing"),
        (
            lambda run: (run / "config.yaml").write_text("data: {name: ["),
            r"does not describe the w",
        ),
        (
            lambda run: edit(run / "config.yaml", "image_size: 16", "image_size: 32"),
            r"frames of 16",
        ),
        (
            lambda run: edit(run / "model.json", '"condition": 16', '"condition": 32'),
            r"does not fit",
        ),
    ],
)
def test_what_is_no_run_of_a_video_world_is_refused(change, says: str, run: Path, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    change(copy)
    with pytest.raises(UserError, match=says):
        Stage(Asked(model=str(copy)))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
