"""`tiny-qwen2vl`: it is trained as it is used, and what it has to show for a comparison on it to mean anything."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vtc
from training import packing, text, tiny_qwen2vl
from vtc.eval import accuracy, sizes
from vtc.eval.items import digest
from vtc.eval.sizes import QUESTION_TYPES, Scenes

FOLDER = Path(vtc.__file__).parent / "zoo" / "tiny-qwen2vl"
QUESTIONS = 240  # of the test split; the standard error of a share is at most 3.3 points
MEDIA = ((1, 64, 128), (1, 96, 64), (6, 64, 80))


@pytest.fixture(scope="module")
def fresh() -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_qwen2vl.build().eval()
    torch.nn.init.normal_(model.model.visual.merger.mlp[2].weight, std=0.3)  # so that the picture matters
    return model


@pytest.mark.parametrize("size", MEDIA)
@pytest.mark.parametrize("some", [False, True])
def test_packed_questions_get_the_logits_they_would_get_alone(
    fresh: torch.nn.Module, size: tuple[int, int, int], some: bool
) -> None:
    """Tower, M-RoPE positions and mask, against the model's forward on one prompt; dropping tokens keeps the rest."""
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
        kept = None
        if some:
            kept = torch.stack([torch.randperm(tokens.shape[1])[:7].sort().values for _ in scenes])
        hidden = tiny_qwen2vl.answers(fresh, tokens, grid, packed, kept)
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
                if kept is None:
                    expected = fresh(input_ids=row, mm_token_type_ids=types, **media).logits[0, -1]
                else:
                    place = fresh.model.get_rope_index(row, types, **{names[1]: thw})[0]
                    stay = torch.cat([torch.arange(3), kept[b] + 3, torch.arange(3 + tokens.shape[1], row.shape[1])])
                    embeds = fresh.model.language_model.embed_tokens(row)
                    embeds[0, 3 : 3 + tokens.shape[1]] = tokens[b]
                    out = fresh.model.language_model(inputs_embeds=embeds[:, stay], position_ids=place[:, :, stay])
                    expected = fresh.lm_head(out.last_hidden_state)[0, -1]
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


# ------------------------------------------------------------------------------------------------------ trained weights


@pytest.fixture(scope="module")
def share() -> Callable[..., float]:
    """Share of right answers under one compressor or, given several, their mean."""
    model, processor = vtc.zoo.load("tiny-qwen2vl")
    items = list(sizes.questions("test", QUESTIONS))
    words = accuracy.longest_answer(processor, items)

    @functools.cache
    def prepared(blind: bool) -> list[accuracy.Batch]:
        return accuracy.batches(processor, items, 40, blind=blind)

    @functools.cache
    def one(spec: str, blind: bool) -> float:
        with vtc.compress(model, spec):
            return accuracy.score(accuracy.answer(model, processor, prepared(blind), words), items)[0].accuracy

    def measure(*specs: str, blind: bool = False) -> float:
        return sum(one(spec, blind) for spec in specs) / len(specs)

    return measure


def test_it_answers_and_needs_to_look(share: Callable[..., float]) -> None:
    assert share("none") >= 0.8 and share("none", blind=True) <= 0.3


def test_informed_choice_beats_chance_at_11_percent(share: Callable[..., float]) -> None:
    chance = share("random:keep=0.11,seed=0", "random:keep=0.11,seed=1")
    assert share("divprune:keep=0.11") >= chance + 0.1


def test_the_processor_makes_the_pixels_of_training() -> None:
    """Pictures of any size and clips; neither is scaled."""
    _, processor = vtc.zoo.load("tiny-qwen2vl")
    for size in MEDIA:
        scene = Scenes("val", size)[0]
        inputs = accuracy.process(processor, ["Where is the star?"], [(scene.medium,)])
        pixels = inputs["pixel_values" if size[0] == 1 else "pixel_values_videos"]
        torch.testing.assert_close(pixels, tiny_qwen2vl.patches([scene])[0].flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = vtc.zoo.load("tiny-qwen2vl")[1].tokenizer
    for item in sizes.questions("test"):
        question, reply = (
            tokenizer(words, add_special_tokens=False).input_ids for words in (item.question, item.answer)
        )
        assert tokenizer.unk_token_id not in question + reply and len(reply) == 1


def test_the_folder_is_small_and_safe() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".safetensors"}


def test_the_model_card_is_about_these_questions() -> None:
    card = json.loads((FOLDER / "accuracy.json").read_text())
    assert card["digest"] == digest(sizes.questions("test"))
    assert card["digest"] in (FOLDER / "README.md").read_text()
    assert card["first"]["none"]["all"] >= 0.8
