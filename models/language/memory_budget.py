"""Memories of a context: one interface, two ledgers.

Whatever is kept of a text that was read once (all of it, a part of its keys and values, trained
rows, changed weights, sentences to look up) is a state, and answers questions after the text is
gone:

    state  = memory.absorb(tokens)                    tokens [b, t]: b documents, each by itself
    logits = memory.score(state, questions, owner)    questions [n, q], each about one document

Two ledgers, both exact, because text is thousands of times smaller than its keys and values:

    stored     bytes of the file from which a fresh process answers (`export`, `load`)
    resident   bytes that the model must hold while it answers: keys and values of everything the
               question attends to, those of retrieved text included; or fast weights as loaded

A state is a table of tensors, the documents first, so that every memory is stored in one way.

Dimensions: b documents, t tokens, n questions of q tokens, p rows, kv key/value heads, hd width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.language.config import TransformerConfig, matmul_parameters
from models.language.inference.cache import KVCache
from models.language.mixers import Past
from models.language.prefix import Prefix, Reading, read
from models.language.presses import Scores, press, snapkv
from models.language.quantised import Codes, QuantisedPrefix, quantise
from models.language.transformer import Transformer

State = dict[str, Tensor]


class ContextMemory(ABC):
    """What is kept of documents, and how questions are answered from it.

    A subclass is built with its model and its budget; what it knows of documents is in the state
    alone, so that another process can answer from the file.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.config = model, model.config

    @abstractmethod
    def absorb(self, tokens: Int[Tensor, "b t"]) -> State:
        """Read documents of one length."""

    @abstractmethod
    def score(
        self, state: State, questions: Int[Tensor, "n q"], owner: Int[Tensor, " n"]
    ) -> Float[Tensor, "n q vocab"]:
        """Logits after each token of questions, each about the document `owner`."""

    @abstractmethod
    def resident_bytes(self, state: State) -> float:
        """Bytes that one document's state takes while a question is answered, on average."""

    @abstractmethod
    def flops(self, what: str, tokens: int) -> float:
        """Floating-point operations to `absorb` a document or to `score` a question of so many
        tokens, in the state of the last document that was absorbed."""

    def export(self, state: State, document: int, path: Path) -> int:
        """Write one document's state; returns the bytes of the file, which is what is stored."""
        own = {name: x[document : document + 1].cpu() for name, x in state.items()}
        save_file({name: x.contiguous() for name, x in without_absent(own).items()}, path)
        return path.stat().st_size

    def load(self, path: Path) -> State:
        """The state of one document."""
        device = self.model.embed.weight.device
        return with_absent({name: x.to(device) for name, x in load_file(path).items()})


def forward_flops(config: TransformerConfig, tokens: float, before: float = 0.0) -> float:
    """Of one forward pass over `tokens` tokens behind `before` rows: 2 N per token and 4 H hd per
    pair of a query and a key that it sees."""
    pairs = tokens * before + tokens * (tokens + 1) / 2
    width = config.num_heads * config.resolved_head_dim
    return 2 * matmul_parameters(config) * tokens + 4 * width * config.num_layers * pairs


def row_bytes(model: Transformer) -> int:
    """Bytes of the keys and values of one token in all layers."""
    config = model.config
    width = config.resolved_kv_heads * config.resolved_head_dim
    return 2 * config.num_layers * width * model.embed.weight.element_size()


class PrefixMemory(ContextMemory):
    """A memory that is a prefix: rows of keys and values for each document."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        self.rows = 0

    def prefix(self, state: State) -> Prefix:
        """Rows of every document."""
        return unpack(state)

    @torch.no_grad()
    def score(self, state: State, questions: Tensor, owner: Tensor) -> Tensor:
        every = self.prefix(state)
        counts = None if every.counts is None else tuple(c[owner] for c in every.counts)
        own = Prefix(every.map(lambda x: x[owner]).layers, every.position, counts)
        return self.model(questions, cache=own)

    def resident_bytes(self, state: State) -> float:
        prefix = self.prefix(state)
        return prefix.num_bytes / len(prefix.layers[0][0])

    def flops(self, what: str, tokens: int) -> float:
        if what == "absorb":
            return forward_flops(self.config, tokens)
        return forward_flops(self.config, tokens, self.rows)


class FullContext(PrefixMemory):
    """All keys and values."""

    @torch.no_grad()
    def absorb(self, tokens: Tensor) -> State:
        self.rows = tokens.shape[1]
        return pack(read(self.model, tokens).prefix())


class NoContext(PrefixMemory):
    """The first token alone, which every document has."""

    @torch.no_grad()
    def absorb(self, tokens: Tensor) -> State:
        self.rows = 1
        return pack(read(self.model, tokens[:, :1]).prefix())


class Pressed(PrefixMemory):
    """What a press keeps of the keys and values.

    Args:
        keep: rows of each head, on average over the heads of a layer.
        scores: reading -> a score for each row (`presses.py`).
        adaptive: heads of a layer compete for its rows.
        readings: how often the context is read to be scored.
    """

    def __init__(
        self,
        model: Transformer,
        keep: int,
        scores: Callable[[Reading], Scores],
        *,
        adaptive: bool = False,
        readings: int = 1,
    ) -> None:
        super().__init__(model)
        self.rows, self.scores, self.adaptive, self.readings = keep, scores, adaptive, readings

    @torch.no_grad()
    def absorb(self, tokens: Tensor) -> State:
        reading = read(self.model, tokens)
        kept = press(
            reading, self.scores(reading), self.rows, adaptive=self.adaptive,
            floor=1 if self.adaptive else 0,
        )  # fmt: skip
        return pack(kept)

    def flops(self, what: str, tokens: int) -> float:
        cost = super().flops(what, tokens)
        if what == "absorb" and self.readings > 1:
            cost += (self.readings - 1) * forward_flops(self.config, tokens, tokens)
        return cost


class Quantised(PrefixMemory):
    """All keys and values in few bits; arguments as of `quantise`."""

    def __init__(self, model: Transformer, bits: int, group: int = 32, residual: int = 0) -> None:
        super().__init__(model)
        self.bits, self.group, self.residual = bits, group, residual

    @torch.no_grad()
    def absorb(self, tokens: Tensor) -> State:
        self.rows = tokens.shape[1]
        prefix = read(self.model, tokens).prefix()
        coded = quantise(prefix, self.bits, group=self.group, residual=self.residual)
        state = pack(coded.recent)
        for i, (key, value) in enumerate(zip(coded.keys, coded.values, strict=True)):
            for name, codes in (("keys", key), ("values", value)):
                parts = zip(("packed", "scale", "zero"), codes.tensors, strict=True)
                state |= {f"{part}.{name}.{i}": x for part, x in parts}
        return state

    def coded(self, state: State) -> QuantisedPrefix:
        """The codes of every document."""

        def codes(name: str) -> tuple[Codes, ...]:
            return tuple(
                Codes(
                    state[f"packed.{name}.{i}"],
                    state[f"scale.{name}.{i}"],
                    state[f"zero.{name}.{i}"],
                    self.bits,
                )
                for i in range(self.config.num_layers)
            )

        return QuantisedPrefix(codes("keys"), codes("values"), unpack(state))

    def prefix(self, state: State) -> Prefix:
        return self.coded(state).prefix()

    def resident_bytes(self, state: State) -> float:
        """Of the codes: a kernel that reads them holds nothing else."""
        return self.coded(state).num_bytes / len(state["position"])


class QueryAware(PrefixMemory):
    """What SnapKV keeps with the question in view: one answer is faster, nothing is compressed.

    Its state is the text, which every question reads anew; what was kept for it is resident.

    Args:
        keep: rows of each head.
    """

    def __init__(self, model: Transformer, keep: int) -> None:
        super().__init__(model)
        self.rows = keep

    def absorb(self, tokens: Tensor) -> State:
        self.length = tokens.shape[1]
        return {"tokens": tokens.int()}

    @torch.no_grad()
    def score(self, state: State, questions: Tensor, owner: Tensor) -> Tensor:
        texts = state["tokens"][owner].long()
        reading = read(self.model, torch.cat([texts, questions], dim=1))
        scores = snapkv(reading, question=questions.shape[1])
        kept = press(reading, scores, self.rows, rows=texts.shape[1])
        return self.model(questions, cache=kept)

    def resident_bytes(self, state: State) -> float:
        return self.rows * row_bytes(self.model)

    def flops(self, what: str, tokens: int) -> float:
        if what == "absorb":
            return 0.0
        again = forward_flops(self.config, self.length + tokens)
        return again + forward_flops(self.config, tokens, self.rows)


class FastWeightMemory(ContextMemory):
    """What a model with fast weights keeps: the state of each layer, whatever was read.

    Args:
        model: a decoder of layers with fast weights alone; not the others' reader.
    Raises:
        ValueError: it has layers with attention.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        if any(layer is not None for layer in KVCache(self.config, 1, 1).layers):
            names = ", ".join(dict.fromkeys(self.config.mixers))
            raise ValueError(f"its layers are {names}; none may keep keys and values")

    @torch.no_grad()
    def absorb(self, tokens: Tensor) -> State:
        cache = KVCache(self.config, *tokens.shape, device=tokens.device)
        self.model.hidden(tokens, cache=cache)
        state = {}
        for i, past in enumerate(cache.past):
            assert past is not None
            state |= {f"fast.{i}.{j}": x for j, x in enumerate(leaves(past.state))}
            state[f"recent.{i}"] = past.recent
            state[f"pending.{i}"] = torch.full((len(tokens),), past.pending)
        state["position"] = torch.full((len(tokens),), tokens.shape[1])
        return state

    @torch.no_grad()
    def score(self, state: State, questions: Tensor, owner: Tensor) -> Tensor:
        position = int(state["position"][0])
        cache = KVCache(self.config, len(questions), position + questions.shape[1])
        cache.length = position
        for i in range(self.config.num_layers):
            count = sum(name.startswith(f"fast.{i}.") for name in state)
            own = iter([state[f"fast.{i}.{j}"][owner] for j in range(count)])
            mixer: Any = self.model.blocks[i].attention
            nested = mixer.start(1)  # None: one tensor, zero at first
            fast = next(own) if nested is None else rebuilt(nested, own)
            pending = int(state[f"pending.{i}"][0])
            cache.past[i] = Past(fast, state[f"recent.{i}"][owner], pending)
        return self.model(questions, cache=cache)

    def resident_bytes(self, state: State) -> float:
        kept = [x for name, x in state.items() if name.startswith(("fast.", "recent."))]
        return sum(x.numel() * x.itemsize for x in kept) / len(state["position"])

    def flops(self, what: str, tokens: int) -> float:
        """Of the projections; a state is read and written at less than their cost."""
        return 2 * matmul_parameters(self.config) * tokens


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and tables, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree
    return [x for item in items if item is not None for x in leaves(item)]


def rebuilt(tree: Any, values: Any) -> Any:
    """The same nesting with other tensors, taken from an iterator."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return next(values)
    if isinstance(tree, dict):
        return {key: rebuilt(item, values) for key, item in tree.items()}
    made = [rebuilt(item, values) for item in tree]
    return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)


def pack(prefix: Prefix) -> State:
    """A prefix of every document as a state."""
    documents = len(prefix.layers[0][0])
    state = {"position": torch.full((documents,), prefix.position)}
    for i, (k, v) in enumerate(prefix.layers):
        state |= {f"keys.{i}": k, f"values.{i}": v}
    for i, counts in enumerate(prefix.counts or ()):
        state[f"counts.{i}"] = counts
    return state


def unpack(state: State) -> Prefix:
    """The inverse of `pack`."""
    layers = sum(name.startswith("keys.") for name in state)
    rows = tuple((state[f"keys.{i}"], state[f"values.{i}"]) for i in range(layers))
    counts = tuple(state[f"counts.{i}"] for i in range(layers)) if "counts.0" in state else None
    return Prefix(rows, int(state["position"][0]), counts)


def without_absent(state: State) -> State:
    """One document's state, of whose rows [1, p, kv, hd] only those that a head has are left,
    [rows of all heads, hd], head by head."""
    found = dict(state)
    for name in state:
        if name.startswith("counts."):
            i, counts = name.removeprefix("counts."), state[name][0]
            for side in ("keys", "values"):
                rows = state[f"{side}.{i}"][0]  # right-aligned
                own = [rows[len(rows) - n :, head] for head, n in enumerate(counts.tolist())]
                found[f"{side}.{i}"] = torch.cat(own)
    return found


def with_absent(state: State) -> State:
    """The inverse of `without_absent`."""
    found = dict(state)
    for name in state:
        if name.startswith("counts."):
            i, counts = name.removeprefix("counts."), state[name][0].tolist()
            for side in ("keys", "values"):
                own = state[f"{side}.{i}"].split(counts)
                table = own[0].new_zeros(1, max(counts), len(counts), own[0].shape[-1])
                for head, rows in enumerate(own):
                    table[0, max(counts) - len(rows) :, head] = rows
                found[f"{side}.{i}"] = table
    return found
