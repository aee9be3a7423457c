"""How Gaussians move: each motion against what its equation says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from kernels.splats.op import rasterize
from kernels.splats.project import rotations
from models.worlds.splats.config import DynamicGaussiansConfig, Motion
from models.worlds.splats.dynamic_gaussians import DynamicGaussians
from models.worlds.splats.gaussians import Edit, begin
from models.worlds.splats.motions import HexPlane, encoded
from models.worlds.splats.rigid import inverse, product, towards
from models.worlds.splats.tracked import Tracked, bonds_of
from training.envs.ray_tracer import intrinsics, look_at

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails
N = 40


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(FRESH)


def model(motion: Motion, **keys) -> DynamicGaussians:
    """Forty Gaussians anywhere in the box."""
    config = DynamicGaussiansConfig(motion=motion, capacity=60, begin_count=N, degree=0, **keys)
    made = DynamicGaussians(config, times=torch.tensor([0.0, 0.25, 0.75, 1.0]))
    first = begin(torch.rand(N, 3) * 2 - 1, torch.rand(N, 3), 0.5, 0) | made.motion.first(N)
    made.gaussians.apply_edit(Edit(torch.zeros(0, dtype=torch.long), first))
    return made


@pytest.mark.parametrize("motion", Motion)
def test_at_the_beginning_nothing_moves(motion: Motion) -> None:
    made = model(motion)
    still, later = made.scene(), made.scene(0.7)
    for name in ("means", "scales", "sh"):
        torch.testing.assert_close(later[name], still[name])
    torch.testing.assert_close(rotations(later["quats"]), rotations(still["quats"]))


@pytest.mark.parametrize("motion", [Motion.deformation, Motion.hexplane])
def test_a_network_of_place_and_time_moves_each_gaussian_otherwise_at_each_time(motion) -> None:
    made = model(motion)
    torch.nn.init.normal_(made.motion.network.last.weight)
    if motion == Motion.hexplane:
        for plane in made.motion.planes:
            torch.nn.init.normal_(plane)
    early, late = made.scene(0.1)["means"], made.scene(0.9)["means"]
    moved = late - early
    assert moved.abs().amin(0).max() > 0 and moved.std(0).min() > 0
    (early.sum() + late.sum()).backward()
    assert all(p.grad is not None for p in made.motion.parameters())


def test_planes_are_looked_up_at_their_nodes_and_multiplied() -> None:
    """At a node of all six planes the feature is the product of six of their numbers."""
    config = DynamicGaussiansConfig(
        motion=Motion.hexplane, planes=[3, 4, 5, 6], levels=[1], plane_features=2
    )
    planes = HexPlane(config, torch.tensor([[0.0, 0, 0], [2, 3, 4]]))
    for plane in planes.planes:
        torch.nn.init.normal_(plane)
    seen = []
    planes.network.forward = lambda x: seen.append(x) or torch.zeros(len(x), 10)
    node = [1, 2, 3, 4]  # of x, y, z, t: at 1, 2, 3 of the box and 4/5 of the time
    means = torch.tensor([[1.0, 2.0, 3.0]])
    scene = {"means": means, "quats": torch.ones(1, 4), "scales": torch.ones(1, 3)}
    planes(scene, {}, 4 / 5)
    expected = torch.ones(2)
    for i, (a, b) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        expected = expected * planes.planes[i][0, :, node[b], node[a]]
    torch.testing.assert_close(seen[0][0], expected, rtol=1e-4, atol=1e-5)


def test_even_planes_that_are_one_in_time_cost_nothing_and_others_do() -> None:
    made = model(Motion.hexplane).motion
    for plane in made.planes:
        torch.nn.init.ones_(plane)
    assert made.penalty().item() == 0
    for i in range(4):
        torch.nn.init.normal_(made.planes[i])
        assert made.penalty().item() > 0
        torch.nn.init.ones_(made.planes[i])


def test_a_polynomial_is_one() -> None:
    made, time = model(Motion.polynomial), 0.3
    own = made.gaussians
    with torch.no_grad():
        for name in ("velocities", "spins", "middles", "lastings"):
            torch.nn.init.normal_(getattr(own, name), std=0.3)
    still, moved = made.scene(), made.scene(time)
    x = {name: p.detach()[:N].double().numpy() for name, p in own.named_parameters()}
    u = time - x["middles"]
    for k, axis in ((7, 0), (20, 2)):
        b = x["velocities"][k, :, axis]
        expected = x["means"][k, axis] + b[0] * u[k] + b[1] * u[k] ** 2 + b[2] * u[k] ** 3
        assert float(moved["means"][k, axis]) == pytest.approx(expected, abs=1e-5)
    faded = still["opacities"].detach().numpy() * np.exp(-((u / np.exp(x["lastings"])) ** 2))
    np.testing.assert_allclose(moved["opacities"].detach().numpy(), faded, rtol=1e-4)
    spun = x["quats"] + x["spins"] * u[:, None]
    np.testing.assert_allclose(moved["quats"].detach().numpy(), spun, atol=1e-5)


def test_what_is_tracked_goes_on_as_it_went_and_the_past_stays() -> None:
    """An even motion and turn are led on; between times Gaussians are on straight lines."""
    made = model(Motion.tracked)
    tracked, fields = made.motion, made.gaussians.fields()
    assert isinstance(tracked, Tracked)
    velocity, begun = torch.randn(N, 3), fields["means"].detach().clone()
    with torch.no_grad():
        for time in (0.0, 0.25):
            fields["means"].copy_(begun + time * velocity)
            tracked.advance(fields["means"], fields["quats"])
        torch.testing.assert_close(fields["means"], begun + 0.75 * velocity)  # led there
        past = made.scene(0.1)["means"].clone()
        torch.testing.assert_close(past, begun + 0.1 * velocity)
        fields["means"] += torch.randn(N, 3)
        assert torch.equal(made.scene(0.1)["means"], past)
        assert torch.equal(made.scene(0.5)["means"], fields["means"])  # in hand
        for _ in range(2):
            tracked.advance(fields["means"], fields["quats"])
        assert torch.equal(made.scene(1.0)["means"], tracked.means[3, :N])
        half = 0.5 * (tracked.means[2, :N] + tracked.means[3, :N])
        torch.testing.assert_close(made.scene(0.875)["means"], half)


def moved_as(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses that keep Gaussians together, after they went somewhere."""
    made = model(Motion.tracked)
    tracked = made.motion
    fields = {k: x.detach().clone() for k, x in made.gaussians.fields().items()}
    means, quats = fields["means"], torch.nn.functional.normalize(torch.randn(N, 4), dim=-1)
    bonds = bonds_of(means, 6, 1.0)
    tracked.advance(means, quats)
    turn = torch.nn.functional.normalize(torch.randn(4), dim=-1).expand(N, 4)
    if kind == "rigid":
        means = torch.einsum("nij,nj->ni", rotations(turn), means) + torch.randn(3)
        quats = product(turn, quats) * torch.where(torch.rand(N, 1) < 0.5, -1.0, 1.0)
    elif kind == "grown":
        means = 1.5 * means
    elif kind == "turned":  # each by itself
        quats = product(torch.nn.functional.normalize(torch.randn(N, 4), dim=-1), quats)
    elif kind == "spun":  # all alike, but none goes with the others' turn
        quats = product(turn, quats)
    return tracked.together(means, quats, bonds)


def test_neighbours_that_move_as_one_body_cost_nothing_and_others_do() -> None:
    for kind, free in {"rigid": "rigid rot iso", "grown": "rot", "turned": "iso",
                       "spun": "rot iso"}.items():  # fmt: skip
        for name, loss in zip(("rigid", "rot", "iso"), moved_as(kind), strict=True):
            assert (float(loss) < 2e-6) == (name in free.split()), (kind, name, float(loss))


def test_neighbours_are_the_nearest_and_count_the_less_the_further() -> None:
    means = torch.rand(N, 3)
    bonds = bonds_of(means, 5, 30.0)
    for i in (0, 17):
        apart = (means - means[i]).norm(dim=-1)
        nearest = apart.argsort()[1:6]
        assert set(bonds.neighbours[i].tolist()) == set(nearest.tolist())
        expected = (-30 * apart[bonds.neighbours[i]] ** 2).exp()
        torch.testing.assert_close(bonds.weights[i], expected, rtol=1e-4, atol=1e-6)
    assert bonds_of(means[:3], 20, 1.0).neighbours.shape == (3, 2)


def test_quaternions_multiply_as_rotations_do() -> None:
    p, q = (torch.nn.functional.normalize(draw(9, 4), dim=-1) for _ in "pq")
    torch.testing.assert_close(rotations(product(p, q)), rotations(p) @ rotations(q))
    torch.testing.assert_close(rotations(inverse(q)), rotations(q).transpose(-1, -2))
    told = (Rotation.from_quat(p.numpy(), scalar_first=True)
            * Rotation.from_quat(q.numpy(), scalar_first=True)).as_matrix()  # fmt: skip
    np.testing.assert_allclose(rotations(product(p, q)).numpy(), told, atol=1e-12)
    near = towards(-p, p)
    assert torch.equal(near, p)


def test_places_are_encoded_by_sines_that_double() -> None:
    x = draw(5, 2)
    found = encoded(x, 3)
    assert found.shape == (5, 2 * 7)
    torch.testing.assert_close(found[:, 2 + 1], (2 * torch.pi * x[:, 0]).sin())
    assert torch.equal(encoded(x, 0), x)


TIMES = torch.linspace(0, 1, 9)
BETWEEN = 4  # a time that is not trained on


def went(time: float) -> torch.Tensor:
    """Half a circle."""
    angle = torch.tensor(torch.pi * time)
    return 0.15 * torch.stack([angle.cos() - 1, angle.sin(), 0 * angle])


@pytest.mark.slow
@pytest.mark.parametrize("motion", Motion)
def test_where_gaussians_go_is_learned_from_images_and_holds_between_their_times(motion) -> None:
    """A few that all go half round a circle, from three cameras; only motion is learned."""
    torch.manual_seed(0)
    config = DynamicGaussiansConfig(motion=motion, capacity=6, begin_count=6, degree=0, tile=8)
    known = TIMES[[i for i in range(9) if i != BETWEEN]]
    made = DynamicGaussians(config, times=known)
    first = begin(0.3 * torch.randn(6, 3), torch.rand(6, 3), 0.9, 0) | made.motion.first(6)
    first["scales"][:] = -2.0
    if motion == Motion.polynomial:
        first["lastings"][:] = 2.0
    made.gaussians.apply_edit(Edit(torch.zeros(0, dtype=torch.long), first))
    eyes = torch.tensor([[3.0, 0, 1], [-1.5, 2.6, 1], [-1.5, -2.6, 1]])
    cameras = look_at(eyes, torch.zeros(3, 3)), intrinsics(35.0, 32, 32).expand(3, 3, 3), 32, 32
    truth = {}
    with torch.no_grad():
        for time in TIMES.tolist():
            scene = made.scene()
            scene["means"] = scene["means"] + went(time)
            truth[time] = rasterize(**scene, viewmats=cameras[0], Ks=cameras[1], width=32,
                                    height=32, tile=8).color  # fmt: skip
    own = made.gaussians
    learned = [getattr(own, name) for name in made.motion.rows] + list(made.motion.parameters())
    if motion == Motion.tracked:
        learned = [own.means]
    rate = 4e-2 if motion == Motion.polynomial else 1e-2
    optimiser = torch.optim.Adam(learned, rate) if learned else None
    each = 20 if motion == Motion.tracked else 1
    order = known if motion == Motion.tracked else known.repeat(40)
    for time in order.tolist():
        for _ in range(each if optimiser else 0):
            loss = (made(*cameras, time=time).color - truth[time]).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if motion == Motion.tracked:
            fields = own.fields()
            with torch.no_grad():
                made.motion.advance(fields["means"], fields["quats"])
            optimiser = torch.optim.Adam(learned, 1e-2)
    time = float(TIMES[BETWEEN])
    with torch.no_grad():
        off, stayed = ((made(*cameras, time=t).color - truth[time]).abs().mean()
                       for t in (time, None))  # fmt: skip
        if motion == Motion.tracked:
            stayed = (made(*cameras, time=0.0).color - truth[time]).abs().mean()
    assert (off < 0.5 * stayed) == (motion != Motion.still), (float(off), float(stayed))


@pytest.mark.parametrize(
    ("key", "value"),
    [("planes", [3, 3, 3]), ("planes", [1, 3, 3, 3]), ("planes", [3, 3, 3, 2]),
     ("levels", []), ("levels", [0]),
     ("width", 0), ("frequencies", 17), ("time_weight", -1.0)],
)  # fmt: skip
def test_a_configuration_that_makes_no_motion_is_refused(key: str, value) -> None:
    with pytest.raises(ValueError, match=f"model.{key}="):
        DynamicGaussiansConfig(**{key: value})
