"""The training of `tiny-qwen2vl` sees what the model sees."""

from __future__ import annotations

import pytest
import torch

import vtc
from training import packing, text, tiny_qwen2vl
from vtc.eval import accuracy
from vtc.eval.sizes import QUESTION_TYPES, Scenes

MEDIA = ((1, 64, 128), (1, 96, 64), (6, 64, 80))


@pytest.fixture(scope="module")
def fresh() -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_qwen2vl.build().eval()
    torch.nn.init.normal_(model.model.visual.merger.mlp[2].weight, std=0.3)  # so that the picture matters
    return model


@pytest.mark.parametrize("size", MEDIA)
def test_packed_questions_get_the_logits_they_would_get_alone(
    fresh: torch.nn.Module, size: tuple[int, int, int]
) -> None:
    """Tower, M-RoPE positions and mask, against the model's forward on one prompt."""
    scenes = [Scenes("val", size)[i] for i in range(2)]
    packed = packing.pack([scene.questions[:4] for scene in scenes], 4, tiny_qwen2vl.LANGUAGE, QUESTION_TYPES)
    pixels = tiny_qwen2vl.patches(scenes)
    rows, columns = (side // 8 for side in size[1:])
    ids = tiny_qwen2vl.LANGUAGE.ids
    clip = size[0] > 1
    with torch.no_grad():
        states = tiny_qwen2vl.look(fresh.model.visual, pixels.flatten(0, 1), rows, columns)
        tokens = fresh.model.visual.merger(states[-1].flatten(0, 1)).view(2, -1, 192)
        grid = (pixels.shape[1], rows // 2, columns // 2)
        hidden = tiny_qwen2vl.answers(fresh, tokens, grid, packed)
        logits = fresh.lm_head(hidden).unflatten(1, (4, packing.SLOT))
        for b, scene in enumerate(scenes):
            for k, question in enumerate(scene.questions[:4]):
                row = [ids[text.BOS], ids[text.USER], ids[tiny_qwen2vl.START]]
                row += [ids[tiny_qwen2vl.VIDEO if clip else tiny_qwen2vl.IMAGE]] * tokens.shape[1]
                row += [ids[tiny_qwen2vl.END], *tiny_qwen2vl.LANGUAGE.encode(question.text), ids[text.ASSISTANT]]
                row = torch.tensor([row])
                types = (row == ids[tiny_qwen2vl.IMAGE]).int() + 2 * (row == ids[tiny_qwen2vl.VIDEO]).int()
                thw = torch.tensor([[grid[0], rows, columns]])
                names = ("pixel_values_videos", "video_grid_thw") if clip else ("pixel_values", "image_grid_thw")
                media = dict(zip(names, (pixels[b].flatten(0, 1), thw), strict=True))
                expected = fresh(input_ids=row, mm_token_type_ids=types, **media).logits[0, -1]
                at = len(tiny_qwen2vl.LANGUAGE.encode(question.text))
                torch.testing.assert_close(logits[b, k, at], expected, atol=1e-4, rtol=1e-4)


def test_targets_stand_where_they_are_told() -> None:
    scenes = [Scenes("val", (1, 96, 128))[i] for i in range(8, 24)]
    asked = [scene.questions[:8] for scene in scenes]
    packed = packing.pack(asked, 8, tiny_qwen2vl.LANGUAGE, QUESTION_TYPES)
    rows, places, spots = tiny_qwen2vl.spots(scenes, asked, packed)
    assert len(rows) >= 6
    assistant = tiny_qwen2vl.LANGUAGE.ids[text.ASSISTANT]
    for row, place, (x, y) in zip(rows.tolist(), places.tolist(), spots.tolist(), strict=True):
        assert packed.ids[row, place] == assistant
        question = asked[row][place // packing.SLOT]
        if question.type == "where":
            assert question.answer == f"{'top' if y < 0 else 'bottom'}-{'left' if x < 0 else 'right'}"
    # Every patch of the tower gets the name of what the picture shows there, in the order of the patches.
    targets = tiny_qwen2vl.targets(scenes)
    order = tiny_qwen2vl.coordinates(12, 16)
    for scene, kinds in zip(scenes, targets.kind, strict=True):
        for (row, column), kind in zip(order.tolist(), kinds.tolist(), strict=True):
            owner = scene.owner[0, row, column]
            assert tiny_qwen2vl.KINDS[kind] == (scene.things[owner - 1].name if owner else "background")


def test_the_processor_makes_the_pixels_of_training() -> None:
    """Pictures of any size and clips; neither is scaled."""
    _, processor = vtc.zoo.load("tiny-qwen2vl")
    for size in MEDIA:
        scene = Scenes("val", size)[0]
        inputs = accuracy.process(processor, ["Where is the star?"], [(scene.medium,)])
        pixels = inputs["pixel_values" if size[0] == 1 else "pixel_values_videos"]
        torch.testing.assert_close(pixels, tiny_qwen2vl.patches([scene])[0].flatten(0, 1), atol=1e-5, rtol=1e-5)
