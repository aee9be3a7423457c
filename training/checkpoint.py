"""Checkpoints: a directory that exists completely or not at all.

    checkpoints/step_00000100/
        arrays/        safetensors shards written by torch's DCP, or an orbax tree (jax)
        state.json     everything that is not an array
        manifest.json  sha256 of every other file

A save writes to `step_00000100.tmp`, syncs and hashes every file, then renames. A load verifies
the hashes first and falls back to the newest checkpoint that is whole. Nothing is pickled. Arrays
keep no trace of how many processes wrote them: another number may read them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from training.distributed import Processes
from training.errors import RunStopped
from training.files import sha256, sync, write_json, writing

Tree = Mapping[str, Any]


class Stateful(Protocol):
    """What can be saved: its state is a nested dict of arrays and of values JSON can hold."""

    framework: str

    def state_dict(self) -> Tree: ...
    def load_state_dict(self, state: Tree) -> None: ...


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def is_array(value: Any) -> bool:
    """Torch tensors, jax and numpy arrays; everything else goes into state.json."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, processes: Processes, keep: int = 2) -> None:
        self.directory = directory
        self.processes = processes
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = [p.name for p in self.directory.glob("step_????????") if p.is_dir()]
        return sorted(int(name.removeprefix("step_")) for name in names)

    def save(self, step: int, recipe: Stateful, loop_state: Tree) -> None:
        """Save `recipe` and the loop's own state. Raises RunStopped if that fails."""
        final, temporary = self.path(step), self.path(step).with_suffix(".tmp")
        self.processes.main_only(lambda: self.begin(temporary))
        state = flatten({"recipe": recipe.state_dict(), "loop": loop_state})
        arrays = {key: value for key, value in state.items() if is_array(value)}
        values = {key: value for key, value in state.items() if not is_array(value)}
        try:
            BACKENDS[recipe.framework].save(temporary / "arrays", arrays)
        except Exception as error:
            raise self.failed(step, error) from error
        self.processes.barrier()
        self.processes.main_only(lambda: self.complete(step, temporary, final, values))

    def begin(self, temporary: Path) -> None:
        """An empty directory to write into; what an earlier kill left is cleared away."""
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob("*.tmp"):
                shutil.rmtree(left)
            temporary.mkdir()

    def complete(self, step: int, temporary: Path, final: Path, values: Tree) -> None:
        """Seal what every process has written and give it its name."""
        try:
            write_json(temporary / "state.json", values)
            seal(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync(self.directory)
        except Exception as error:
            raise self.failed(step, error) from error
        for old in [s for s in self.steps() if s != step][: -self.keep + 1 or None]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def failed(self, step: int, error: Exception) -> RunStopped:
        """The one sentence for a checkpoint that could not be written."""
        whole = [s for s in self.steps() if s != step]
        kept = f"the checkpoint of step {whole[-1]} is intact" if whole else "there is no other"
        return RunStopped(
            f"the checkpoint of step {step} could not be written to {self.directory}: "
            f"{root_cause(error)}; {kept}. Make room or set runs_dir=<a writable directory>, "
            "and give the same command again"
        )

    def newest(self) -> int | None:
        """Step of the newest checkpoint whose every file is what was written.

        Others are put aside as step_*.damaged, with a warning.
        """
        found = None
        if self.processes.is_main:
            for step in reversed(self.steps()):
                if (damage := verify(self.path(step))) is None:
                    found = step
                    break
                aside = self.path(step).with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.path(step), aside)
                warnings.warn(
                    f"checkpoint {self.path(step)} is damaged ({damage}): put aside as "
                    f"{aside.name}, using the one before it if there is one",
                    stacklevel=2,
                )
        return self.processes.broadcast(found)

    def load(self, step: int, recipe: Stateful) -> dict[str, Any]:
        """Load checkpoint `step` into `recipe`; returns the loop's state. Raises RunStopped."""
        path = self.path(step)
        values = json.loads((path / "state.json").read_text())
        expected = {key: leaf for key, leaf in flatten({"recipe": recipe.state_dict()}).items()}
        arrays = {key: leaf for key, leaf in expected.items() if is_array(leaf)}
        backend = BACKENDS[recipe.framework]
        saved = backend.shapes(path / "arrays")
        wanted = {key: tuple(leaf.shape) for key, leaf in arrays.items()}
        if saved != wanted:
            differ = sorted(k for k in {*saved, *wanted} if saved.get(k) != wanted.get(k))
            first = differ[0]
            raise RunStopped(
                f"checkpoint {path} belongs to another configuration: {len(differ)} arrays differ, "
                f"the first is {first}: saved {saved.get(first)}, expected {wanted.get(first)}. "
                "Set run=<another name>, or restore the configuration it was made with",
                code=2,
            )
        loaded = {**values, **backend.load(path / "arrays", arrays)}
        tree = unflatten(loaded)
        recipe.load_state_dict(tree["recipe"])
        return tree.get("loop", {})


def root_cause(error: BaseException) -> str:
    """The innermost message of a chain of exceptions, on one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def seal(directory: Path) -> None:
    """Sync every file and directory below, and write their hashes to manifest.json."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        sync(path)
        digests[path.relative_to(directory).as_posix()] = sha256(path)
    write_json(directory / "manifest.json", digests)
    for path in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
        sync(path)


def verify(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    for name, digest in manifest.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} does not match its hash"
    return None


class TorchArrays:
    """torch's distributed checkpoint (DCP) over safetensors: every process writes its shards."""

    @staticmethod
    def save(path: Path, arrays: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        with warnings.catch_warnings():  # it warns that one process is one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
            dcp.save({k: v.detach() for k, v in arrays.items()}, storage_writer=writer)

    @staticmethod
    def load(path: Path, arrays: dict[str, Any]) -> dict[str, Any]:
        """Read into the given tensors, in place; they may be sharded in any way."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        target = {k: v.detach() for k, v in arrays.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(target, storage_reader=HuggingFaceStorageReader(str(path)))
        return target

    @staticmethod
    def shapes(path: Path) -> dict[str, tuple[int, ...]]:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        return {k: tuple(v.size) for k, v in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


class JaxArrays:
    """orbax: every process writes its shards; a restore takes the sharding of its target."""

    @staticmethod
    def save(path: Path, arrays: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), unflatten(arrays))
            checkpointer.wait_until_finished()

    @staticmethod
    def load(path: Path, arrays: dict[str, Any]) -> dict[str, Any]:
        import jax
        import orbax.checkpoint as ocp

        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, unflatten(arrays))
        with ocp.StandardCheckpointer() as checkpointer:
            return flatten(checkpointer.restore(path.absolute(), target))

    @staticmethod
    def shapes(path: Path) -> dict[str, tuple[int, ...]]:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute())
        tree = getattr(metadata, "item_metadata", metadata)
        tree = getattr(tree, "tree", tree)
        return {key: tuple(leaf.shape) for key, leaf in flatten(tree).items()}


BACKENDS: dict[str, Any] = {"torch": TorchArrays, "jax": JaxArrays}
