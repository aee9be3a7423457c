"""How things move when they are pushed: a transformer over objects, whose Gaussians go with them.

MRO-GWM (2026, arXiv:2606.01950; from its abstract and project page, no code is known): a scene is
rigid objects, each a set of Gaussians in a frame of its own; from where objects and pusher were, a
transformer says how each object will be turned and moved. One step:

    token_i   = W [anchors of object i, as seen from the pusher; how far they went since each of
                   the h - 1 times before; action] + e_i
    token_p   = W_p [where the pusher was; action] + e_p
    t_i, w_i  = heads of the transformer's output at token i
    pose_i    = (p_i + t_i, q(w_i) q_i),        q(w) = (1, w / 2) / |(1, w / 2)|

`members` of them, each from weights of its own, disagree where they do not know. Everything is told
as seen from the pusher, as the table is the same everywhere; the pusher goes where it is told.

What differs: anchors are points of the objects, not Gaussians, poses are those of their bodies, and
the horizon is one step, again and again.

Dimensions: b tables, h times that are seen, m objects, a anchors of each, k members.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kernels.splats.project import rotations
from models.worlds.splats.config import MroGwmConfig
from models.worlds.splats.rigid import product

LENGTH = 0.1
"What lengths that the network sees and tells are measured in, and angles in radians."


@dataclass(frozen=True)
class PushHistory:
    """The last h times of tables, and the last is now."""

    poses: Float[Tensor, "b h m 7"]
    "Positions and quaternions wxyz of objects."
    pusher: Float[Tensor, "b h 2"]

    def then(self, poses: Float[Tensor, "b m 7"], pusher: Float[Tensor, "b 2"]) -> PushHistory:
        """One step later."""
        later = torch.cat([self.poses[:, 1:], poses[:, None]], dim=1)
        return replace(
            self, poses=later, pusher=torch.cat([self.pusher[:, 1:], pusher[:, None]], 1)
        )


class Member(nn.Module):
    """One network: how each object moves in a step."""

    def __init__(self, config: MroGwmConfig) -> None:
        super().__init__()
        h, a, width = config.history, config.anchors, config.width
        self.objects = nn.Linear(3 * h * a + 2, width)
        self.pusher = nn.Linear(2 * h + 2, width)
        self.names = nn.Parameter(torch.zeros(config.objects + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 6)

    def forward(
        self,
        anchors: Float[Tensor, "b h m a 3"],
        pusher: Float[Tensor, "b h 2"],
        action: Float[Tensor, "b 2"],
    ) -> tuple[Float[Tensor, "b m 3"], Float[Tensor, "b m 3"]]:
        """Translations, and rotations as vectors of radians."""
        now = F.pad(pusher[:, -1], (0, 1))  # [b 3]
        here = (anchors[:, -1:] - now[:, None, None, None]) / LENGTH
        went = (anchors[:, -1:] - anchors[:, :-1]) / LENGTH
        objects = rearrange(torch.cat([went, here], dim=1), "b h m a c -> b m (h a c)")
        done = action[:, None].expand(-1, objects.shape[1], -1)
        way = ((pusher - pusher[:, -1:]) / LENGTH).flatten(1)
        tokens = torch.cat([
            self.objects(torch.cat([objects, done], dim=-1)),
            self.pusher(torch.cat([way, action], dim=-1))[:, None],
        ], dim=1)  # fmt: skip
        told = self.head(self.norm(self.layers(tokens + self.names)))[:, :-1]
        return LENGTH * told[..., :3], told[..., 3:]


class MroGwm(nn.Module):
    """The ensemble."""

    anchors: Float[Tensor, "m a 3"]
    "Of each object, in its own frame."

    def __init__(self, config: MroGwmConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("anchors", torch.zeros(config.objects, config.anchors, 3))
        self.members = nn.ModuleList(Member(config) for _ in range(config.members))

    def initialise(self, generator: torch.Generator, anchors: Float[Tensor, "m a 3"]) -> None:
        """Weights of small normal numbers, none at the heads: at first nothing moves."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                nn.init.ones_(p) if "norm" in name and "weight" in name else nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
        for member in self.members:
            nn.init.zeros_(member.head.weight)  # type: ignore[union-attr]
        self.anchors.copy_(anchors)

    def forward(
        self, member: int, seen: PushHistory, action: Float[Tensor, "b 2"]
    ) -> Float[Tensor, "b m 7"]:
        """Poses a step later, as one of the members says."""
        placed, now = carried(self.anchors, seen.poses), seen.poses[:, -1]
        move, turn = (x.float() for x in self.members[member](placed, seen.pusher, action))
        small = F.normalize(torch.cat([torch.ones_like(turn[..., :1]), turn / 2], -1), dim=-1)
        return torch.cat([now[..., :3] + move, product(small, now[..., 3:])], dim=-1)

    def rollout(
        self,
        member: int,
        seen: PushHistory,
        actions: Float[Tensor, "b t 2"],
        pusher: Float[Tensor, "b t 2"],
    ) -> Float[Tensor, "b t m 7"]:
        """Poses after every action.

        Args:
            pusher: where it is after every action.
        """
        told = []
        for t in range(actions.shape[1]):
            told.append(self(member, seen, actions[:, t]))
            seen = seen.then(told[-1], pusher[:, t])
        return torch.stack(told, dim=1)

    def imagine(
        self, seen: PushHistory, actions: Float[Tensor, "b t 2"], pusher: Float[Tensor, "b t 2"]
    ) -> tuple[Float[Tensor, "b t m 7"], Float[Tensor, "b t m"]]:
        """Poses after every action, in the mean of the members, each going its own way; and how far
        anchors are from theirs, in the mean over members."""
        ways = torch.stack([
            self.rollout(i, seen, actions, pusher) for i in range(len(self.members))
        ])  # fmt: skip
        middle = mean_pose(ways)
        apart = carried(self.anchors, ways) - carried(self.anchors, middle)
        return middle, apart.norm(dim=-1).mean((0, -1))


def carried(
    points: Float[Tensor, "m a 3"], poses: Float[Tensor, "*b m 7"]
) -> Float[Tensor, "*b m a 3"]:
    """Where points of objects are in the world; by products of numbers, which autocast leaves as
    they are: bf16 would be millimetres off."""
    R = rotations(poses[..., 3:])[..., None, :, :]  # [*b m 1 3 3]
    return (R * points[:, :, None, :]).sum(-1) + poses[..., None, :3]


def mean_pose(poses: Float[Tensor, "k *b 7"]) -> Float[Tensor, "*b 7"]:
    """Of the first dimension; rotations must be near each other."""
    q = poses[..., 3:]
    q = torch.where((q * q[:1]).sum(-1, keepdim=True) < 0, -q, q)
    return torch.cat([poses[..., :3].mean(0), F.normalize(q.mean(0), dim=-1)], dim=-1)
