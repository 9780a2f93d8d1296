"""The visual inputs of one call: which there are, where their tokens stand, and what the encoder said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.boundary import Places
from vtc.encoding import encoding_of
from vtc.errors import VtcError
from vtc.visual import Layout


@dataclass
class Inputs:
    """Visual inputs: images in the order of their placeholders, then clips.

    Attributes:
        layouts, modalities: one per visual input.
        features: `(N_i, D)` projected features per visual input.
        rows: saliency per encoder layer that was read, `(N_i,)` per visual input.
        places: where their tokens stand in the prompts.
    """

    layouts: list[Layout]
    modalities: list[str]
    features: list[Tensor]
    rows: dict[int, list[Tensor]]
    places: Places


def visual_inputs(
    adapter: Adapter, encoded: Mapping[str, Any], masks: Mapping[str, Tensor], real: Tensor | None
) -> Inputs:
    """Put together what the encoder returned and where it stands.

    Args:
        adapter: of the model.
        encoded: outputs of the encoder, by modality; `pooler_output` holds `(N_i, D)` features per input.
        masks: `(B, S)` bool per modality, where its tokens stand.
        real: `(B, S)` bool, which tokens are not padding; `None` if all are.

    Which prompt an input belongs to, and which tiles stand together, only the ids know: for several prompts, or several
    tiles, it is read from the device, once.
    """
    features = {modality: adapter.features(modality, output) for modality, output in encoded.items()}
    spots: list[Tensor] = []
    for modality, found in features.items():
        sizes = [len(feature) for feature in found]
        # A sort, as `nonzero` waits for the device.
        order = masks[modality].flatten().byte().sort(descending=True, stable=True).indices[: sum(sizes)]
        spots += order.split(sizes)
    batch, size = next(iter(masks.values())).shape
    several = batch > 1 or (adapter.joined and len(spots) > 1)
    lengths, first, last = _read(spots, batch, size, real) if several else ([size], [0] * len(spots), [])
    rows = [place // size for place in first] if several else [0] * len(spots)

    inputs = Inputs([], [], [], {}, Places(spots, rows, lengths if batch > 1 else [size]))
    for modality, found in features.items():
        known = encoding_of(encoded[modality])
        here = rows[len(inputs.layouts) : len(inputs.layouts) + len(found)]
        origins = _same(encoded[modality].pooler_output, known.features) or _origins(here, len(known.layouts), batch)
        for feature, origin in zip(found, origins, strict=True):
            layout = known.layouts[origin]
            if layout.tokens != len(feature):
                raise VtcError(
                    f"a visual input has {len(feature)} visual tokens, not {layout.tokens}: calls that split it "
                    "(prefill_chunk_size) or change how the model makes its features cannot be compressed"
                )
            inputs.layouts.append(layout)
            inputs.modalities.append(modality)
            inputs.features.append(feature)
            for layer, scores in known.rows.items():
                inputs.rows.setdefault(layer, []).append(scores[origin].to(feature.device))
    return _join(inputs, first, last) if adapter.joined and len(spots) > 1 else inputs


def _read(
    spots: Sequence[Tensor], batch: int, size: int, real: Tensor | None
) -> tuple[list[int], list[int], list[int]]:
    """Real tokens per prompt, and the first and last flat place of each input's tokens."""
    device = spots[0].device
    filled = torch.full((batch,), size, device=device) if real is None else real.sum(1)
    ends = [torch.stack([places[0], places[-1]]) for places in spots]
    read = torch.cat([filled, *ends]).tolist()
    return read[:batch], read[batch::2], read[batch + 1 :: 2]


def _same(features: Sequence[Tensor], encoded: Sequence[Tensor]) -> list[int]:
    """Which run of the encoder each input comes from, if callers and `generate` hand on the very same tensors."""
    numbers = {id(feature): number for number, feature in enumerate(encoded)}
    found = [numbers.get(id(feature), -1) for feature in features]
    return [] if -1 in found else found


def _origins(rows: Sequence[int], encoded: int, batch: int) -> list[int]:
    """Which run of the encoder each input comes from, if they are copies.

    Beam search and num_return_sequences repeat each prompt, with all its inputs, after the encoder ran.

    Args:
        rows: the row of each input, ascending.
        encoded: how many inputs the encoder saw.
        batch: number of rows.
    """
    repeats, rest = divmod(len(rows), encoded)
    if rest or (repeats > 1 and batch % repeats):
        raise VtcError(f"{len(rows)} visual inputs arrived, but the encoder saw {encoded}")
    if repeats == 1:
        return list(range(encoded))
    origins, start = [], 0
    for prompt in range(0, batch, repeats):
        count = sum(row == prompt for row in rows)
        origins += list(range(start, start + count)) * repeats
        start += count
    return origins


def _join(inputs: Inputs, first: Sequence[int], last: Sequence[int]) -> Inputs:
    """Make one visual input of those that stand next to each other in a prompt."""
    groups = [[0]]
    for number in range(1, len(first)):
        rows = inputs.places.rows
        beside = first[number] == last[number - 1] + 1 and rows[number] == rows[number - 1]
        if beside:
            groups[-1].append(number)
        else:
            groups.append([number])
    places = inputs.places
    return Inputs(
        layouts=[_side_by_side([inputs.layouts[i] for i in group]) for group in groups],
        modalities=[inputs.modalities[group[0]] for group in groups],
        features=[torch.cat([inputs.features[i] for i in group]) for group in groups],
        rows={layer: [torch.cat([x[i] for i in group]) for group in groups] for layer, x in inputs.rows.items()},
        places=Places(
            [torch.cat([places.spots[i] for i in group]) for group in groups],
            [places.rows[group[0]] for group in groups],
            places.lengths,
        ),
    )


def _side_by_side(layouts: Sequence[Layout]) -> Layout:
    """One layout with the views of all."""
    views, start = [], 0
    for layout in layouts:
        views += [replace(view, start=view.start + start) for view in layout.views]
        start += layout.tokens
    return Layout(start, tuple(views))
