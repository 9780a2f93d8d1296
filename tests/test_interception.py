"""Callers that differ: what they pass, how they call, and what they expect back."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, MistralConfig

import vtc
from families import FAMILIES, WIDTH, Family
from families import llava as build
from models import GREEDY, IMAGE, TOKENS, batch, llava, make_llava
from vtc import adapters
from vtc.kernels.received import naive as naive_received
from vtc.saliency import class_attention, class_logits, received_attention

SPECS = ["fastervlm:keep=5", "divprune:keep=5,positions=original", "pool:keep=6"]
every_spec = pytest.mark.parametrize("spec", SPECS)
encodes_ahead = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters,
    reason="this transformers release does not run the encoder ahead of the prefill",
)


def near(value: Tensor, expected: Tensor) -> bool:
    return bool((value - expected).norm() < 1e-5 * expected.norm())


@pytest.fixture
def model() -> Any:
    return make_llava()


@every_spec
@torch.no_grad()
def test_positional_arguments(model: Any, spec: str) -> None:
    inputs = batch(1).inputs()
    with vtc.compress(model, spec):
        expected = model(**inputs).logits
        assert torch.equal(
            model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits, expected
        )
        hidden = model.model(inputs["input_ids"], inputs["pixel_values"]).last_hidden_state
        assert near(model.lm_head(hidden), expected)


@every_spec
@torch.no_grad()
def test_inputs_embeds_with_pixel_values(model: Any, spec: str) -> None:
    """Embeddings in which the placeholders are not filled yet: the model fills them, and they are found."""
    inputs = batch(1, 2).inputs()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with vtc.compress(model, spec) as run:
        expected = model(**batch(1, 2).inputs()).logits
        kept = run.last.kept  # type: ignore[union-attr]
        assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, expected)
        assert run.last.kept == kept  # type: ignore[union-attr]
        tokens = model.generate(inputs_embeds=embeds, **inputs, **GREEDY).sequences
        ids = batch(1, 2).inputs()
        assert torch.equal(model.generate(**ids, **GREEDY).sequences[:, ids["input_ids"].shape[1] :], tokens)


@encodes_ahead
@every_spec
@torch.no_grad()
def test_image_features_computed_before_the_call(model: Any, spec: str) -> None:
    """`mm_encoder_outputs`: encoded now, used later, in any order, by several calls."""
    inputs = [batch(2, seed=seed).inputs() for seed in range(2)]
    with vtc.compress(model, spec) as run:
        expected = [model(**one).logits for one in inputs]
        encoded = [model.model.get_image_features(one["pixel_values"], return_dict=True) for one in inputs]
        for number in (1, 0, 1):
            text = {key: value for key, value in inputs[number].items() if key != "pixel_values"}
            assert torch.equal(model(**text, mm_encoder_outputs={"image": encoded[number]}).logits, expected[number])
            assert len(run.last.kept) == 2  # type: ignore[union-attr]
        assert torch.equal(model(**text, mm_encoder_outputs={}).logits, reference(text))


def reference(text: dict[str, Tensor]) -> Tensor:
    """An empty dict of encoder outputs is a call without images."""
    return make_llava()(**text).logits


@encodes_ahead
@torch.no_grad()
def test_image_features_from_before_compress_are_refused(model: Any) -> None:
    inputs = batch(1).inputs()
    pixels = inputs.pop("pixel_values")
    encoded = {"image": model.model.get_image_features(pixels, return_dict=True)}
    for spec in ("divprune:keep=5", "fastervlm:keep=5"):  # sizes are missing, saliency too
        with vtc.compress(model, spec), pytest.raises(vtc.VtcError, match="compute them again"):
            model(**inputs, mm_encoder_outputs=encoded)
    with vtc.compress(model, "fastervlm:keep=5") as run:
        encoded = {"image": model.model.get_image_features(pixels, return_dict=True)}
        model(**inputs, mm_encoder_outputs=encoded)
        assert len(run.last.kept[0]) == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_spec
@torch.no_grad()
def test_prepared_masks(spec: str, attention: str, text: str) -> None:
    """4-D masks, additive and boolean, and dicts of masks per layer type, mean what the 2-D mask means."""
    model, prompts = llava(text=text, attention=attention), batch(1, 0, 2)
    inputs = prompts.inputs()
    flat = inputs.pop("attention_mask")
    length = flat.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & flat[:, None, None].bool()
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = (flat.cumsum(1) - 1).clamp(min=0)
    real = flat.bool()
    with vtc.compress(model, spec):
        expected = model(**inputs, attention_mask=flat, position_ids=positions).logits
        masks: list[Any] = [additive, {"full_attention": additive}]
        if text == "llama":
            masks = [additive]
        if attention == "sdpa":
            masks.append(allowed)
        for mask in masks:
            logits = model(**inputs, attention_mask=mask, position_ids=positions).logits
            assert near(logits[real], expected[real])


@pytest.mark.parametrize("mask", ["additive", "boolean", "dict"])
@torch.no_grad()
def test_a_prepared_mask_on_a_compressed_cache_is_refused(model: Any, mask: str) -> None:
    """It speaks of tokens that the cache no longer holds: neither guessed at nor ignored."""
    inputs = batch(1).inputs()
    length = inputs["input_ids"].shape[1] + 1
    allowed = torch.ones(1, 1, 1, length, dtype=torch.bool)
    allowed[..., :2] = False  # the caller means something by it
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    given = {"additive": additive, "boolean": allowed, "dict": {"full_attention": additive}}[mask]
    with vtc.compress(model, "random:keep=4"):
        cache = model(**inputs).past_key_values
        with pytest.raises(vtc.VtcError, match="2-D mask"):
            model(input_ids=torch.tensor([[11]]), attention_mask=given, past_key_values=cache)


@every_spec
@torch.no_grad()
def test_beams_and_samples_repeat_the_images(model: Any, spec: str) -> None:
    """Repeated prompts keep the same tokens of the same images, also where transformers repeats encoded features."""
    prompts = batch(1, 1)
    inputs = prompts.inputs()
    with vtc.compress(model, spec) as run:
        model(**inputs)
        first, second = run.last.kept  # type: ignore[union-attr]
        beams = model.generate(**inputs, **{**GREEDY, "num_beams": 2})
        assert run.last.kept == (first, first, second, second)  # type: ignore[union-attr]
        torch.manual_seed(0)
        model.generate(**inputs, **{**GREEDY, "do_sample": True, "num_return_sequences": 2})
        assert run.last.kept == (first, first, second, second)  # type: ignore[union-attr]
        for number in range(2):
            alone = model.generate(**prompts.alone(number), **{**GREEDY, "num_beams": 2})
            new = alone.sequences[0, prompts.alone(number)["input_ids"].shape[1] :]
            assert torch.equal(beams.sequences[number, inputs["input_ids"].shape[1] :], new)


@encodes_ahead  # earlier releases repeat the images of a prompt in the wrong order
@every_spec
@torch.no_grad()
def test_beams_with_several_images_per_prompt(model: Any, spec: str) -> None:
    inputs = batch(1, 2).inputs()
    with vtc.compress(model, spec) as run:
        model(**inputs)
        first, second, third = run.last.kept  # type: ignore[union-attr]
        model.generate(**inputs, **{**GREEDY, "num_beams": 2})
        assert run.last.kept == (first, first, second, third, second, third)  # type: ignore[union-attr]


@every_spec
def test_shapes_outside_are_the_old_ones(model: Any, spec: str) -> None:
    inputs = batch(1, 2).inputs()
    plain = model(**inputs, output_hidden_states=True)
    with vtc.compress(model, spec):
        out = model(**inputs, output_hidden_states=True)
        assert out.logits.shape == plain.logits.shape
        assert [layer.shape for layer in out.hidden_states] == [layer.shape for layer in plain.hidden_states]
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
        assert torch.equal(model(**inputs, logits_to_keep=3).logits, out.logits[:, -3:])
        with pytest.raises(vtc.VtcError, match="output_attentions"):
            model(**inputs, output_attentions=True)


@every_spec
def test_training(model: Any, spec: str) -> None:
    """Loss and gradients are those of the short sequence; a label after the image is predicted by the last survivor."""
    inputs = batch(1).inputs()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with vtc.compress(model, spec) as run:
        out = model(**inputs, labels=labels)
        out.loss.backward()
    kept = run.last.kept[0]  # type: ignore[union-attr]
    start = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    survivors = [*range(start), *(start + index for index in kept), *range(start + TOKENS, labels.shape[1])]
    short = out.logits[0, survivors], labels[0, survivors]
    expected = nn.functional.cross_entropy(short[0][:-1], short[1][1:], ignore_index=-100)
    assert (out.loss - expected).abs() < 1e-5
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert gradients["model.multi_modal_projector.linear_1.weight"].norm() > 0
    assert gradients["model.language_model.layers.0.self_attn.q_proj.weight"].norm() > 0


@torch.no_grad()
def test_a_second_turn_on_the_returned_cache(model: Any) -> None:
    for spec in SPECS:
        with vtc.compress(model, spec):
            for cache in ({}, {"cache_implementation": "static"}):
                inputs = batch(2).inputs()
                first = model.generate(**inputs, **GREEDY, **cache)
                more = torch.randint(10, 100, (1, 4), generator=torch.Generator().manual_seed(1))
                ids = torch.cat([first.sequences, more], dim=1)
                pixels = inputs["pixel_values"]
                expected = model.generate(input_ids=ids, pixel_values=pixels, **GREEDY)
                if not cache:
                    second = model.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY)
                    assert torch.equal(second.sequences, expected.sequences)
                    assert near(torch.stack(second.logits), torch.stack(expected.logits))
                dynamic = model.generate(**inputs, **GREEDY)
                assert torch.equal(first.sequences, dynamic.sequences)


@torch.no_grad()
def test_assisted_decoding(model: Any) -> None:
    inputs = batch(1).inputs()
    inputs["input_ids"][:, -4:] = torch.tensor([20, 21, 20, 21])  # something to look up
    for spec in SPECS:
        with vtc.compress(model, spec):
            expected = model.generate(**inputs, **GREEDY)
            assert torch.equal(
                model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2).sequences, expected.sequences
            )


@torch.no_grad()
def test_a_copied_cache_is_its_own(model: Any) -> None:
    """One encoded image, many questions: copies of a prefilled cache answer as fresh prompts would."""
    inputs = batch(1).inputs()
    ids = inputs["input_ids"]
    with vtc.compress(model, "fastervlm:keep=5"):
        prefix = model(input_ids=ids[:, :-2], pixel_values=inputs["pixel_values"]).past_key_values
        expected = model(**inputs).logits[:, -1]
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            assert near(model(input_ids=ids[:, -2:], past_key_values=cache).logits[:, -1], expected)
        assert prefix.get_seq_length() == ids.shape[1] - 2
        with pytest.raises(vtc.VtcError, match="inside its visual tokens") as refused:
            prefix.crop(5)
        fewest = int(str(refused.value).split()[-3])
        prefix.crop(fewest)
        assert prefix.get_seq_length() == fewest < ids.shape[1] - 2
        with pytest.raises(vtc.VtcError, match="inside its visual tokens"):
            prefix.crop(fewest - 1)


@pytest.mark.parametrize("spec", [*SPECS, "fastv:keep=4,layer=2"])
@torch.no_grad()
def test_hooks_of_others_see_the_old_lengths(model: Any, spec: str) -> None:
    inputs, text, seen = batch(1, 2).inputs(), model.model.language_model, []

    def note(module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
        seen.append((kwargs["inputs_embeds"] if output is None else output.last_hidden_state).shape[:2])

    text.register_forward_pre_hook(note, with_kwargs=True)
    text.register_forward_hook(note, with_kwargs=True)
    with vtc.compress(model, spec):
        model(**inputs)
    assert seen == [inputs["input_ids"].shape] * 2


@pytest.mark.parametrize("spec", [*SPECS, "random:keep=4", "fastv:keep=4,layer=2"])
@torch.no_grad()
def test_dropped_places_in_front_of_all_others(model: Any, spec: str) -> None:
    """A padded prompt that begins with an image says there what it says alone, not what its padding says."""
    prompts = FAMILIES["llava"].batch([("image", "text"), ("text", "image", "image", "text"), ("image",)])
    with vtc.compress(model, spec):
        together = model(**prompts.inputs()).logits
        for number in (0, 2):
            assert near(together[number, prompts.padding(number) :], model(**prompts.alone(number)).logits[0])


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("spec", [*SPECS, "random:keep=4", "fastv:keep=4,layer=2"])
@torch.no_grad()
def test_prompts_of_one_length_under_prepared_masks(text: str, spec: str) -> None:
    """Nothing is padded, so a prepared mask may be none at all, or one for all; but rows lose different numbers."""
    model = llava(text=text)
    ids, pixels = torch.randint(10, 100, (2, 2 * TOKENS + 4)), torch.randn(3, 3, 56, 56)
    ids[0, : 2 * TOKENS] = ids[1, 1 : TOKENS + 1] = IMAGE
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with vtc.compress(model, spec):
        logits = model(input_ids=ids, pixel_values=pixels).logits
        assert near(model(input_ids=ids, pixel_values=pixels, attention_mask=causal).logits, logits)
        together = model.generate(input_ids=ids, pixel_values=pixels, **GREEDY, cache_implementation="static")
        for row, shown in enumerate((pixels[:2], pixels[2:])):
            alone = model.generate(input_ids=ids[row : row + 1], pixel_values=shown, **GREEDY)
            assert near(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize("spec", [*SPECS, "holitom-inner:keep=4"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_default_dtype_does_not_matter(model: Any, kind: torch.dtype, spec: str) -> None:
    """Some programs change it for the sake of the weights they load."""
    inputs = batch(1, 2).inputs()
    with vtc.compress(model, spec) as run:
        expected = model(**inputs).logits
        report = run.last.to_dict()  # type: ignore[union-attr]
        torch.set_default_dtype(kind)
        try:
            assert torch.equal(model(**inputs).logits, expected)
            assert run.last.to_dict() == report  # type: ignore[union-attr]
        finally:
            torch.set_default_dtype(torch.float32)


@every_spec
@torch.no_grad()
def test_a_saved_cache_goes_on(model: Any, spec: str) -> None:
    """`torch.save` and pickle look classes up by name, and a compressed cache has one made for it."""
    inputs, word = batch(1).inputs(), torch.tensor([[20]])
    with vtc.compress(model, spec):
        cache = model(**inputs).past_key_values
        saved = pickle.dumps(cache)
        expected = model(input_ids=word, past_key_values=cache).logits
        loaded = pickle.loads(saved)
        assert loaded.get_seq_length() == inputs["input_ids"].shape[1]
        assert torch.equal(model(input_ids=word, past_key_values=loaded).logits, expected)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("window", [8, 16, 64])
@torch.no_grad()
def test_sliding_windows_in_a_static_cache(window: int, positions: str) -> None:
    """Its masks are prepared for the longer prompt, and of a window's width."""
    text = partial(MistralConfig, **WIDTH, sliding_window=window)
    family = Family("llava", partial(build, text=text))
    model, prompts = family.make(), batch(1, 0, 2)
    with vtc.compress(model, f"uniform:keep=5,positions={positions}"):
        for inputs in (prompts.inputs(), prompts.alone(0)):
            expected = model.generate(**inputs, **GREEDY)
            out = model.generate(**inputs, **GREEDY, cache_implementation="static")
            assert near(torch.stack(out.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_wrapped_models_are_found(model: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"model": model})

    inputs = batch(1).inputs()
    with vtc.compress(Wrapper(), "divprune:keep=3") as run:
        model(**inputs)
    assert run.last is not None and len(run.last.kept[0]) == 3
    assert adapters.find(model.model).multimodal is model.model


@torch.no_grad()
def test_split_images_are_refused(model: Any) -> None:
    inputs = batch(1).inputs()
    whole, split = (model.generate(**inputs, **GREEDY, prefill_chunk_size=size).logits for size in (None, 10))
    if not near(torch.stack(split), torch.stack(whole)):
        pytest.skip("this transformers release drops the pixels of a chunked prefill")
    with vtc.compress(model, "divprune:keep=3"), pytest.raises((vtc.VtcError, ValueError), match=r"split|chunk"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=10)


@dataclass(kw_only=True)
class Recorder(vtc.Scorer):
    """Keeps what one layer's row says, and remembers the row."""

    kind: str
    layer: int
    rows: list

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.kind})

    def layers(self, encoder: vtc.Encoder) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, visual: vtc.Visual) -> Tensor:
        self.rows.append(visual.saliency[:, 0])
        return visual.saliency[:, 0]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_saliency_rows_are_the_encoders_own_attention(tower: str, attention: str) -> None:
    """The recomputed rows are those of the maps that the eager encoder returns."""
    eager, model = make_llava(tower, attention="eager"), make_llava(tower, attention=attention)
    pixels = batch(2).inputs()["pixel_values"]
    maps = eager.model.vision_tower(pixels, output_attentions=True).attentions
    adapter = adapters.find(model)
    kind = "cls" if tower == "clip" else "received"
    for layer in range(3):
        mean = maps[layer].mean(1)  # (B, S, S)
        expected = mean[:, 0, 1:] if kind == "cls" else mean.mean(1)  # (B, N)
        rows: list[Tensor] = []

        @vtc.compressor.dataclass(kw_only=True)  # type: ignore[attr-defined,misc]
        class Record(vtc.Scorer):
            name = "record"

            @property
            def needs(self) -> frozenset[str]:
                return frozenset({kind})

            def layers(self, encoder: vtc.Encoder) -> tuple[int, ...]:
                return (layer,)  # noqa: B023

            def score(self, visual: vtc.Visual) -> Tensor:
                rows.append(visual.saliency[:, 0])  # noqa: B023
                return visual.saliency[:, 0]

        with vtc.compress(model, Record(keep=3)):
            model(**batch(2).inputs())
        assert adapter.encoder_info.depth == 3
        assert (rows[0] - expected).abs().max() < 1e-6


def test_rows_do_not_follow_a_callers_autocast() -> None:
    """Rounded dot products would decide between tokens that are nearly alike."""
    query, key = torch.randn(2, 1, 9, 2, 4).unbind()
    for row in (class_attention, class_logits, received_attention):
        expected = row(query, key, 0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(row(query, key, 0.5), expected)


@pytest.mark.parametrize("alive", [1, 100, 1000, 2**20])  # rows of blocks: one, some, all of one input, all of both
def test_blocked_received_attention_is_the_mean_of_the_map(alive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive_received, "ALIVE_IN_CACHE", alive)
    for length in (1, 5, 8, 21):
        query, key = torch.randn(2, 2, length, 2, 4).unbind()
        logits = query.double().transpose(1, 2) @ key.double().permute(0, 2, 3, 1) * 0.5  # (B, heads, S, S)
        maps = logits.softmax(-1).mean(1)  # (B, S, S)
        assert (received_attention(query, key, 0.5) - maps.mean(1)).abs().max() < 1e-6
        assert (class_attention(query, key, 0.5) - maps[:, 0]).abs().max() < 1e-6
        assert (class_logits(query, key, 0.5) - logits.mean(1)[:, 0]).abs().max() < 1e-6
