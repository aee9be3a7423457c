"""Low-rank changes: nothing at first, exactly B A afterwards, the bytes of rows."""

from __future__ import annotations

import pytest
import torch

from models.language.config import TransformerConfig
from models.language.lora import Lora, rank_for, targets
from models.language.memory_budget import row_bytes
from models.language.transformer import Transformer


@pytest.fixture(params=[None, 1], ids=["mha", "mqa"])
def model(request) -> Transformer:
    config = TransformerConfig(
        vocab_size=41, d_model=32, num_layers=2, num_kv_heads=request.param, tie_embeddings=False
    )
    return Transformer(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)


def test_the_change_is_nothing_at_first_and_the_product_of_its_factors_later(model):
    tokens = torch.randint(41, (2, 7), generator=torch.Generator().manual_seed(0))
    lora = Lora(model, 3, generator=torch.Generator().manual_seed(1))
    expected = model(tokens)
    torch.testing.assert_close(lora(model, tokens), expected)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in lora.up.values():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    changed = Transformer(model.config)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, weight in targets(changed).items():
            key = name.replace(".", "_")
            weight += lora.up[key] @ lora.down[key]
    torch.testing.assert_close(lora(model, tokens), changed(tokens))
    assert (lora(model, tokens) - expected).abs().max() > 0.1
    lora(model, tokens).logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_rank_for_rows_takes_as_many_bytes(model):
    for rows in (16, 32, 64):
        rank = rank_for(model.config, rows)
        size = Lora(model, rank).num_bytes
        each = Lora(model, 1).num_bytes
        assert abs(size - rows * row_bytes(model)) <= each / 2 or rank == 1
    with pytest.raises(ValueError, match="rank=0"):
        Lora(model, 0)
