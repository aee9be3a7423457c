"""Decoders that were trained before: this project's own runs, and Hugging Face checkpoints.

A directory with model.safetensors and model.json (what a run exports), one with config.json and
safetensors (Llama, Mistral, Qwen3), or a name on the hub. Safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from models.language.config import TransformerConfig
from models.language.transformer import Transformer
from training.errors import UserError
from training.files import sha256
from training.provenance import ROOT

FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*")


def locate(where: str, key: str = "recipe.weights") -> Path:
    """The directory that holds a checkpoint: a path, here or in this project, or from the hub.

    Raises:
        UserError: there is no such directory, and the hub cannot be asked or does not know it.
    """
    for path in (Path(where).expanduser(), ROOT / where):
        if path.is_dir():
            return path
    if where.count("/") != 1 or where.startswith(("/", ".", "~")):
        raise UserError(
            f"{key}={where}: there is no such directory; give one with model.safetensors and "
            "model.json or config.json, or a name on the hub (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(where, allow_patterns=list(FILES)))
    except Exception as error:  # of the hub, the network or a missing login: they share no base
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={where} is no directory, and could not be had from the hub: {why}. "
            "Download it where there is a network, and give its directory"
        ) from error


def fingerprint(named: str | list[str], key: str) -> str:
    """Hash of the safetensors that a path, or a list of them, names.

    Raises:
        UserError: there is no such file, directory or checkpoint.
    """
    total = hashlib.sha256()
    for where in [named] if isinstance(named, str) else named:
        path = Path(where).expanduser()
        files = [path] if path.is_file() else sorted(locate(where, key).glob("*.safetensors"))
        for file in files:
            total.update(sha256(file).encode())
    return total.hexdigest()


def typed(kind: type, content: Any) -> Any:
    """What a file says of a configuration, as its dataclass.

    Raises:
        ValueError: it has other keys, or values of other types or ranges.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(content, dict):
        raise ValueError(f"a mapping of {kind.__name__}'s keys is expected")
    if "${" in json.dumps(content):
        raise ValueError("${...} stands for nothing in a file that was exported")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), content))
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error


def config_of(directory: Path) -> TransformerConfig:
    """The configuration of a checkpoint. Raises UserError."""
    from models.language.huggingface import config_from_huggingface

    own, theirs = directory / "model.json", directory / "config.json"
    file = own if own.is_file() else theirs
    try:
        content = json.loads(file.read_text())
        if file == theirs:
            return config_from_huggingface(content)
        return _own_config(content)
    except OSError:
        raise UserError(f"{directory} holds neither model.json nor config.json") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} does not describe a decoder: {error}") from error


def context_of(directory: Path) -> int | None:
    """Tokens that a checkpoint was made to read at once; None if it does not say."""
    try:
        found = json.loads((directory / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def load_decoder(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """A checkpoint's model, its weights frozen.

    Args:
        dtype: of the weights; None: as stored.
    Raises:
        UserError: a file is missing, damaged, or not what the configuration says.
    """
    from models.language.huggingface import from_pretrained

    try:
        if (directory / "model.json").is_file():
            model = _own(directory, device, dtype)
        else:
            model = from_pretrained(directory, dtype=dtype, device=device)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model.requires_grad_(False).eval()


def _own(directory: Path, device: torch.device | str, dtype: torch.dtype | None) -> Transformer:
    config, file = config_of(directory), directory / "model.safetensors"
    with torch.device("meta"):
        model = Transformer(config)
    tensors = read_tensors(file, device)
    fit(model, {n: x.to(dtype or x.dtype) for n, x in tensors.items()}, file)
    return model


def read_tensors(file: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    """What a safetensors file holds. Raises UserError."""
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(file, device=str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from error


def fit(model: torch.nn.Module, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Give a model on meta its weights. Raises UserError unless names and shapes are its own."""
    expected = {name: x.shape for name, x in model.state_dict().items()}
    found = {name: x.shape for name, x in tensors.items()}
    if expected != found:
        wrong = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
        raise UserError(f"{file} does not fit its model.json: {', '.join(wrong[:3])}")
    model.load_state_dict(tensors, assign=True)


def _own_config(content: dict[str, Any]) -> TransformerConfig:
    if content["name"] != "transformer":
        raise ValueError(f"it is a {content['name']}, not a transformer")
    return typed(TransformerConfig, content)
