"""The jax twin of `rasterize` shows what the torch function shows, and learns what it learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels import rasterize
from kernels.parity.splats import draw, with_gradients
from kernels.splats.op_jax import enough
from kernels.splats.op_jax import rasterize as twin

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails
ROOM = {"pairs": 2048, "longest": 128}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x.numpy()) for name, x in inputs.items()}


@pytest.mark.parametrize("tile", [8, 16])
def test_the_twin_agrees_with_its_gradients(tile: int) -> None:
    with jax.enable_x64(True):
        for seed in range(FRESH, FRESH + 2):
            inputs, options = draw("small", seed)
            exact = with_gradients(rasterize, inputs, options, impl="torch", tile=tile)
            generator = torch.Generator().manual_seed(1)
            weights = [
                torch.randn(exact[k].shape, generator=generator, dtype=torch.float64).numpy()
                for k in ("color", "alpha", "depth")
            ]

            def loss(given):
                seen = twin(**given, **options, **ROOM, tile=tile)  # noqa: B023
                images = seen.color, seen.alpha, seen.depth
                return sum((x * w).sum() for x, w in zip(images, weights, strict=True)), seen  # noqa: B023

            gradients, seen = jax.jit(jax.grad(loss, has_aux=True))(arrays(inputs))
            found = {"color": seen.color, "alpha": seen.alpha, "depth": seen.depth}
            found |= {f"d {name}": x for name, x in gradients.items()}
            for name, value in exact.items():
                scale = max(1.0, value.abs().max().item())
                wrong = np.abs(np.asarray(found[name]) - value.detach().numpy()).max()
                assert wrong < 1e-9 * scale, (seed, name)


def test_cameras_may_be_mapped_over() -> None:
    inputs, options = draw("small", 7)
    given = arrays({k: x.float() for k, x in inputs.items() if k != "background"})
    if given.get("colors", jnp.zeros((0, 0))).ndim == 3:
        given["colors"] = given["colors"][0]
    viewmats, Ks = given.pop("viewmats"), given.pop("Ks")

    def one(viewmat, K):
        return twin(**given, viewmats=viewmat[None], Ks=K[None], **options, **ROOM).color[0]

    together = twin(**given, viewmats=viewmats, Ks=Ks, **options, **ROOM).color
    np.testing.assert_allclose(jax.vmap(one)(viewmats, Ks), together, atol=2e-5)


def test_room_that_does_not_suffice_is_told_and_doubled_until_it_does() -> None:
    inputs, options = draw("small", 5)
    given = arrays({k: x.float() for k, x in inputs.items()})
    whole = twin(**given, **options, **ROOM)
    room, narrow = (1, 1), twin(**given, **options, pairs=1, longest=1)
    assert int(narrow.pairs) == int(whole.pairs) > 1
    while enough(narrow, *room) != room:
        room = enough(narrow, *room)
        narrow = twin(**given, **options, pairs=room[0], longest=room[1])
    assert room[0] < 2 * int(whole.pairs) and room[1] < 2 * int(whole.longest)
    np.testing.assert_allclose(narrow.color, whole.color, atol=1e-6)


def test_calls_that_cannot_be_are_refused() -> None:
    inputs, options = draw("small", 5)
    given = arrays(inputs)
    with pytest.raises(ValueError, match="pairs=0 and longest=8 must be 1 or more"):
        twin(**given, **options, pairs=0, longest=8)
    with pytest.raises(ValueError, match="either colors or sh"):
        twin(**given | {"sh": None, "colors": None}, **options, **ROOM)
