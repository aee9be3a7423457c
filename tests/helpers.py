"""Shared by the tests: tiny runs through the real entry point, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from training.run_directory import plain

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "experiment=quickstart/stdlib",
    "data=files",
    "model.d_model=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ngram_buckets=64",
    "data.seq_len=32",
    "data.eval_stride=null",
    "data.batch_size=8",
    "data.heldout_fraction=0.3",
    "recipe.floors=false",
    "recipe.sample_tokens=0",
    "optim.warmup_steps=0",
    "loop.steps=12",
    "loop.log_every=2",
    "loop.eval_every=5",
    "loop.checkpoint_every=4",
    "report=false",
]
"A run of seconds: the quickstart's recipe on a few kilobytes."


SMALL_ROOMS = [
    "experiment=jepa_planning/two_rooms",
    "model.encoder.channels=[8,8,8]",
    "model.encoder.hidden=[32]",
    "model.encoder.dim=16",
    "model.predictor.hidden=[32]",
    "data.walks=16",
    "data.walk=30",
    "data.seq_len=9",
    "data.batch_size=8",
    "recipe.probe_walks=16",
    "recipe.pairs=8",
    "recipe.policies=[]",
    "optim.warmup_steps=0",
    "report=false",
]
"Two rooms, learned from in seconds."


SMALL_IMAGES = {
    "lejepa": [
        "experiment=lejepa/images",
        "model.encoder.channels=[8,16,16]",
        "model.encoder.dim=24",
        "model.projector=[32,16]",
        "model.predictor=[16]",
    ],
    "ijepa": [
        "experiment=ijepa/images",
        "model.patch=[2,2]",
        "model.dim=24",
        "model.depth=2",
        "model.predictor_dim=12",
        "model.predictor_depth=1",
    ],
}
"Images, learned from in seconds; add SMALL_BATCH."
SMALL_FILMS = {
    "rollout": [
        "experiment=jepa_video/rollout",
        "model.encoder_width=4",
        "model.dim=4",
        "model.predictor_width=4",
        "model.projector=[8]",
        "recipe.films=16",
        "recipe.horizon=3",
        "recipe.cells=4",
        "data.seq_len=6",
    ],
    "masked": [
        "experiment=jepa_video/masked",
        "model.patch=[2,2,2]",
        "model.dim=24",
        "model.depth=2",
        "model.predictor_dim=12",
        "model.predictor_depth=1",
        "recipe.films=32",
        "data.seq_len=4",
    ],
}
"Films, learned from in seconds; add SMALL_FILM."
SMALL_FILM = [
    "data.batch_size=8",
    "data.image_size=16",
    "data.digit_size=8",
    "optim.warmup_steps=0",
    "report=false",
]
SMALL_PINFALL = {
    "diamond": [
        "experiment=diamond/pinfall",
        "model.context=4",
        "data.seq_len=5",
        "model.widths=[8,16]",
        "model.condition=16",
        "model.steps=2",
    ],
    "diffusion_forcing": [
        "experiment=diffusion_forcing/pinfall",
        "model.widths=[16]",
        "model.transformer.dim=12",
        "model.steps=2",
        "data.seq_len=6",
    ],
    "dreamer4": [
        "experiment=dreamer4/pinfall",
        "model.transformer.dim=12",
        "model.transformer.heads=2",
        "model.transformer.depth=2",
        "model.steps=2",
        "recipe.jumps_after=0",
        "data.seq_len=6",
    ],
    "genie": [
        "experiment=genie/pinfall",
        "model.transformer.dim=12",
        "model.transformer.heads=3",
        "model.transformer.depth=2",
        "model.levels=[4,3]",
        "model.steps=2",
        "data.seq_len=6",
    ],
}
"A ball and a paddle, learned from in seconds; add SMALL_WORLD."
SMALL_WORLD = [
    "recipe.dreams=6",
    "recipe.horizon=6",
    "recipe.splits=[pairs]",
    "data.image_size=16",
    "data.batch_size=4",
    "data.worlds=16",
    "data.length=24",
    "optim.warmup_steps=0",
    "report=false",
]
SMALL_AGENT = [
    "experiment=diamond/agent",
    "model.context=4",
    "data.seq_len=4",
    "data.image_size=16",
    "data.batch_size=4",
    "data.worlds=16",
    "data.length=24",
    "model.widths=[4,4]",
    "model.hidden=8",
    "recipe.horizon=3",
    "recipe.episodes=8",
    "recipe.frames=6",
    "recipe.ranked=4",
    "recipe.ranked_frames=3",
    "report=false",
]
"An agent in that world, or in dreams of it: add recipe.world."
SMALL_FORCED = [
    "experiment=self_forcing/pinfall",
    *SMALL_PINFALL["diffusion_forcing"][1:],
    *SMALL_WORLD,
]
"A student of a diffusion_forcing: add recipe.teacher."
SMALL_COLOURED_ROOMS = [
    "experiment=lewm/two_rooms_rgb",
    "model.width=24",
    "model.depth=1",
    "model.dim=12",
    "model.projector=24",
    "model.predictor_dim=24",
    "model.predictor_depth=1",
    "model.predictor_heads=2",
    "model.predictor_head_dim=8",
    "model.predictor_mlp=32",
    "recipe.planning.samples=20",
    "recipe.planning.elites=4",
    "recipe.planning.iterations=2",
    "recipe.episodes=8",
    "recipe.probe_walks=16",
    "recipe.pairs=16",
    "data.image_size=32",
    "data.batch_size=8",
    "optim.warmup_steps=0",
    "report=false",
]
"The coloured rooms, learned from in seconds."
SMALL_PUSH_T = [
    "experiment=lewm/push_t",
    *SMALL_COLOURED_ROOMS[1:],
    "recipe.goal_steps=10",
    "recipe.episode_steps=25",
    "data.walks=8",
    "data.walk=31",
]
"Push-T, learned in seconds."
SMALL_ROOM_CLIPS = [
    "experiment=vjepa2_ac/encoder",
    "model.patch=[1,8,8]",
    "model.dim=24",
    "model.depth=1",
    "model.predictor_dim=12",
    "model.predictor_depth=1",
    "recipe.films=64",
    "data.image_size=32",
    "data.batch_size=8",
    "optim.warmup_steps=0",
    "report=false",
]
"Clips of the coloured rooms."
SMALL_FROZEN = [
    "experiment=vjepa2_ac/planning",
    "recipe.weights=null",
    "model.standardise=false",
    "model.predictor_dim=24",
    "model.predictor_depth=1",
    "model.predictor_heads=2",
    "recipe.planning.samples=20",
    "recipe.planning.elites=4",
    "recipe.planning.iterations=2",
    "recipe.episodes=8",
    "recipe.probe_walks=16",
    "data.image_size=32",
    "data.batch_size=8",
    "optim.warmup_steps=0",
    "report=false",
]
"A predictor on a random encoder in the coloured rooms."
SMALL_GLIMPSES = {
    "lvsm": ["experiment=lvsm/tables", "model.width=16", "model.layers=1"],
    "mvsplat": [
        "experiment=mvsplat/tables",
        "model.width=8",
        "model.blocks=1",
        "model.depths=4",
    ],
}
SMALL_TABLES = [
    "data.image_size=16",
    "data.scenes=8",
    "data.heldout=3",
    "data.samples=1",
    "data.batch_size=4",
    "report=false",
]
SMALL_TABLETOP = [
    "experiment=gaussian_splatting/tabletop",
    "data.image_size=24",
    "data.views=10",
    "data.heldout=2",
    "data.samples=1",
    "data.things=2",
    "model.capacity=200",
    "model.begin_count=100",
    "recipe.refine_every=10",
    "report=false",
]
"A table with two things, reconstructed in seconds."
SMALL_BATCH = [
    "data.batch_size=16",
    "data.image_size=16",
    "recipe.probe_views=1",
    "optim.warmup_steps=0",
    "report=false",
]


def write_corpus(directory: Path, seed: int = 0) -> str:
    """Files with some structure to learn; returns the override that trains on them."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), size=4)) for _ in range(20)]
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(12):
        text = " ".join(rng.choice(words, size=200))
        (directory / f"doc{index:02d}.txt").write_text(text)
    return f"data.paths=[{directory}]"


def environment(runs: Path, **extra: str) -> dict[str, str]:
    """One thread, no network, runs below `runs`."""
    return {
        **os.environ,
        "AFFERENT_RUNS": str(runs),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash of native code says where it was
        **extra,
    }


def train_command(*overrides: str, processes: int = 1) -> list[str]:
    """The command line of a run, through torchrun for several processes."""
    if processes == 1:
        return [sys.executable, "-m", "scripts.train", *overrides]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", "scripts.train", *overrides]


def train(
    runs: Path, *overrides: str, processes: int = 1, cwd: Path = ROOT, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the caller looks at the exit code."""
    return subprocess.run(
        train_command(*overrides, processes=processes),
        cwd=cwd,
        env=environment(runs, **extra),
        capture_output=True,
        text=True,
        timeout=300,
    )


def train_one_and_two(folder: Path, *overrides: str) -> list[Path]:
    """The same run in one process, which is this one, and in two: their directories."""
    from training.config import compose
    from training.run import run
    from training.run_directory import run_path

    config = compose([*overrides, f"runs_dir={folder / '1'}"])
    run(config)
    done = train(folder / "2", *overrides, processes=2)
    assert done.returncode == 0, done.stderr[-9000:]
    one = Path(run_path(config))
    return [one, folder / "2" / one.relative_to(folder / "1")]


def only_run(runs: Path, experiment: str = "quickstart/stdlib") -> Path:
    """The one run directory of an experiment."""
    (found,) = [path for path in (runs / experiment).iterdir() if path.is_dir()]
    return found


def weights(run: Path) -> dict[str, np.ndarray]:
    """The exported weights of a finished run."""
    return load_file(run / "model.safetensors")


def tiny_teacher(directory: Path, keys: int = 64, values: int = 64) -> Path:
    """An untrained decoder of two layers for documents of statements, as a run exports it."""
    import torch
    from safetensors.torch import save_file

    from models.language.config import TransformerConfig
    from models.language.transformer import Transformer
    from training.data.config import StatementsConfig
    from training.files import write_json
    from training.run_directory import plain

    directory.mkdir(parents=True, exist_ok=True)
    config = TransformerConfig(
        vocab_size=StatementsConfig(keys=keys, values=values).vocab_size, d_model=32,
        num_layers=2, num_heads=2, d_ff=48, rope_theta=1000.0, tie_embeddings=False,
    )  # fmt: skip
    model = Transformer(config, torch.Generator().manual_seed(0))
    save_file(dict(model.state_dict()), directory / "model.safetensors")
    write_json(directory / "model.json", plain(config))
    return directory


LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_checkpoint(directory: Path, family: str) -> Path:
    """An untrained Llama or Qwen3 on disk, with a tokenizer of bytes and its family's marks."""
    import torch

    from models.language.config import TransformerConfig
    from models.language.huggingface import save_pretrained
    from models.language.transformer import Transformer

    directory.mkdir(parents=True, exist_ok=True)
    marks = LLAMA if family == "llama" else QWEN
    config = TransformerConfig(
        vocab_size=256 + len(marks), d_model=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, d_ff=48, qk_norm=family == "qwen3", tie_embeddings=family != "llama",
    )  # fmt: skip
    model = Transformer(config, torch.Generator().manual_seed(0))
    save_pretrained(model, directory, max_position_embeddings=4096)
    write_tokenizer(directory, marks)
    return directory


def write_tokenizer(directory: Path, marks: list[str]) -> None:
    """A tokenizer.json of bytes, and some marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": marks[-1]}))


def tiny_study(directory: Path) -> tuple[Path, Path]:
    """A tiny Llama and what it said about a text: (checkpoint, conversations)."""
    from training.data.chat import Chat
    from training.data.tokenizer import FileTokenizer
    from training.endpoint import InProcess
    from training.pretrained import load_decoder
    from training.synthesis import Study, synthesise

    checkpoint = tiny_checkpoint(directory / "llama", "llama")
    engine = InProcess(load_decoder(checkpoint))
    study = Study(8, chunk=(32, 64), question_tokens=8, answer_tokens=12, workers=1)
    chat = Chat(FileTokenizer(str(checkpoint)))
    synthesise("High water at dawn. " * 20, engine, chat, study, directory / "study")
    return checkpoint, directory / "study"


def model_keys(checkpoint: Path) -> list[str]:
    """The overrides that say what a checkpoint's model is."""
    from training.pretrained import config_of

    plain = {
        key: value
        for key, value in dataclasses.asdict(config_of(checkpoint)).items()
        if key not in ("name", "mixing", "rope_scaling")
    }
    keys = [f"model.{key}={'null' if v is None else v}" for key, v in plain.items()]
    return [*keys, "model.rope_scaling=null"]


def as_recorded(recorded: Any, part: Any) -> Any:
    """What a lineage recorded of `part` of a configuration, with the fields that came since at
    their defaults: one that changes nothing while it is left alone does not age what is shipped."""
    if not dataclasses.is_dataclass(part):
        return recorded
    whole = dict(recorded)
    for item in dataclasses.fields(part):
        if item.name in recorded:
            whole[item.name] = as_recorded(recorded[item.name], getattr(part, item.name))
        elif not item.metadata.get("free") and item.default is not dataclasses.MISSING:
            whole[item.name] = plain(item.default)
    return whole


SMALL_MOVING = [
    "experiment=dynamic_gaussians/tabletop",
    "data.image_size=24",
    "data.cameras=4",
    "data.heldout=1",
    "data.times=5",
    "data.samples=1",
    "data.things=2",
    "model.capacity=200",
    "model.begin_count=100",
    "recipe.refine_every=10",
    "report=false",
]
"A table with two things that move, learned in seconds."

SMALL_TRACKED = [
    *SMALL_MOVING[1:],
    "experiment=dynamic_gaussians/tracking",
    "data.first_steps=24",
    "data.steps_per_time=5",
]
"The same, followed from one time to the next: 4 of 5 times are trained on, so 39 steps."

SMALL_PUSHES = [
    "experiment=mro_gwm/push_world",
    "model.width=16",
    "model.layers=1",
    "model.members=2",
    "data.episodes=12",
    "data.heldout=4",
    "data.batch_size=8",
    "recipe.tracked=1",
    "recipe.cameras=2",
    "recipe.image_size=24",
    "recipe.tracking_steps=3",
    "recipe.episodes=2",
    "recipe.episode_steps=3",
    "recipe.samples=12",
    "recipe.horizon=3",
    "report=false",
]
"A small model of pushing, learned in seconds; recipe.scene is to be given."
