"""Cartridges: the identity with in-context learning, what is trained, files good and bad."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import safetensors.torch
import torch

from models.language.cartridges import (
    CartridgeRows,
    compose,
    first_tokens,
    random_vectors,
    sampled_chunks,
)
from models.language.cartridges_file import (
    CartridgeError,
    fingerprint,
    import_published,
    load_cartridge,
    save_cartridge,
)
from models.language.config import TransformerConfig
from models.language.inference.cache import KVCache
from models.language.prefix import Prefix, read
from models.language.transformer import Transformer


def build(seed: int = 0, **options) -> Transformer:
    config = TransformerConfig(**{"vocab_size": 41, "d_model": 32, "num_layers": 3} | options)
    return Transformer(config, generator=torch.Generator().manual_seed(seed))


def random_tokens(b: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(41, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[{}, {"num_kv_heads": 2, "qk_norm": True}], ids=["mha", "gqa"])
def model(request) -> Transformer:
    return build(**request.param)


@torch.no_grad()
def test_the_whole_document_untrained_is_in_context_learning(model):
    document, question = random_tokens(1, 64), random_tokens(3, 9, seed=1)
    expected = model(torch.cat([document.expand(3, -1), question], dim=1))[:, 64:]
    tolerance = 1e-5 * expected.abs().max().item()
    rows = CartridgeRows(first_tokens(model, document, 64).map(lambda x: x[0]))()
    found = model(question, cache=rows)
    assert (found - expected).abs().max() < tolerance
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    cache = KVCache(model.config, 3, 9, prefix=rows)
    stepped = torch.cat([model(question[:, i : i + 1], cache=cache) for i in range(9)], dim=1)
    assert (stepped - expected).abs().max() < 2 * tolerance
    off = model(question, cache=Prefix(rows.layers, 65))
    assert (off - expected).abs().max() > 1e3 * tolerance


def test_training_moves_all_rows_but_the_sink_and_no_weight(model):
    before = fingerprint(model)
    model.requires_grad_(False)
    start = first_tokens(model, random_tokens(2, 20), 8)
    rows = CartridgeRows(start)
    assert sum(p.numel() for p in rows.parameters()) == 7 * sum(
        x[:, 0].numel() for layer in start.layers for x in layer
    )
    optimiser = torch.optim.Adam(rows.parameters(), lr=0.1)
    model(random_tokens(2, 5, seed=1), cache=rows()).logsumexp(-1).mean().backward()
    optimiser.step()
    for old, new in zip(start.layers, rows().layers, strict=True):
        for x, y in zip(old, new, strict=True):
            assert torch.equal(x[:, 0], y[:, 0])
            assert (x[:, 1:] != y[:, 1:]).flatten(2).any(-1).all()
    assert fingerprint(model) == before and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="frozen=8 must leave"):
        CartridgeRows(start, frozen=8)


@torch.no_grad()
def test_every_start_has_the_sink_of_the_first_token(model):
    document = random_tokens(2, 40)
    generator = torch.Generator().manual_seed(0)
    first = first_tokens(model, document, 16)
    for start in (
        sampled_chunks(model, document, 16, generator),
        random_vectors(model, document[:, :1], 16, generator),
    ):
        assert start.rows == start.position == 16
        for (k, v), (k0, v0) in zip(start.layers, first.layers, strict=True):
            torch.testing.assert_close(k[:, 0], k0[:, 0])
            torch.testing.assert_close(v[:, 0], v0[:, 0])
            assert not torch.allclose(k[:, 8:], k0[:, 8:])
    with pytest.raises(ValueError, match="too short"):
        first_tokens(model, document, 41)


@torch.no_grad()
def test_composed_with_nothing_a_cartridge_is_itself(model):
    document, other = (random_tokens(1, 16, seed) for seed in (0, 1))
    question = random_tokens(2, 5, seed=2)
    one, two = (first_tokens(model, x, 16).map(lambda x: x[0]) for x in (document, other))
    none = Prefix(one.map(lambda x: x[:0]).layers, 0)
    expected = model(question, cache=one)
    torch.testing.assert_close(model(question, cache=compose([one, none])), expected)
    both = compose([one, two])
    assert both.rows == 32 and both.position == 16
    assert compose([one, two], apart=True).position == 32
    swapped = model(question, cache=compose([two, one]))
    torch.testing.assert_close(model(question, cache=both), swapped, atol=1e-4, rtol=1e-4)


def saved(model: Transformer, path, rows: int = 64, page: int = 64) -> Prefix:
    prefix = first_tokens(model, random_tokens(1, rows), rows).map(lambda x: x[0])
    save_cartridge(
        path, prefix, model=fingerprint(model), corpus="ab" * 32, page=page,
        lineage={"parents": [], "seed": 0},
    )  # fmt: skip
    return prefix


def test_a_file_gives_back_what_was_saved(model, tmp_path):
    path = tmp_path / "document.safetensors"
    prefix = saved(model, path)
    loaded, header = load_cartridge(path, model)
    assert loaded.position == 64 and header.tokens == 64 and header.lineage["seed"] == 0
    for a, b in zip(prefix.layers, loaded.layers, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    again = tmp_path / "again.safetensors"
    saved(model, again)
    assert again.read_bytes() == path.read_bytes()


def test_a_cartridge_of_another_model_is_refused(model, tmp_path):
    path = tmp_path / "document.safetensors"
    saved(model, path)
    options = dataclasses.asdict(model.config)
    twin = build(seed=1, **{k: options[k] for k in ("num_kv_heads", "qk_norm")})
    with pytest.raises(CartridgeError, match="the weights or the configuration do not"):
        load_cartridge(path, twin)
    with pytest.raises(CartridgeError, match="is for a model with layers"):
        load_cartridge(path, build(num_layers=2))


def test_a_damaged_file_is_refused(model, tmp_path):
    path = tmp_path / "document.safetensors"
    saved(model, path)
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CartridgeError, match="damaged or no safetensors"):
            load_cartridge(path)
    start = len(whole) - 1000
    for offset in (start, start + 333, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[offset] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CartridgeError, match="have changed since"):
            load_cartridge(path)
    with pytest.raises(CartridgeError, match="there is no cartridge"):
        load_cartridge(tmp_path / "nowhere")


def rewritten(path, **changes) -> None:
    """The same tensors under a header with other fields."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["cartridge"])
    tensors = safetensors.torch.load_file(path)
    metadata = {"cartridge": json.dumps({**header, **changes})}
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 65}, "no multiple of its page of 64"),
        ({"tokens": 128}, "its header says"),
        ({"page": 0}, "no multiple"),
        ({"position": 0}, "positions below 1"),
        ({"position": "64"}, "position='64'"),
        ({"layers": 2}, "does not hold the 2 layers"),
        ({"format": 9}, "has format 9"),
        ({"dtype": "bfloat16"}, "its header says"),
        ({"unknown": 1}, "cannot be read"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(model, tmp_path, changes, message):
    path = tmp_path / "document.safetensors"
    saved(model, path)
    rewritten(path, **changes)
    with pytest.raises(CartridgeError, match=message):
        load_cartridge(path, model)


def test_a_safetensors_file_without_header_is_no_cartridge(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"keys.0": torch.zeros(64, 1, 8)}, path)
    with pytest.raises(CartridgeError, match="but no cartridge"):
        load_cartridge(path)


def test_rows_that_fill_no_page_are_not_saved(model, tmp_path):
    with pytest.raises(CartridgeError, match="no multiple of its page of 64"):
        saved(model, tmp_path / "odd.safetensors", rows=40)
    assert not (tmp_path / "odd.safetensors").exists()
    saved(model, tmp_path / "small.safetensors", rows=40, page=8)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_published_files_are_read_without_running_them(model, tmp_path):
    prefix = first_tokens(model, random_tokens(1, 8), 8).map(lambda x: x[0])
    rows = [[x.transpose(0, 1)[None] for x in side] for side in zip(*prefix.layers, strict=True)]
    for frozen in ("frozen", "fixed"):
        content = {}
        for name, layers in zip(("keys", "values"), rows, strict=True):
            content[f"{frozen}_{name}"] = torch.nn.ParameterList(
                [torch.nn.Parameter(x[:, :, :1], requires_grad=False) for x in layers]
            )
            content[f"trainable_{name}"] = torch.nn.ParameterList(x[:, :, 1:] for x in layers)
        torch.save(content, tmp_path / "cache.pt")
        found = import_published(tmp_path / "cache.pt")
        assert found.position == 8
        for a, b in zip(found.layers, prefix.layers, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"trainable_keys": Payload()}))
    torch.save({"trainable_keys": Payload()}, tmp_path / "worse.pt")
    for name in ("evil.pt", "worse.pt"):
        with pytest.raises(CartridgeError, match="without running code"):
            import_published(tmp_path / name)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CartridgeError, match="no trainable_keys"):
        import_published(tmp_path / "other.pt")


@torch.no_grad()
def test_reading_on_after_a_cartridge_grows_it(model):
    """An update without training: new tokens after the cartridge become rows behind it."""
    document, news = random_tokens(1, 16), random_tokens(1, 6, seed=1)
    old = first_tokens(model, document, 16)
    grown = compose([old, read(model, news, old).prefix()])
    whole = read(model, torch.cat([document, news], dim=1)).prefix()
    assert grown.position == whole.position == 22
    for a, b in zip(grown.layers, whole.layers, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
