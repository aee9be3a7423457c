"""The file of a cartridge: safetensors with a header that says what it belongs to.

    keys.<layer>, values.<layer>     [tokens, kv, hd], in one dtype
    metadata["cartridge"]            JSON, the fields of `Header`

A cartridge answers only in the model that it was trained in, at the positions that it was trained
at, so loading checks all of it: the model by the hash of its configuration and weights, every
shape, the number of tokens, and the content by its own hash, since safetensors notices a truncated
file but no flipped bit. Nothing is ever unpickled: `import_published` reads the .pt files of
github.com/HazyResearch/cartridges with torch's restricted loader, which builds tensors and runs
nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models.language.prefix import Prefix
from models.language.transformer import Transformer

FORMAT = 1
PAGE = 64
"Tokens of a page of the cache: a cartridge fills whole ones, so that requests can share them."


@dataclass(frozen=True)
class Header:
    """What a cartridge belongs to."""

    model: str
    "`fingerprint` of the model."
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    tokens: int
    "Rows p of each layer, a multiple of `page`."
    page: int
    position: int
    "At which the first token after it stands."
    corpus: str
    "sha256 of what it stands for, hexadecimal."
    content: str = ""
    "sha256 of its keys and values, as `content_hash` computes it."
    lineage: dict[str, Any] = field(default_factory=dict)
    "Where it comes from: parents (content hashes), configuration, seed, code."
    format: int = FORMAT


class CartridgeError(ValueError):
    """A cartridge that cannot be used, and why."""


def fingerprint(model: Transformer) -> str:
    """sha256 of a model's configuration and weights, hexadecimal; the same on every device."""
    found = hashlib.sha256(repr(model.config).encode())
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(_bytes(parameter))
    return found.hexdigest()


def content_hash(prefix: Prefix) -> str:
    """sha256 of the keys and values of every layer, in order, hexadecimal."""
    found = hashlib.sha256()
    for layer in prefix.layers:
        for x in layer:
            found.update(f"{list(x.shape)} {x.dtype}".encode())
            found.update(_bytes(x))
    return found.hexdigest()


def save_cartridge(
    path: str | Path,
    prefix: Prefix,
    *,
    model: str,
    corpus: str,
    page: int = PAGE,
    lineage: dict[str, Any] | None = None,
) -> Header:
    """Write a cartridge; the file is whole or not there (the caller renames it, if it must).

    Args:
        prefix: of each layer [p, kv, hd].
        model: `fingerprint` of the model that it was trained in.
        corpus: sha256 of what it stands for.
        page: p must be a multiple of it.
    Raises:
        CartridgeError: rows that are no cartridge's.
    """
    shapes = {tuple(x.shape) for layer in prefix.layers for x in layer}
    if len(shapes) != 1 or prefix.counts is not None or len(next(iter(shapes))) != 3:
        raise CartridgeError(
            f"a cartridge has rows [p, kv, hd] of one shape in every layer, got {sorted(shapes)}"
        )
    tokens, kv, hd = next(iter(shapes))
    dtype = str(prefix.layers[0][0].dtype).removeprefix("torch.")
    _check_tokens(tokens, page, "the cartridge")
    header = Header(
        model, len(prefix.layers), kv, hd, dtype, tokens, page, prefix.position, corpus,
        content_hash(prefix), lineage or {},
    )  # fmt: skip
    tensors = {}
    for i, (k, v) in enumerate(prefix.layers):
        tensors |= {f"keys.{i}": k.detach().cpu().contiguous()}
        tensors |= {f"values.{i}": v.detach().cpu().contiguous()}
    metadata = {"cartridge": json.dumps(dataclasses.asdict(header), sort_keys=True)}
    safetensors.torch.save_file(tensors, path, metadata)
    return header


def load_cartridge(
    path: str | Path, model: Transformer | None = None, *, device: torch.device | str = "cpu"
) -> tuple[Prefix, Header]:
    """Read a cartridge and check it.

    Args:
        model: the model that is to use it; None checks the file alone.
    Raises:
        CartridgeError: the file is missing, damaged, no cartridge, or another model's; it says
            which.
    """
    path = Path(path)
    if not path.is_file():
        raise CartridgeError(f"there is no cartridge {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CartridgeError(f"{path} is damaged or no safetensors file: {error}") from error
    header = read_header(metadata, path)
    expected = {f"{name}.{i}" for name in ("keys", "values") for i in range(header.layers)}
    shape = (header.tokens, header.kv_heads, header.head_dim)
    if set(tensors) != expected:
        raise CartridgeError(f"{path} does not hold the {header.layers} layers of its header")
    for name, x in tensors.items():
        dtype = str(x.dtype).removeprefix("torch.")
        if tuple(x.shape) != shape or dtype != header.dtype:
            raise CartridgeError(
                f"{path}: {name} is {list(x.shape)} {dtype}, its header says {list(shape)} "
                f"{header.dtype}"
            )
    layers = tuple((tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in range(header.layers))
    prefix = Prefix(layers, header.position)
    if content_hash(prefix) != header.content:
        raise CartridgeError(
            f"{path}: keys and values have changed since they were written (their hash is another "
            "one): fetch or train the cartridge again"
        )
    if model is not None:
        check_model(header, model, str(path))
    return prefix.map(lambda x: x.to(device)), header


def read_header(metadata: dict[str, str], path: Path) -> Header:
    """The header in a file's metadata. Raises CartridgeError."""
    try:
        fields = json.loads(metadata["cartridge"])
        header = Header(**fields)
    except KeyError:
        raise CartridgeError(f"{path} is a safetensors file, but no cartridge") from None
    except (ValueError, TypeError) as error:
        raise CartridgeError(f"{path}: its header cannot be read: {error}") from error
    if header.format != FORMAT:
        raise CartridgeError(
            f"{path} has format {header.format}, this version reads {FORMAT}: convert it with the "
            "version that wrote it"
        )
    for item in dataclasses.fields(Header):
        value, kind = getattr(header, item.name), {"int": int, "str": str}.get(str(item.type), dict)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CartridgeError(f"{path}: its header has {item.name}={value!r}")
    if min(header.layers, header.kv_heads, header.head_dim, header.position) < 1:
        raise CartridgeError(f"{path}: its header has sizes or positions below 1")
    _check_tokens(header.tokens, header.page, str(path))
    return header


def check_model(header: Header, model: Transformer, name: str) -> None:
    """Raise CartridgeError unless the cartridge was trained in this very model."""
    config = model.config
    ours = (config.num_layers, config.resolved_kv_heads, config.resolved_head_dim)
    theirs = (header.layers, header.kv_heads, header.head_dim)
    if ours != theirs:
        raise CartridgeError(
            f"{name} is for a model with layers, key/value heads and head width "
            f"{', '.join(map(str, theirs))}; this one has {', '.join(map(str, ours))}"
        )
    if header.model != (own := fingerprint(model)):
        raise CartridgeError(
            f"{name} was trained in the model {header.model[:12]}, this one is {own[:12]}: the "
            "shapes agree but the weights or the configuration do not"
        )


def import_published(path: str | Path, *, position: int | None = None) -> Prefix:
    """The rows of a .pt file of github.com/HazyResearch/cartridges, frozen ones first.

    It is a table of parameter lists, one [1, kv, p, hd] for each layer, keys after the rotation:
    trainable_keys, trainable_values, and fixed_ (June 2025) or frozen_ (later) ones.

    Args:
        position: at which the first token after them stands; None: after as many as there are rows.
    Raises:
        CartridgeError: the file needs more than tensors and containers to be read, or has another
            layout.
    """
    path = Path(path)
    if not path.is_file():
        raise CartridgeError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([torch.nn.ParameterList]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the unpickler, the archive or the disk: they share no base
        raise CartridgeError(
            f"{path} cannot be read without running code, or is damaged: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict):
        raise CartridgeError(f"{path} holds a {type(content).__name__}, no table of tensors")
    parts: list[tuple[list[Tensor], list[Tensor]]] = []
    for kind in ("frozen", "fixed", "trainable"):
        found = [_tensors(content.get(f"{kind}_{name}"), path) for name in ("keys", "values")]
        if found[0] or found[1]:
            parts.append((found[0], found[1]))
    if not parts or any(len(k) != len(v) or len(k) != len(parts[0][0]) for k, v in parts):
        raise CartridgeError(
            f"{path} has no trainable_keys and trainable_values of as many layers: it has "
            f"{', '.join(map(str, content))[:200] or 'nothing'}"
        )
    layers = []
    for i in range(len(parts[0][0])):
        k, v = (torch.cat([part[side][i] for part in parts], dim=2)[0] for side in (0, 1))
        layers.append((k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()))
    rows = layers[0][0].shape[0]
    return Prefix(tuple(layers), rows if position is None else position)


def _tensors(value: Any, path: Path) -> list[Tensor]:
    """A layer's [1, kv, p, hd] each, from a list or a ParameterList or nothing."""
    if value is None:
        return []
    items = list(value.values()) if isinstance(value, dict) else list(value)
    for x in items:
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[0] != 1:
            raise CartridgeError(f"{path}: expected tensors [1, kv, p, hd] for each layer")
    return [x.detach() for x in items]


def _check_tokens(tokens: int, page: int, name: str) -> None:
    if page < 1 or tokens < 1 or tokens % page:
        raise CartridgeError(
            f"{name} has {tokens} tokens, which is no multiple of its page of {page}"
        )


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
