"""Training encodes posters and packs questions exactly as the processor and the model do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training import packing, processors, text, tiny_llava_next
from training.tiny_llava_next import SIDE, TILE, encode, layout, owners, pixels
from vtc.eval import accuracy
from vtc.eval.posters import QUESTION_TYPES, Posters

SEEDS = (0, 1, 2, 7, 9)  # wide and tall, square, with padding on either side, and resized


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava_next.build().eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return processors.llava_next()


@pytest.mark.parametrize("seed", SEEDS)
def test_tiles_are_those_of_the_processor(processor: Any, seed: int) -> None:
    poster = Posters("val")[seed]
    inputs = accuracy.process(processor, ["Where is the star?"], [(poster.pil,)])
    difference = 255 * (packing.STD * (pixels([poster]) - inputs["pixel_values"][0])).abs()  # in steps of 256 greys
    # Pillow and torchvision, whichever does the processor's work, round and clip differently when they resize.
    assert difference.mean() < 0.5 and (difference > 2.01).float().mean() < 1e-3
    assert (inputs["input_ids"] == tiny_llava_next.config().image_token_id).sum() == len(
        layout(*poster.image.shape[:2]).order
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_are_those_of_the_model(model: Any, seed: int) -> None:
    poster = Posters("val")[seed]
    with torch.no_grad():
        (ours,) = encode(model, [poster])
        sizes = torch.tensor([poster.image.shape[:2]])
        (theirs,) = model.get_image_features(pixels([poster])[None], sizes).pooler_output
    torch.testing.assert_close(ours, theirs)


def test_the_sizes_that_matter_are_among_them() -> None:
    sizes = [Posters("val")[seed].image.shape[:2] for seed in SEEDS]
    assert {layout(*size).grid for size in sizes} == {(1, 3), (3, 1), (2, 2)}
    assert len({len(layout(*size).order) for size in sizes}) >= 4
    assert any(layout(*size).resized != size for size in sizes)


def test_packed_equals_alone(model: Any, processor: Any) -> None:
    poster = Posters("val")[1]
    asked = poster.questions[:4]
    packed = packing.pack([asked], 4, types=QUESTION_TYPES)
    with torch.no_grad():
        (features,) = encode(model, [poster])
        logits = model.lm_head(packing.hidden(model, features[None], packed)).unflatten(1, (4, packing.SLOT))
        for k, question in enumerate(asked):
            inputs = accuracy.process(processor, [question.text], [(poster.pil,)])
            inputs["pixel_values"] = pixels([poster])[None]
            alone = model(**inputs).logits[0]
            n = len(text.LLAVA.encode(question.text)) + 1  # and `ASSISTANT:`
            torch.testing.assert_close(logits[0, k, :n], alone[-n:], atol=1e-4, rtol=1e-4)


def test_owners_of_patches_are_the_things_on_the_tiles() -> None:
    for seed in SEEDS:
        poster = Posters("val")[seed]
        owner, share = owners(poster)
        plan = layout(*poster.image.shape[:2])
        assert owner.shape == (plan.tiles, SIDE**2)
        assert set(owner[1:].ravel()) - {0} == set(range(1, len(poster.things) + 1))
        torch.testing.assert_close(torch.from_numpy(share[1:].sum(0)), torch.ones(len(poster.things) + 1).double())
        # Seen from the middle of its tokens, a thing on the thumbnail is where its box says.
        height, width, _ = poster.image.shape
        for i, thing in enumerate(poster.things):
            rows, columns = (owner[0].reshape(SIDE, SIDE) == i + 1).nonzero()
            if len(rows):
                patch = TILE / SIDE
                assert abs((columns.mean() + 0.5) * patch / TILE - thing.centre[0] / width) < 0.09
                assert abs((rows.mean() + 0.5) * patch / TILE - thing.centre[1] / height) < 0.09
