"""AnyRes: a thumbnail of the image, then its crops put together on one canvas, cut to the image, newlines between rows.

How a model packs its crops is not repeated here. Numbers of patches, and their places, go through the model's own
`pack_image_features`, and what comes out says which patches every token is made of. That costs milliseconds once per
image size; scores then follow the same way without asking the device anything.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from vtc.adapters.llava.tower import TowerAdapter
from vtc.errors import UnsupportedModelError
from vtc.visual import Layout, View

SIZES = 64  # of so many image sizes the way of the patches is remembered


@dataclass(frozen=True)
class Picture:
    """All that the packing of one image depends on.

    Attributes:
        height, width: of the image as it was before the processor, in pixels.
        views: how many views of it the encoder sees: the thumbnail and the crops, or the thumbnail alone.
        aspect: the model's option `vision_aspect_ratio`, if it has one.
    """

    height: int
    width: int
    views: int
    aspect: str | None = None


@dataclass(frozen=True)
class Packed(Layout):
    """The layout of an image that was packed from several views.

    Attributes:
        encoded: how many views the encoder saw. An image thinner than a patch has crops but no tokens of them.
    """

    encoded: int = 1


@dataclass(frozen=True, eq=False)
class Trace:
    """How one image is packed: token `n` is the sum of patches `index[n]`, in all views, times `weight[n]`.

    `index` is `(N, J)` int64 and `weight` `(N, J)` float32: one patch per token, or four where the model interpolates.
    A newline has weight 0.
    """

    layout: Packed
    index: Tensor
    weight: Tensor


class AnyResAdapter(TowerAdapter):
    """What LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision share.

    Attributes:
        clip_separators: tokens after the last frame of a clip.
    """

    clip_separators: ClassVar[int] = 0

    def __init__(self, multimodal: Any) -> None:
        super().__init__(multimodal)
        self._trace = lru_cache(SIZES)(self._find_trace)
        self._map = lru_cache(SIZES)(self._find_map)
        # An image of each layout. Images of one layout are packed alike: it tells the crops, the part of their canvas
        # that is left, and the size of the grid.
        self._examples: dict[Layout, Picture] = {}

    # ------------------------------------------------------------------------------------------- of each family

    @abstractmethod
    def pack(self, features: Tensor, picture: Picture, newline: Tensor, whole: bool) -> Tensor:
        """The model's own packing of `(V, side * side, C)` with `(C,)` for newlines: `(N, C)`.

        `whole` asks for the packing without interpolation.
        """

    def pool(self, frames: Tensor) -> Tensor:
        """The model's own pooling of frames, `(F, side * side, C)` to `(F, n, C)`."""
        raise UnsupportedModelError(f"{type(self.multimodal).__name__} takes no clips")

    def pictures(self, arguments: Mapping[str, Any]) -> list[Picture]:
        """The images, from the arguments of `get_image_features`."""
        sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
        return [Picture(height, width, self._views(height, width)) for height, width in sizes]

    # ------------------------------------------------------------------------------------------- the interface

    def layouts(self, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        if modality == "video":
            # transformers 5.17 calls it `pixel_values`
            pixels = arguments["pixel_values_videos" if "pixel_values_videos" in arguments else "pixel_values"]
            clips, frames = pixels.shape[:2]
            return [Layout.frames(frames, *self._frame, self.clip_separators, clip=True)] * clips
        layouts: list[Layout] = []
        for picture in self.pictures(arguments):
            layout = self._trace(picture).layout
            self._examples.setdefault(layout, picture)
            layouts.append(layout)
        return layouts

    def features(self, modality: str, output: Any) -> list[Tensor]:
        # transformers 5.17 returns the frames of a clip apart, and appends separators only later.
        found = [feature.flatten(0, -2) for feature in output.pooler_output]
        if modality == "image" or not self.clip_separators or len(found[0]) % math.prod(self._frame):
            return found
        newline = self.multimodal.image_newline.to(found[0]).expand(self.clip_separators, -1)
        return [torch.cat([feature, newline]) for feature in found]

    def token_rows(self, modality: str, rows: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        patches = self.patches(rows)  # (P, side * side)
        if modality == "video":
            pooled = self.pool(patches[..., None]).reshape(len(layouts), -1)  # (clips, N without separators)
            return list(torch.nn.functional.pad(pooled, (0, self.clip_separators)))
        out = []
        views = [layout.encoded for layout in layouts if isinstance(layout, Packed)]
        for layout, part in zip(layouts, patches.split(views), strict=True):
            index, weight = self._map(layout, rows.device)
            out.append((part.flatten()[index] * weight).sum(1))
        return out

    # ------------------------------------------------------------------------------------------- finding the way

    def _views(self, height: int, width: int) -> int:
        config = self.multimodal.config
        size = config.vision_config.image_size
        return int(image_size_to_num_patches((height, width), config.image_grid_pinpoints, size))

    @cached_property
    def _frame(self) -> tuple[int, int]:
        """Rows and columns of tokens of a frame: along a row, the places of its tokens go up."""
        columns = torch.arange(self.side, dtype=torch.float64).repeat(self.side)
        pooled = self.pool(columns[None, :, None])[0, :, 0].tolist()
        falls = [number for number in range(1, len(pooled)) if pooled[number] < pooled[number - 1]]
        width = falls[0] if falls else len(pooled)
        return len(pooled) // width, width

    def _find_trace(self, picture: Picture) -> Trace:
        size = self.side**2
        numbers = torch.arange(picture.views * size, dtype=torch.float64)
        whole = self._push(numbers[:, None], picture, whole=True)[:, 0].long()
        grid = self._grid(whole)  # (rows, columns), which may be none
        if not grid.numel():
            layout = Packed(len(whole), (View(0, self.side, self.side),), encoded=picture.views)
            return Trace(layout, whole.clamp(min=0)[:, None], (whole >= 0).float()[:, None])

        # The place of every patch on this grid, packed in earnest: interpolation gives places between patches.
        rows, columns = grid.shape
        places = torch.zeros(len(numbers), 2, dtype=torch.float64)
        places[grid.flatten()] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
        packed = self._push(places, picture, whole=False)[size:]  # (N - side * side, 2)
        newline = packed[:, 0] < 0
        low = packed.clamp(min=0).floor().long()
        high = torch.minimum(low + 1, torch.tensor([rows - 1, columns - 1]))
        part = (packed - low).masked_fill(newline[:, None], 0)
        (top, left), (bottom, right), (down, across) = low.unbind(1), high.unbind(1), part.unbind(1)
        index = torch.stack([grid[top, left], grid[top, right], grid[bottom, left], grid[bottom, right]], dim=1)
        weight = torch.stack(
            [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], dim=1
        ).masked_fill(newline[:, None], 0)
        if not part.any():
            index, weight = index[:, :1], weight[:, :1]
        thumbnail = torch.arange(size)[:, None].expand(-1, index.shape[1])
        once = torch.zeros(size, index.shape[1], dtype=weight.dtype)
        once[:, 0] = 1

        width = int(newline.int().argmax())
        canvas = View(size, len(packed) // (width + 1), width, 1, *self._box(picture, grid))
        layout = Packed(canvas.stop, (View(0, self.side, self.side), canvas), encoded=picture.views)
        return Trace(layout, torch.cat([thumbnail, index]), torch.cat([once, weight]).float())

    def _push(self, values: Tensor, picture: Picture, whole: bool) -> Tensor:
        """Values `(V * side * side, C)` of the patches to values of the tokens, `(N, C)`; newlines get -1."""
        features = values.view(picture.views, -1, values.shape[1])
        return self.pack(features, picture, values.new_full((values.shape[1],), -1), whole)

    def _grid(self, whole: Tensor) -> Tensor:
        """The patches that make up the canvas, `(rows, columns)`, from the patch of every token, -1 for newlines."""
        size = self.side**2
        thumbnail, canvas = whole[:size], whole[size:]
        columns = int((canvas < 0).int().argmax()) if len(canvas) else 0
        if not columns:
            grid, newlines = canvas.new_empty(0, 0), canvas
        elif len(canvas) % (columns + 1) == 0:
            lines = canvas.view(-1, columns + 1)
            grid, newlines = lines[:, :-1], lines[:, -1]
        else:
            grid, newlines = canvas, canvas
        if not torch.equal(thumbnail, torch.arange(size)) or (newlines >= 0).any() or (grid < size).any():
            raise UnsupportedModelError(
                f"{type(self.multimodal).__name__} does not pack an image as a thumbnail and then rows of patches that "
                "each end with a newline"
            )
        return grid

    def _box(self, picture: Picture, grid: Tensor) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
        """How many crops make up the canvas, and which part of it is left."""
        config = self.multimodal.config
        crops = get_anyres_image_grid_shape(
            (picture.height, picture.width), config.image_grid_pinpoints, config.vision_config.image_size
        )
        down, across = crops

        def place(number: int) -> tuple[int, int]:
            view, patch = divmod(number, self.side**2)
            row, column = divmod(view - 1, across)
            return row * self.side + patch // self.side, column * self.side + patch % self.side

        top, left = place(int(grid[0, 0]))
        bottom, right = place(int(grid[-1, -1]))
        height, width = down * self.side, across * self.side
        return (down, across), (top / height, left / width, (bottom + 1) / height, (right + 1) / width)

    def _find_map(self, layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
        trace = self._trace(self._examples[layout])
        return trace.index.to(device), trace.weight.to(device)
