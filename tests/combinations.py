"""What the laws are tried on: strategies x families x prompts x attention implementations x precisions.

The product has more members than there is time for. `covering` takes a few hundred of them for each law, such that
every pair of (strategy, family), (family, prompt), (strategy, attention), (family, attention) and (prompt, attention)
occurs, and different laws meet different triples. `pytest --everything` runs the whole product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from families import FAMILIES, LAYERS, NEWEST, Batch, Family
from vtc.compressor import DecoderCompressor, parse

Spec = str | tuple[str, ...]
ATTENTIONS = ("eager", "sdpa")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One member of the product."""

    spec: Spec
    family: Family
    shape: str
    attention: str
    dtype: torch.dtype

    def __str__(self) -> str:
        spec = self.spec if isinstance(self.spec, str) else "+".join(self.spec)
        return f"{spec}-{self.family.name}-{self.shape}-{self.attention}-{str(self.dtype).partition('.')[2]}"

    @property
    def specs(self) -> list[str]:
        return [self.spec] if isinstance(self.spec, str) else list(self.spec)

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        return self.family.shapes[self.shape]

    @property
    def zeros(self) -> int:
        """What older releases of transformers upload more in a compressed prefill: a zero for each eager mask."""
        if NEWEST or self.attention != "eager":
            return 0
        return sum(len(one.cuts(LAYERS)) for one in map(parse, self.specs) if isinstance(one, DecoderCompressor))

    def model(self) -> Any:
        return self.family.model(self.attention, self.dtype)

    def make(self) -> Any:
        return self.family.make(self.attention, self.dtype)

    def batch(self, seed: int = 0) -> Batch:
        return self.family.batch(self.rows, seed, self.dtype)

    def of(self, *rows: Sequence[str], seed: int = 0) -> Batch:
        return self.family.batch(rows, seed, self.dtype)


def applies(spec: Spec, family: Family) -> bool:
    """Whether the family has what the strategy reads, and no visual feature is added behind where it cuts."""
    compressors = [parse(one) for one in ([spec] if isinstance(spec, str) else spec)]
    cuts = [cut for one in compressors if isinstance(one, DecoderCompressor) for cut in one.cuts(LAYERS)]
    read = {need for one in compressors for need in one.needs}
    if family.name == "internvl" and any(one.name == "globalcom2" for one in compressors):
        return False  # nothing tells where its tiles were on the picture
    return (family.class_token or not read & {"cls", "logits"}) and all(cut >= family.deep for cut in cuts)


def everything(specs: Mapping[str, Spec]) -> Iterator[Case]:
    for spec in specs.values():
        for family in FAMILIES.values():
            if applies(spec, family):
                for shape in family.shapes:
                    for attention in ATTENTIONS:
                        for dtype in DTYPES:
                            yield Case(spec, family, shape, attention, dtype)


def covering(specs: Mapping[str, Spec], law: int) -> Iterator[Case]:
    """Every strategy with every family once; prompts, attention and precision take turns."""
    for row, spec in enumerate(specs.values()):
        for column, family in enumerate(FAMILIES.values()):
            if applies(spec, family):
                shapes = list(family.shapes)
                shape = shapes[(row // 2 + column + law) % len(shapes)]
                attention = ATTENTIONS[(row + column + law) % 2]
                dtype = DTYPES[(row + 2 * column + law) % 5 == 0]
                yield Case(spec, family, shape, attention, dtype)
