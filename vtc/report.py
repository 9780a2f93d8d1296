"""`Report`: what one call did, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vtc.errors import VtcError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Report:
    """What one compressed call did.

    Attributes:
        spec: the compressor.
        kept: per visual input, the ascending indices of the survivors in the numbering of the uncompressed tokens.
        sources: per visual input, for each uncompressed token the survivor (0..K-1) it went to, -1 if it was dropped;
            `None` where tokens were only dropped, not merged.
        grids: per visual input, `(frames, rows, columns)` of the uncompressed tokens.
        prompts: number of prompts in the batch.
        sequence_in, sequence_out: length of the (padded) prompt, text included, before and after.
        prefill_flops, prefill_flops_full: FLOPs of the language model's prefill at these lengths, for the whole batch;
            a multiply-add counts as two (see `vtc.eval.flops`).
    """

    spec: str
    kept: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[int, ...] | None, ...]
    grids: tuple[tuple[int, int, int], ...]
    prompts: int
    sequence_in: int
    sequence_out: int
    prefill_flops: int
    prefill_flops_full: int
    fit: Literal["crop", "resize"] = field(default="crop", repr=False)

    @property
    def tokens_in(self) -> int:
        """Visual tokens of the call before compression, all visual inputs together."""
        return sum(frames * rows * columns for frames, rows, columns in self.grids)

    @property
    def tokens_out(self) -> int:
        """Visual tokens of the call after compression, all visual inputs together."""
        return sum(len(kept) for kept in self.kept)

    def __str__(self) -> str:
        ratio = self.prefill_flops / self.prefill_flops_full
        lines = [f"{self.spec}: {self.tokens_in} -> {self.tokens_out} visual tokens, {ratio:.2f}x prefill FLOPs"]
        for number, (kept, grid) in enumerate(zip(self.kept, self.grids, strict=True)):
            shape = "x".join(str(side) for side in grid if side > 1 or grid[0] > 1)
            lines.append(f"  visual input {number}: {shape} = {grid[0] * grid[1] * grid[2]} -> {len(kept)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data."""
        return {**asdict(self), "tokens_in": self.tokens_in, "tokens_out": self.tokens_out}

    def show(self, image: Image, number: int = 0, fit: Literal["crop", "resize"] | None = None) -> Image:
        """A picture of what survived: dropped patches dimmed, merged groups outlined.

        Args:
            image: the picture that was given to the processor.
            number: which visual input of the call it is.
            fit: how the processor brought the picture to the encoder's shape, `"crop"` (its middle) or `"resize"`
                (squashed). Only the processor knows; the default is what processors of this family usually do.
        """
        from vtc.picture import draw

        if not 0 <= number < len(self.kept):
            raise VtcError(f"the call had {len(self.kept)} visual inputs; there is no number {number}")
        return draw(image, self.grids[number], self.kept[number], self.sources[number], fit or self.fit)
