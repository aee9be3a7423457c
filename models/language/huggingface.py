"""Read and write Hugging Face checkpoints of the Llama, Mistral and Qwen3 families.

`from_pretrained(directory)` gives a `Transformer`; `save_pretrained(model, directory)` writes a
directory that transformers loads. Both use config.json and safetensors only: a pickle (`.bin`,
`.pt`) can run code when it is opened, so it is refused. Nothing is downloaded.

The rotary layout, the grouped heads and the [out, in] weights are the same on both sides: tensors
are renamed (`_MODULES`), never rearranged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models.language.config import RopeScaling, TransformerConfig
from models.language.transformer import Transformer

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MODULES = {  # ours -> theirs; the same in the three families
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
}


def from_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """Load a checkpoint directory.

    Args:
        directory: holds config.json, and model.safetensors or its index.json and shards.
        dtype: of the parameters; None keeps the embedding's.
        device: where they go.
    Raises:
        ValueError: a file is missing or malformed, the architecture has an option this model
            lacks, or tensors are missing, unexpected or of another shape than config.json says.
    """
    directory = Path(directory)
    config = config_from_huggingface(_read_json(directory / "config.json"))
    state = _read_tensors(directory, torch.device(device))
    with torch.device("meta"):
        model = Transformer(config)
    expected = {_their_name(name): parameter for name, parameter in model.named_parameters()}
    if config.tie_embeddings and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        if not torch.equal(head, state.get("model.embed_tokens.weight", head)):
            raise ValueError(
                f"{directory}: lm_head.weight differs from model.embed_tokens.weight although "
                "config.json ties them: set tie_word_embeddings to false"
            )
    _check_tensors(directory, state, {name: p.shape for name, p in expected.items()})
    dtype = dtype or state["model.embed_tokens.weight"].dtype
    ours = {name: state[_their_name(name)].to(dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(ours, assign=True)
    return model


def save_pretrained(
    model: Transformer, directory: str | Path, *, max_position_embeddings: int = 32768
) -> None:
    """Write config.json and model.safetensors as transformers (4.51 or later, and 5) reads them.

    Args:
        directory: created if need be; its config.json and model.safetensors are replaced.
        max_position_embeddings: the context length to declare, in tokens; our model sets no limit.
    Raises:
        ValueError: the model has n-gram tables, which no Hugging Face architecture has.
    """
    config = config_to_huggingface(model.config, max_position_embeddings)
    config["dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    tensors = {_their_name(n): p.detach().contiguous() for n, p in model.named_parameters()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def config_from_huggingface(config: dict[str, Any]) -> TransformerConfig:
    """Our configuration for the contents of a config.json, of transformers 4 or 5.

    Raises:
        ValueError: another `model_type`, an option this model lacks, or a missing key.
    """
    family = config.get("model_type")
    if family not in _ARCHITECTURES:
        raise ValueError(
            f"config.json has model_type={family!r}: supported are {', '.join(_ARCHITECTURES)}"
        )
    for key, only in {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "quantization_config": None,
    }.items():
        if config.get(key, only) != only:
            raise ValueError(
                f"config.json has {key}={config[key]!r}, this model supports only {only!r}: "
                "convert the checkpoint first, or use another one"
            )
    # An absent key means "derive it" for Llama, but a number of transformers' own for the others.
    optional = dict.get if family == "llama" else _require
    scaling, theta = _rope(config)
    return TransformerConfig(
        vocab_size=_require(config, "vocab_size"),
        d_model=_require(config, "hidden_size"),
        num_layers=_require(config, "num_hidden_layers"),
        num_heads=_require(config, "num_attention_heads"),
        num_kv_heads=optional(config, "num_key_value_heads"),
        head_dim=_require(config, "head_dim") if family == "qwen3" else config.get("head_dim"),
        d_ff=_require(config, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family == "qwen3",
        window=_window(config),
        tie_embeddings=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def config_to_huggingface(
    config: TransformerConfig, max_position_embeddings: int = 32768
) -> dict[str, Any]:
    """The contents of a config.json that describes `config`; the inverse of the above.

    Raises:
        ValueError: n-gram tables, which no Hugging Face architecture has.
    """
    if config.ngram_orders:
        raise ValueError(
            f"model.ngram_orders={list(config.ngram_orders)}: Hugging Face has no such architecture"
        )
    family = "qwen3" if config.qk_norm else "llama" if config.window is None else "mistral"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    theirs = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.resolved_vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": config.resolved_head_dim,
        "intermediate_size": config.resolved_d_ff,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4 reads these two, 5 reads the third
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": rope,
        "sliding_window": config.window,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_position_embeddings,
        # Token ids are the tokenizer's business; absent, Llama's defaults would be assumed.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "qwen3":
        theirs |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
    return theirs


def _rope(config: dict[str, Any]) -> tuple[RopeScaling | None, float]:
    """Scaling and theta, from `rope_parameters` (transformers 5) or the two keys of 4."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or partial != 1.0:
        raise ValueError(
            f"config.json has rope_type={kind!r}, partial_rotary_factor={partial}: supported are "
            "'default' and 'llama3' over the whole head"
        )
    if kind == "default":
        return None, theta
    context = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    if context is None:
        raise ValueError("config.json: rope_type 'llama3' needs original_max_position_embeddings")
    return RopeScaling(
        factor=_require(rope, "factor"),
        low_freq_factor=_require(rope, "low_freq_factor"),
        high_freq_factor=_require(rope, "high_freq_factor"),
        original_context=context,
    ), theta


def _window(config: dict[str, Any]) -> int | None:
    """The sliding window that all layers share; Llama has none, Qwen3 only if switched on."""
    family, window = config["model_type"], config.get("sliding_window")
    if family == "mistral":
        return window
    if family == "llama" or not config.get("use_sliding_window", False) or window is None:
        return None
    layers = config["num_hidden_layers"]
    first = config.get("max_window_layers", 28)  # transformers: layers from here on slide
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = set(config.get("layer_types") or default)
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ValueError(
            f"config.json mixes {sorted(kinds)} layers (layer_types, max_window_layers={first}): "
            "this model has one window for all layers"
        )
    return window


def _their_name(name: str) -> str:
    """blocks.3.attention.q_proj.weight -> model.layers.3.self_attn.q_proj.weight"""
    if not name.startswith("blocks."):
        module, _, parameter = name.partition(".")
        return f"{_MODULES[module]}.{parameter}"
    _, layer, module, rest = name.split(".", 3)
    return f"model.layers.{layer}.{_MODULES.get(module, module)}.{rest}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a directory with a Hugging Face checkpoint")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def _read_tensors(directory: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of the checkpoint, by their Hugging Face names."""
    state: dict[str, Tensor] = {}
    for file in _tensor_files(directory):
        try:
            tensors = safetensors.torch.load_file(file, device=str(device))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
        if repeated := state.keys() & tensors.keys():
            raise ValueError(f"{file} repeats tensors of another shard: {sorted(repeated)[:3]}")
        state |= tensors
    # Checkpoints before 2024 store the rotary frequencies, which config.json determines.
    return {n: t for n, t in state.items() if not n.endswith("rotary_emb.inv_freq")}


def _tensor_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in directory.glob(s))
        hint = f"; {', '.join(pickles[:3])} is a pickle, which is never opened" if pickles else ""
        raise ValueError(
            f"{directory} holds neither {single.name} nor {index.name}{hint}: "
            "convert the checkpoint to safetensors first"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: download the checkpoint again")
    files = sorted(set(map(str, weight_map.values())))
    for name in files:
        # The hub's cache links each file to a blob elsewhere: it is the name that must stay inside.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {name!r}: a shard must be a .safetensors file beside the index"
            )
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing, though {index.name} lists it")
    return [directory / name for name in files]


def _check_tensors(
    directory: Path, state: dict[str, Tensor], expected: dict[str, torch.Size]
) -> None:
    missing, unexpected = (
        sorted(expected.keys() - state.keys()),
        sorted(state.keys() - expected.keys()),
    )
    if missing or unexpected:
        raise ValueError(
            f"{directory}: {len(missing)} tensors are missing {missing[:3]} and {len(unexpected)} "
            f"are unexpected {unexpected[:3]}: config.json does not describe these files"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ValueError(
                f"{directory}: {name} has shape {list(state[name].shape)}, config.json asks for "
                f"{list(shape)}"
            )


def _require(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"config.json lacks {key!r}, which this architecture needs")
    return config[key]
