"""`afferent play model=<run>`: act in a world that a model dreams, in the browser or the terminal;
or walk through a scene (scripts/scene_viewer.py).

    GET  /        the page: canvases, keys that steer, frames per second and latency
    WS   /play    {"action": 0} -> a frame; {"reset": true} -> another beginning's

A frame comes as 24 bytes (number, size, latency in milliseconds, frames per second, score in the
simulator, 1 if its game is over; of 32 bits, little-endian, the three between floats and the others
unsigned), then the dream's pixels and, of a world that has a simulator, the simulator's after the
same actions, RGB, row by row. What is not understood is answered with {"error": why}.

It binds to this machine unless told otherwise, answers only pages of its own, and limits how long a
message may be, how many come in a second, and how many play at once.
"""

from __future__ import annotations

import json
import select
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from scripts.scene_viewer import SceneViewer, scene_of
from scripts.words import device, door
from training.errors import UserError

PLAYERS = 4
"How many may play at once."
MESSAGE_BYTES, MESSAGES_PER_S = 256, 120
"What a player may send."
MISTAKES = 10
"Messages that are not understood, after which a player is sent away."
HEAD = struct.Struct("<IIfffI")
"What a frame begins with."
MEASURED = 30
"Frames over which the rate is taken."


@dataclass
class Asked:
    """The command line."""

    model: str
    "Directory of a finished run of a video world model or of a scene; or a scene's file."
    host: str = "127.0.0.1"
    "Address to bind to."
    port: int = 8765
    "Port; 0 takes a free one."
    fps: float = 15.0
    "Frames per second that are asked for."
    terminal: bool = False
    "Play here, in half blocks of the terminal, in place of the browser."
    seed: int = 0
    "Decides the noise of all dreams."
    device: str = "auto"
    "auto, cpu or cuda."


WAYS = {
    "left": ("left",), "right": ("right",), "up": ("up", "forward"), "down": ("down", "back"),
    "fire": ("fire", "attack"),
}  # fmt: skip
"Keys that steer -> what names of actions are searched for."


def meant(name: str) -> frozenset[str]:
    """Which keys an action is: those that its name tells, as in `upright` or `leftfire`."""
    return frozenset(way for way, words in WAYS.items() if any(word in name for word in words))


def resting(names: Sequence[str]) -> int:
    """The action of nobody touching anything: the first without a key, or the first of all."""
    return next((i for i, name in enumerate(names) if not meant(name)), 0)


class BadMessage(ValueError):
    """What the player can mend."""


class Stage:
    """The world, for several players."""

    def __init__(self, asked: Asked) -> None:
        import torch

        from models.worlds.video.graphs import Graphs
        from training.worlds import open_world

        if not 1 <= asked.fps <= 60:
            raise UserError(f"fps={asked.fps:g} must be 1 to 60")
        self.device = torch.device(device(asked.device))
        self.world, self.asked = open_world(asked.model, self.device), asked
        if self.device.type == "cuda":
            self.world.model.run = Graphs()
        self.turn, self.episodes = threading.Lock(), 0

    def game(self) -> Game:
        return Game(self)


class Game:
    """One player's dream, and what would have happened."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.world = stage, stage.world
        self.times: deque[float] = deque(maxlen=MEASURED)
        self.latency = 0.0
        self.reset()

    def reset(self) -> None:
        """Another beginning, and noise of its own."""
        import torch

        with self.stage.turn:
            episode, self.stage.episodes = self.stage.episodes, self.stage.episodes + 1
            frames, actions, self.state = self.world.start(episode, self.stage.device)
            number = torch.tensor([episode], device=self.stage.device)
            self.cache = self.world.model.init_cache(frames, actions, number, self.stage.asked.seed)
        self.count, self.over, self.score = 0, False, 0.0
        self.dream = frames[0, -1].cpu()

    def act(self, action: int) -> None:
        """One frame further. Raises BadMessage."""
        import torch

        choices = self.world.choices
        if type(action) is not int or not 0 <= action < len(choices):
            said = ", ".join(f"{i} ({choice.name})" for i, choice in enumerate(choices))
            raise BadMessage(f"action must be {said}, not {action!r}")
        began = time.perf_counter()
        with self.stage.turn:  # also what is moved: another player's step may be being captured
            done = torch.tensor([choices[action].action], device=self.stage.device)
            frame, self.cache = self.world.model.step(self.cache, done)
            self.dream, done = frame[0].cpu(), done.cpu()
        self.latency = time.perf_counter() - began
        self.times.append(time.perf_counter())
        if self.state is not None and not self.over:
            self.state, reward, end = self.world.step(self.state, done)
            self.score, self.over = self.score + reward.item(), bool(end)
        self.count += 1

    @property
    def rate(self) -> float:
        """Frames per second, lately."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span else 0.0

    def pictures(self) -> list[Any]:
        """[s, s, 3] uint8: the dream, and the simulator's frame where there is one."""
        shown = [self.dream] if self.state is None else [self.dream, self.world.show(self.state)[0]]
        return [(x * 255).round().byte().permute(1, 2, 0).numpy() for x in shown]

    def message(self) -> bytes:
        """What the page is sent."""
        pictures = self.pictures()
        head = HEAD.pack(
            self.count, len(pictures[0]), 1e3 * self.latency, self.rate, self.score, self.over
        )
        return head + b"".join(picture.tobytes() for picture in pictures)


def understood(game: Game, text: str | bytes) -> bytes:
    """Do what a message says, and give the frame. Raises BadMessage."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise BadMessage("a message must be JSON") from None
    if not isinstance(said, dict) or said.keys() not in ({"action"}, {"reset"}):
        raise BadMessage('a message must be {"action": number} or {"reset": true}')
    if "action" in said:
        game.act(said["action"])
    elif said["reset"] is not True:
        raise BadMessage('a message must be {"action": number} or {"reset": true}')
    else:
        game.reset()
    return game.message()


class Server:
    """The page and its socket."""

    def __init__(self, stage: Stage) -> None:
        import re

        from websockets.sync.server import serve

        self.stage, self.places = stage, threading.Semaphore(PLAYERS)
        self.page = Path(__file__).with_name("play.html").read_text()
        asked, own = stage.asked, r"http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
        if asked.host not in ("127.0.0.1", "localhost", "::1"):
            own = r"http://[^/]+"  # whoever binds elsewhere wants to be reached from elsewhere
        try:
            self.socket = serve(
                self.play, asked.host, asked.port, origins=[re.compile(own), None],
                process_request=self.answer, max_size=MESSAGE_BYTES, compression=None,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"cannot bind to {asked.host}:{asked.port}: {error}") from error
        self.port = self.socket.socket.getsockname()[1]
        self.url = f"http://{asked.host}:{self.port}/"

    def answer(self, connection: Any, request: Any) -> Any:
        """Pages by HTTP; None goes on to the socket."""
        host = request.headers.get("Host", "").rsplit(":", 1)[0]
        local = self.stage.asked.host in ("127.0.0.1", "localhost", "::1")
        if local and host not in ("127.0.0.1", "localhost", "[::1]"):
            return connection.respond(HTTPStatus.FORBIDDEN, f"this is not {host}\n")
        if request.path == "/play":
            return None
        if request.path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, "there is / and /play\n")
        names = [choice.name for choice in self.stage.world.choices]
        facts = {
            "actions": [{"name": name, "keys": sorted(meant(name))} for name in names],
            "rest": resting(names),
            "simulated": self.stage.world.simulated,
            "fps": self.stage.asked.fps,
        }
        page = self.page.replace("{{facts}}", json.dumps(facts))
        response = connection.respond(HTTPStatus.OK, page)
        response.headers["Content-Type"] = "text/html; charset=utf-8"
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "connect-src 'self'"
        )
        return response

    def play(self, connection: Any) -> None:
        """One player, until they go, send nonsense, or too much."""
        if not self.places.acquire(blocking=False):
            connection.close(1013, f"{PLAYERS} play already")
            return
        try:
            self.serve_one(connection)
        finally:
            self.places.release()

    def serve_one(self, connection: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        mistakes, recent = 0, deque[float](maxlen=MESSAGES_PER_S)
        try:
            game = self.stage.game()
            connection.send(game.message())
            for text in connection:
                now = time.monotonic()
                if len(recent) == MESSAGES_PER_S and now - recent[0] < 1:
                    connection.close(1008, f"more than {MESSAGES_PER_S} messages a second")
                    return
                recent.append(now)
                try:
                    connection.send(understood(game, text))
                except BadMessage as error:
                    mistakes += 1
                    connection.send(json.dumps({"error": str(error)}))
                    if mistakes >= MISTAKES:
                        connection.close(1008, f"{MISTAKES} messages were not understood")
                        return
        except ConnectionClosed:
            return

    def run(self) -> None:
        self.socket.serve_forever()

    def close(self) -> None:
        self.socket.shutdown()


TYPED = {
    "a": "left", "\x1b[D": "left", "d": "right", "\x1b[C": "right", "w": "up", "\x1b[A": "up",
    "s": "down", "\x1b[B": "down", " ": "fire",
}  # fmt: skip
"What is typed in a terminal -> where to."


def chosen(names: Sequence[str], typed: str, action: int) -> int:
    """The action after something was typed: another one, or the one before.

    A key without an action of its own rests; numbers are actions themselves.
    """
    for key, way in TYPED.items():
        if typed.endswith(key):
            own = (i for i, name in enumerate(names) if meant(name) == {way})
            return next(own, resting(names))
    last = typed[-1:]
    return int(last) if last.isdecimal() and last.isascii() and int(last) < len(names) else action


def half_blocks(picture: Any) -> list[str]:
    """An RGB image [h, w, 3] as lines of text, two rows of pixels to each."""
    lines = []
    for upper, lower in zip(picture[::2], picture[1::2], strict=False):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\u2580"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def in_terminal(game: Game, read: Callable[[float], str], write: Callable[[str], Any]) -> None:
    """Play by keys: a s d w or the arrows steer, so do space (fire) and numbers of actions, as far
    as the world has them; r begins anew, q ends.

    Args:
        read: what was typed within so many seconds.
    """
    names, pause = [choice.name for choice in game.world.choices], 1 / game.stage.asked.fps
    action = resting(names)
    write("\x1b[2J\x1b[?25l")
    try:
        while True:
            began = time.perf_counter()
            game.act(action)
            pictures = [half_blocks(x) for x in game.pictures()]
            rows = ["  ".join(parts) for parts in zip(*pictures, strict=True)]
            what = f"dream | simulator{' (over)' if game.over else ''}   score {game.score:+.0f}"
            facts = (
                f"{'dream' if game.state is None else what}   {names[action]}   "
                f"{game.rate:.0f} frames/s   {1e3 * game.latency:.0f} ms   a s d w: steer, "
                "r: anew, q: end"
            )
            write("\x1b[H" + "\r\n".join([*rows, facts + "\x1b[K", ""]))
            typed = read(max(0.0, pause - (time.perf_counter() - began)))
            if "q" in typed or "\x03" in typed:
                return
            if "r" in typed:
                game.reset()
            action = chosen(names, typed, action)
    finally:
        write("\x1b[?25h\x1b[0m\r\n")


def terminal(game: Game) -> None:
    """The same on the terminal that this was typed on. Raises UserError without one."""
    import os
    import termios
    import tty

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("terminal=true: this is no terminal; leave it out to play in a browser")
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)

    def read(seconds: float) -> str:
        ready = select.select([number], [], [], seconds)[0]
        time.sleep(0 if not ready else seconds / 2)
        return os.read(number, 64).decode(errors="ignore") if ready else ""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    tty.setcbreak(number)
    try:
        in_terminal(game, read, write)
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def look_at(scene: Path, asked: Asked) -> None:
    """A scene of Gaussians, in the browser. Raises UserError for what a scene cannot be asked."""
    if asked.terminal:
        raise UserError("terminal=true: a scene is looked at in a browser; leave it out")
    if scene.is_dir():
        from scripts.push_viewer import PushViewer

        viewer: Any = PushViewer(scene, asked.host, asked.port, asked.seed)
    else:
        viewer = SceneViewer(scene, asked.host, asked.port)
    print(f"looking at {scene} at {viewer.url} (Ctrl-C ends)", flush=True)
    try:
        viewer.run()
    finally:
        viewer.close()


def main() -> None:
    """Entry point: `afferent play`."""

    def run(asked: Asked) -> None:
        if scene := scene_of(asked.model):
            look_at(scene, asked)
            return
        stage = Stage(asked)
        if asked.terminal:
            terminal(stage.game())
            return
        server = Server(stage)
        print(f"playing {asked.model} at {server.url} (Ctrl-C ends)", flush=True)
        try:
            server.run()
        finally:
            server.close()

    door(
        Asked, "Act in a world that a model dreams: in the browser, or terminal=true.", "play", run
    )


if __name__ == "__main__":
    main()
