"""The training of `tiny-onevision` sees what the model sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import vtc
from training import packing, text, tiny_onevision
from training.tiny_onevision import LANGUAGE, Shown
from vtc.eval import accuracy
from vtc.eval.clips import Clips, Pairs, Pictures


@pytest.fixture(scope="module")
def fresh() -> Any:
    """The model that training starts from, with weights far enough from zero that a wrong mask shows."""
    torch.manual_seed(0)
    model = tiny_onevision.build().eval()
    torch.nn.init.normal_(model.model.image_newline)
    return model


def shown(kind: str) -> tuple[Shown, dict[str, torch.Tensor]]:
    """Two prompts as training packs them, and what the model takes for the same."""
    if kind == "clip":
        some = tiny_onevision.show_clips([Clips("val", (6, 9), (1, 2)).make(seed, 7) for seed in range(2)])
        return some, {"pixel_values_videos": some.tiles[some.index]}
    if kind == "pair":
        some = tiny_onevision.show_pairs([Pairs("val")[seed] for seed in range(2)])
        sizes, counts = torch.full((4, 2), 64), torch.tensor([2, 2])
        views = some.tiles[some.index].flatten(0, 1)[:, None]
        return some, {"pixel_values": views, "image_sizes": sizes, "batch_num_images": counts}
    some = tiny_onevision.show_pictures([Pictures("val").make(seed, (2, 1)) for seed in range(2)])
    sizes, counts = torch.tensor([[128, 64]] * 2), torch.tensor([1, 1])
    return some, {"pixel_values": some.tiles[some.index], "image_sizes": sizes, "batch_num_images": counts}


@pytest.mark.parametrize("kind", ["clip", "pair", "picture"])
def test_packed_equals_the_model(kind: str, fresh: Any) -> None:
    """Logits of every question are those of the plain model on pixels, in a prompt of its own."""
    some, given = shown(kind)
    slots = 4
    packed = tiny_onevision.pack([asked[:slots] for asked in some.asked], slots)
    tower = fresh.model.vision_tower
    with torch.no_grad():
        features = tower(some.tiles, output_hidden_states=True).hidden_states[-1]
        tokens = some.tokens(fresh.model.multi_modal_projector(features), fresh.model.image_newline)
        states = tiny_onevision.read(fresh, tokens, packed)
        logits = fresh.lm_head(states).unflatten(1, (slots, packing.SLOT))
    visual = LANGUAGE.ids[tiny_onevision.VIDEO if kind == "clip" else text.IMAGE]
    before = [*LANGUAGE.encode(text.BOS), *LANGUAGE.encode(text.USER), *[visual] * tokens.shape[1]]
    for k in range(min(slots, *map(len, some.asked))):
        rows = [asked[k] for asked in some.asked]
        for b, question in enumerate(rows):
            one = {name: value[b : b + 1] for name, value in given.items()}
            if kind == "pair":
                one = {name: value[b * len(value) // 2 : (b + 1) * len(value) // 2] for name, value in given.items()}
            ids = [*LANGUAGE.encode(question.text), *LANGUAGE.encode(text.ASSISTANT)]
            with torch.no_grad():
                alone = fresh(input_ids=torch.tensor([before + ids]), **one).logits[0, len(before) :]
            torch.testing.assert_close(logits[b, k, : len(ids)], alone, atol=1e-3, rtol=1e-3)


def test_the_trainer_reads_what_the_model_reads(fresh: Any) -> None:
    some, _ = shown("clip")
    tower = fresh.model.vision_tower
    with torch.no_grad():
        theirs = tower(some.tiles, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(tiny_onevision.look(tower, some.tiles), theirs)


def test_the_start_is_what_tiny_llava_sees(fresh: Any) -> None:
    """Without [CLS] and normalisation the old tower still says what it said: most old answers are right at once."""
    right = []
    some = tiny_onevision.show_pictures([Pictures("val").make(seed, (1, 1)) for seed in range(30)])
    asked = [[q for q in questions if q.type in ("colour", "shape")][:4] for questions in some.asked]
    packed = tiny_onevision.pack(asked, 4)
    with torch.no_grad():
        features = fresh.model.multi_modal_projector(tiny_onevision.look(fresh.model.vision_tower, some.tiles))
        newline = torch.zeros_like(fresh.model.image_newline)
        states = tiny_onevision.read(fresh, some.tokens(features, newline), packed)
        right = packing.answer(fresh, states, packed)[1][packed.types >= 0]
    assert right.float().mean() > 0.7


def test_the_chronicle_tells_what_happened() -> None:
    names = list(tiny_onevision.Chronicle.SIZES)
    told = dict.fromkeys(names, 0)
    for seed in range(30):
        clip = Clips("val")[seed]
        targets = tiny_onevision.chronicle(clip).reshape(clip.length, 16, len(names))
        owners = clip.owners(16).reshape(-1, 16)[clip.states]
        for frame in range(clip.length):
            for cell in range(16):
                row = dict(zip(names, targets[frame, cell].tolist(), strict=True))
                assert row["scene"] == clip.scene_at(frame)
                if owners[frame, cell] == 0:
                    assert {row[name] for name in names[:-1]} == {-1}
                    continue
                actor = clip.actors[owners[frame, cell] - 1]
                (left, top), (height, width) = actor.place_at(frame), actor.opacity.shape
                assert row["place"] == 3 * ((2 * top + height) * 3 // 128) + (2 * left + width) * 3 // 128
                assert row["turned"] == (actor.colour_at(frame) != actor.colour)
                assert (row["moved"] > 0) == (actor.place_at(frame) != actor.place)
                assert (row["rank"] >= 0) == (actor.kind == "digit")
                for name in names:
                    told[name] += row[name] > 0
    assert min(told.values()) > 0
    for size, column in zip(tiny_onevision.Chronicle.SIZES.values(), range(len(names)), strict=True):
        assert all(tiny_onevision.chronicle(Clips("val")[seed])[:, column].max() < size for seed in range(30))


@pytest.mark.parametrize("kind", ["clip", "pair", "picture"])
def test_every_visual_token_has_its_targets(kind: str, fresh: Any) -> None:
    some, _ = shown(kind)
    features = torch.zeros(len(some.tiles), 64, 1)
    newline = torch.ones(1)
    lines = some.tokens(features, newline)[..., 0] == 1  # (B, N)
    assert some.told.shape == (*lines.shape, 6)
    assert (some.told[..., 5] == -1).equal(lines)
    assert (some.told[..., 0] >= 0).any(1).all()


def test_the_processor_keeps_every_frame_as_it_is() -> None:
    """What the processor makes of frames of the right size is what training saw."""
    pytest.importorskip("torchvision", reason="torchvision, which processors of clips need, is not installed")
    _, processor = vtc.zoo.load("tiny-onevision")
    clip = Clips("val").make(0, 20)
    some = tiny_onevision.show_clips([clip])
    given = accuracy.process(processor, ["How many scenes are there?"], [(clip.frames,)])
    torch.testing.assert_close(given["pixel_values_videos"], some.tiles[some.index], atol=1e-5, rtol=1e-5)
    picture = Pictures("val").make(0, (2, 1))
    drawn = tiny_onevision.show_pictures([picture])
    given = accuracy.process(processor, ["Where is the star?"], [(Image.fromarray(picture.frames[0]),)])
    torch.testing.assert_close(given["pixel_values"], drawn.tiles[drawn.index], atol=1e-5, rtol=1e-5)
