"""Checkpoint exchange: logits equal transformers' both ways; a bad directory says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from models.language.config import RopeScaling, TransformerConfig
from models.language.huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    from_pretrained,
    save_pretrained,
)
from models.language.transformer import Transformer, num_parameters

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CASES = {
    "llama": ("llama", {}),
    "llama_gqa_tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama3_rope": ("llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama_head_dim": ("llama", {"head_dim": 10, "rms_norm_eps": 1e-3}),
    "mistral_window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_window": (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
        },
    ),
}


def their_model(family: str, options: dict):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **SIZES | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    for name, parameter in model.named_parameters():  # norms of one would hide a swap
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tokens(t: int = 40) -> torch.Tensor:
    return torch.randint(61, (2, t), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shard", ["10GB", "20KB"], ids=["one_file", "sharded"])
@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_loads_what_transformers_saved(family, options, shard, tmp_path):
    theirs = their_model(family, options)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = from_pretrained(tmp_path)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)
    assert num_parameters(ours) == theirs.num_parameters()
    assert all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_transformers_loads_what_we_saved(family, options, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = config_from_huggingface(
        {"model_type": family} | their_model(family, options).config.to_dict()
    )
    ours = Transformer(config, generator=torch.Generator().manual_seed(1))
    save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()), rtol=0, atol=1e-5)
    again = from_pretrained(tmp_path)
    assert again.config == config
    assert torch.equal(again(tokens()), ours(tokens()))


def test_both_layouts_of_the_rotary_settings_are_read():
    base = {"model_type": "llama"} | SIZES
    old = base | {
        "rope_theta": 500000.0,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    }
    older = old | {"rope_scaling": {"type": "llama3"} | LLAMA3 | {"rope_type": "llama3"}}
    new = base | {"rope_parameters": LLAMA3}
    expected = config_from_huggingface(new)
    assert expected.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32) and expected.rope_theta == 5e5
    assert config_from_huggingface(old) == config_from_huggingface(older) == expected
    assert config_from_huggingface(base | {"rope_scaling": None}).rope_scaling is None
    explicit = replace(expected, num_kv_heads=4, head_dim=8)
    assert config_from_huggingface(config_to_huggingface(expected)) == explicit


def test_dtype_is_the_checkpoints_unless_given(tmp_path):
    model = Transformer(TransformerConfig(vocab_size=61, d_model=32)).to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).embed.weight.dtype == torch.bfloat16
    assert from_pretrained(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': supported are llama, mistral, qwen3"),
        ({"attention_bias": True}, "attention_bias=True, this model supports only False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', this model supports only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "lacks 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_attention_heads": 5}, "does not divide model.d_model=32"),
        (
            {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 8}
            | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "one window for all layers",
        ),
    ],
)
def test_unsupported_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface({"model_type": "llama"} | SIZES | change)


@pytest.fixture
def checkpoint(tmp_path):
    """A valid directory of ours, to be damaged."""
    model = Transformer(TransformerConfig(vocab_size=61, d_model=32, num_layers=1))
    save_pretrained(model, tmp_path)
    return tmp_path


def rewrite(directory, edit) -> None:
    state = safetensors.torch.load_file(directory / "model.safetensors")
    edit(state)
    safetensors.torch.save_file(state, directory / "model.safetensors")


def test_damaged_tensors_are_named(checkpoint):
    rewrite(checkpoint, lambda state: state.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 tensors are missing \['model.norm.weight'\]"):
        from_pretrained(checkpoint)
    rewrite(checkpoint, lambda state: state.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(
        ValueError, match=r"norm.weight has shape \[31\], config.json asks for \[32\]"
    ):
        from_pretrained(checkpoint)
    rewrite(checkpoint, lambda state: state.update({"model.extra": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"1 are unexpected \['model.extra'\]"):
        from_pretrained(checkpoint)


def test_a_tied_head_that_is_stored_must_be_the_embedding(checkpoint):
    embed = "model.embed_tokens.weight"
    rewrite(checkpoint, lambda state: state.update({"lm_head.weight": state[embed].clone()}))
    assert from_pretrained(checkpoint).lm_head is None
    rewrite(checkpoint, lambda state: state.update({"lm_head.weight": state[embed] + 1}))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        from_pretrained(checkpoint)


def test_stored_rotary_frequencies_are_ignored(checkpoint):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda state: state.update({name: torch.ones(4)}))
    from_pretrained(checkpoint)


def test_pickles_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which is never opened"):
        from_pretrained(checkpoint)


def test_unreadable_files_are_named(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="does not exist: give a directory"):
        from_pretrained(checkpoint / "nowhere")


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "x.bin", ".."],
)
def test_an_index_cannot_leave_its_directory(checkpoint, shard):
    (checkpoint / "model.safetensors").rename(checkpoint / "moved.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ValueError, match=r"must be a \.safetensors file beside the index"):
        from_pretrained(checkpoint)


def test_a_broken_index_is_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "moved.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        from_pretrained(checkpoint)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone.safetensors is missing"):
        from_pretrained(checkpoint)


def test_ngram_tables_cannot_be_exported(tmp_path):
    model = Transformer(TransformerConfig(vocab_size=61, d_model=32, ngram_orders=[2]))
    with pytest.raises(ValueError, match=r"ngram_orders=\[2\]: Hugging Face has no such"):
        save_pretrained(model, tmp_path)
