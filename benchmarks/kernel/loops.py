"""The operations as papers' code has them: a Python loop over the choices, or everything in memory at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def k_center(x: Tensor, k: int) -> Tensor:
    """Distances of all pairs, and per choice a row minimum over a gathered block that grows."""
    unit = x / x.norm(dim=1, keepdim=True)
    distance = 1.0 - unit @ unit.T  # (N, N)
    chosen = torch.empty(k, dtype=torch.long, device=x.device)
    for step in range(k):
        if step == 0:
            score = distance.topk(2, dim=0, largest=False).values[1]
        else:
            score = distance.index_select(0, chosen[:step]).amin(dim=0)
        chosen[step] = score.argmax()
    return chosen


def dpp(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    unit = normalize(x.float(), dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    gain = kernel.diagonal().clone()
    factor = torch.zeros(k, len(x), device=x.device)
    chosen = torch.empty(k, dtype=torch.long, device=x.device)
    for step in range(k):
        pick = gain.argmax()
        chosen[step] = pick
        row = kernel[pick] - torch.einsum("t,tn->n", factor[:step, pick], factor[:step])
        factor[step] = row / gain[pick].sqrt()
        gain -= factor[step].square()
        gain[pick] = -torch.inf
    return chosen


def over(call: Callable[..., Tensor], *inputs: Tensor, k: int) -> Tensor:
    """One visual input after the other."""
    return torch.stack([call(*row, k) for row in zip(*inputs, strict=True)])


def attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`(B, H, M, N)`: the attention map, as an encoder with eager attention returns it."""
    shared = query.shape[2] // key.shape[2]
    score = query.transpose(1, 2) @ key.repeat_interleave(shared, 2).permute(0, 2, 3, 1) * scale
    return score.softmax(-1, dtype=torch.float32).to(query.dtype)


def merge(x: Tensor, keep: Tensor) -> Tensor:
    unit = normalize(x, dim=2)
    near = unit @ unit.gather(1, keep[..., None].expand(-1, -1, x.shape[2])).mT
    share = one_hot(near.argmax(2), keep.shape[1]).to(x.dtype)  # (B, N, K)
    return share.mT @ x / share.sum(1).clamp_min(1)[..., None]


def peaks(x: Tensor, neighbours: int) -> Tensor:
    distance = torch.cdist(x.float(), x.float()) / x.shape[2] ** 0.5
    density = (-distance.topk(neighbours, dim=2, largest=False).values.square().mean(2)).exp()
    density = density + torch.rand_like(density) * 1e-6
    denser = density[:, None] > density[:, :, None]
    separation = torch.where(denser, distance, distance.flatten(1).amax(1)[:, None, None]).amin(2)
    return separation * density


def compact(x: Tensor, numbers: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By indexing, which for rows of one prompt is the fastest that torch has."""
    row = torch.arange(len(index), device=index.device)[:, None]
    return x[row, index], numbers[:, row, index], mask[row, index]
