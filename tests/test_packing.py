"""Packed questions get the logits they would get alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from training import packing, text, tiny_llava
from vtc.eval.scenes import Scenes

encode = text.LLAVA.encode


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_llava.build().eval()
    for parameter in model.model.language_model.parameters():
        parameter.data *= 1.5  # far enough from the small fresh weights that a wrong mask shows
    return model


def test_look_is_the_tower(model: torch.nn.Module) -> None:
    pixels = packing.pixels([Scenes("val")[i] for i in range(3)])
    with torch.no_grad():
        ours = tiny_llava.look(model.model.vision_tower, pixels)
        theirs = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_packed_equals_alone(model: torch.nn.Module) -> None:
    scenes = [Scenes("val")[i] for i in range(2)]
    packed = packing.pack([scene.questions[:6] for scene in scenes], 6)
    with torch.no_grad():
        features = model.model.multi_modal_projector(
            tiny_llava.look(model.model.vision_tower, packing.pixels(scenes))[-2][:, 1:]
        )
        states = packing.hidden(model, features, packed)
        logits = model.lm_head(states).unflatten(1, (6, packing.SLOT))
        embed = model.model.language_model.embed_tokens
        for b, scene in enumerate(scenes):
            for k, question in enumerate(scene.questions[:6]):
                ids = [
                    *encode(question.text),
                    *encode(text.ASSISTANT),
                    *encode(question.answer),
                ]
                before = torch.tensor([*encode(text.BOS), *encode(text.USER)])
                row = torch.cat([embed(before), features[b], embed(torch.tensor(ids))])[None]
                alone = model.model.language_model(inputs_embeds=row).last_hidden_state
                expected = model.lm_head(alone)[0, 258:]
                torch.testing.assert_close(logits[b, k, : len(ids)], expected, atol=1e-4, rtol=1e-4)


def test_labels_stand_where_the_answer_is_predicted() -> None:
    scene = Scenes("val")[0]
    packed = packing.pack([scene.questions[:2]], 3)
    labels = packed.labels.view(3, packing.SLOT)
    ids = packed.ids.view(3, packing.SLOT)
    (assistant,), (eos,) = encode(text.ASSISTANT), encode(text.EOS)
    for k, question in enumerate(scene.questions[:2]):
        (answer,) = encode(question.answer)
        (at,) = (ids[k] == assistant).nonzero().flatten().tolist()
        assert labels[k, at : at + 2].tolist() == [answer, eos] and ids[k, at + 1] == answer
        assert (labels[k] != packing.IGNORE).sum() == 2
    assert packed.types.tolist()[0][2] == -1 and (labels[2] == packing.IGNORE).all()


def test_every_worker_count_sees_the_same_samples() -> None:
    from training.common import Group

    for size in (1, 2, 3):
        seen = [seed for rank in range(size) for seed in Group(rank, size).share(100, 12)]
        assert sorted(seen) == list(range(100, 112))
    with pytest.raises(ValueError, match="cannot be shared"):
        Group(0, 5).share(0, 12)


def test_schedule_rises_and_falls() -> None:
    from training.common import schedule

    rates = [schedule(step, 1000, warmup=100, floor=0.01) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert all(a < b for a, b in itertools.pairwise(rates[:90]))
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert {schedule(step, 1000, warmup=1, floor=1.0) for step in range(1000)} == {1.0}
