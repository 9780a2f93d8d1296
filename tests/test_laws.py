"""The laws: what holds for every strategy, attention implementation, prompt shape and precision."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from cases import DROPPING, SPECS
from models import BATCHES, GREEDY, IMAGE, TOKENS, Batch, batch, llava, make_llava
from vtc.compressor import parse
from vtc.visual import Layout, Visual
from watch import Watch

# Two orders of the same sums differ by rounding. Relative errors: some roundings of 2^-24, and of 2^-9.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_batch = pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_dropping_spec = pytest.mark.parametrize("spec", DROPPING.values(), ids=DROPPING)


def identity(spec: str) -> str:
    name, _, rest = spec.partition(":")
    return ",".join([f"{name}:keep=1.0", *(part for part in rest.split(",") if part and not part.startswith("keep"))])


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens `(B, T)` and their logits `(B, T, V)`."""
    out = model.generate(**inputs, **{**GREEDY, **options})
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def error(value: Tensor, expected: Tensor) -> float:
    """Relative error of `value`, in the Euclidean norm over everything."""
    return float((value.float() - expected.float()).norm() / expected.float().norm())


def test_every_strategy_is_among_the_cases() -> None:
    assert {spec.partition(":")[0] for spec in SPECS.values()} == set(vtc.available())


@every_dtype
@every_batch
@every_attention
@every_spec
@torch.no_grad()
def test_law_1_identity(spec: str, attention: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Keeping everything changes nothing, bit for bit."""
    model, inputs = llava(attention=attention, dtype=dtype), batch(*shape, dtype=dtype).inputs()
    logits, (tokens, scores) = model(**inputs).logits, generate(model, inputs)
    with vtc.compress(model, identity(spec)):
        assert torch.equal(model(**inputs).logits, logits)
        again, scores_again = generate(model, inputs)
    assert torch.equal(again, tokens) and torch.equal(scores_again, scores)


@every_dtype
@every_batch
@every_attention
@every_dropping_spec
@torch.no_grad()
def test_law_2_oracle(spec: str, attention: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compressed logits are those of the bare language model fed what survives, row by row, by hand."""
    model, prompts = llava(attention=attention, dtype=dtype), batch(*shape, dtype=dtype)
    inputs = prompts.inputs()
    with vtc.compress(model, spec) as run:
        logits = model(**inputs).logits
        report = run.last
    compressor = parse(spec)
    image = 0
    for number, ids in enumerate(prompts.rows):
        embeds, positions = model.get_input_embeddings()(ids), torch.arange(len(ids))
        rows, places, cursor = [], [], 0
        starts = image_starts(ids, prompts.images_per_row[number])
        for start in starts:
            assert report is not None
            feature = model.get_image_features(prompts.pixels).pooler_output[image]  # (N, D)
            rows += [embeds[cursor:start], survivors(compressor, feature, report, image)]
            places += [positions[cursor:start], positions[start : start + TOKENS][list(report.kept[image])]]
            cursor, image = start + TOKENS, image + 1
        rows, places = [*rows, embeds[cursor:]], [*places, positions[cursor:]]
        given, where = torch.cat(rows), torch.cat(places)  # (L, D), (L,)
        rotary = where if compressor.positions == "original" else torch.arange(len(where))
        hidden = bare_language_model(model, given[None], rotary[None])
        expected = model.lm_head(hidden)[0]
        padding = inputs["input_ids"].shape[1] - len(ids)
        assert error(logits[number, padding + where], expected) < CLOSE[dtype]


def image_starts(ids: Tensor, images: int) -> list[int]:
    places = (ids == IMAGE).nonzero()[:, 0].tolist()
    return places[::TOKENS][:images]


def survivors(compressor: Any, feature: Tensor, report: Any, image: int) -> Tensor:
    """What the language model gets of one image, `(K, D)`: its own rows, or the means that `pool` makes of them."""
    if report.sources[image] is None:
        return feature[list(report.kept[image])]
    visual = Visual(Layout(TOKENS, report.grids[image]), 1, feature.device, {"features": lambda: feature[None]})
    weights = compressor.select(visual).matrix()[0]  # (K, N)
    return (weights @ feature.float()).to(feature.dtype)


def bare_language_model(model: Any, embeds: Tensor, rotary_positions: Tensor) -> Tensor:
    """Run the decoder layers one after the other, without the model's own treatment of masks and positions."""
    language_model = model.model.language_model
    length = embeds.shape[1]
    mask = torch.full((length, length), torch.finfo(embeds.dtype).min).triu(1).to(embeds.dtype)[None, None]
    rotation = language_model.rotary_emb(embeds, position_ids=rotary_positions)
    for layer in language_model.layers:
        embeds = layer(embeds, attention_mask=mask, position_embeddings=rotation)
    return language_model.norm(embeds)


@every_dtype
@every_batch
@every_attention
@every_dropping_spec
@torch.no_grad()
def test_law_3_cache(spec: str, attention: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Decoding with the cache is decoding without one."""
    model, inputs = llava(attention=attention, dtype=dtype), batch(*shape, dtype=dtype).inputs()
    with vtc.compress(model, spec):
        tokens, logits = generate(model, inputs)
        # Teacher-forced, because in bfloat16 a near tie may fall either way and the texts would part.
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for step in range(tokens.shape[1]):
            again = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits[:, -1]
            assert error(again, logits[:, step]) < CLOSE[dtype]
            ids = torch.cat([ids, tokens[:, step : step + 1]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    if dtype == torch.float32:
        with vtc.compress(model, spec):
            assert torch.equal(generate(model, inputs, use_cache=False)[0], tokens)


@every_dtype
@every_attention
@every_dropping_spec
@torch.no_grad()
def test_law_4_batch(spec: str, attention: str, dtype: torch.dtype) -> None:
    """Every row of a ragged, padded batch is that row alone, in what is kept and in what is said."""
    model, prompts = llava(attention=attention, dtype=dtype), batch(1, 0, 2, 1, dtype=dtype)
    with vtc.compress(model, spec) as run:
        tokens, logits = generate(model, prompts.inputs())
        assert run.last is not None
        kept, image = run.last.kept, 0
        for number, images in enumerate(prompts.images_per_row):
            alone, logits_alone = generate(model, prompts.alone(number))
            # In bfloat16 a near tie may fall either way, after which the texts differ.
            steps = len(tokens[number]) if dtype == torch.float32 else 1
            assert torch.equal(alone[0, :steps], tokens[number, :steps]) or dtype == torch.bfloat16
            assert error(logits_alone[0, :steps], logits[number, :steps]) < CLOSE[dtype]
            if images:
                assert run.last.kept == kept[image : image + images]
            image += images


@every_attention
@every_dropping_spec
@torch.no_grad()
def test_law_4_rows_of_one_length_with_different_images(spec: str, attention: str) -> None:
    """Nothing is padded, so no mask is given; yet what is left of the rows differs in length."""
    model, prompts = llava(attention=attention), batch(2, 1, 0)
    generator = torch.Generator().manual_seed(1)
    longest = max(len(row) for row in prompts.rows)
    more = [torch.randint(10, 100, (longest - len(row),), generator=generator) for row in prompts.rows]
    prompts = replace(prompts, rows=tuple(torch.cat(pair) for pair in zip(prompts.rows, more, strict=True)))
    inputs = prompts.inputs()
    del inputs["attention_mask"]
    with vtc.compress(model, spec):
        tokens, logits = generate(model, inputs)
        cache = None
        for step in range(tokens.shape[1]):  # without generate, which numbers the positions itself
            given = inputs if step == 0 else {"input_ids": tokens[:, step - 1 : step]}
            out = model(**given, past_key_values=cache)
            cache = out.past_key_values
            assert error(out.logits[:, -1], logits[:, step]) < CLOSE[torch.float32]
        for number in range(3):
            alone, logits_alone = generate(model, prompts.alone(number))
            assert torch.equal(alone[0], tokens[number])
            assert error(logits_alone[0], logits[number]) < CLOSE[torch.float32]


@torch.no_grad()
def test_law_4_padding_is_not_carried_along() -> None:
    """A long row with images and a short one without become as short as the survivors allow."""
    model, prompts = llava(), batch(2, 0)
    with vtc.compress(model, "uniform:keep=2") as run:
        model(**prompts.inputs())
    assert run.last is not None
    assert run.last.sequence_out == len(prompts.rows[0]) - 2 * (TOKENS - 2)


@every_dtype
@every_attention
@every_dropping_spec
@pytest.mark.parametrize("keep", ["1", "7", "16", "0.01", "0.1", "0.5", "0.97"])
@torch.no_grad()
def test_law_5_budget(spec: str, keep: str, attention: str, dtype: torch.dtype) -> None:
    """The budget is a function of sizes and exactly that many tokens survive, whatever the image shows."""
    spec = identity(spec).replace("keep=1.0", f"keep={keep}")
    model, compressor = llava(attention=attention, dtype=dtype), parse(spec)
    budget = compressor.budget(Layout(TOKENS, (1, 4, 4)))
    assert 1 <= budget <= (int(keep) if "." not in keep else max(1, int(float(keep) * TOKENS + 0.5)))
    if compressor.name != "pool":
        assert budget == (int(keep) if "." not in keep else max(1, int(float(keep) * TOKENS + 0.5)))
    inputs = batch(1, 2, dtype=dtype).inputs()
    shown = inputs["pixel_values"]
    for pixels in (shown, torch.zeros_like(shown), torch.randn_like(shown)):
        with vtc.compress(model, spec) as run:
            model(**{**inputs, "pixel_values": pixels})
        assert run.last is not None
        assert [len(kept) for kept in run.last.kept] == [budget] * 3


@every_dtype
@every_attention
@every_dropping_spec
@torch.no_grad()
def test_law_6_order(spec: str, attention: str, dtype: torch.dtype) -> None:
    """Survivors ascend and are unique, and the same input gives the same selection; a blank image ties everywhere."""
    model, inputs = llava(attention=attention, dtype=dtype), batch(1, 1, dtype=dtype).inputs()
    for pixels in (inputs["pixel_values"], torch.zeros_like(inputs["pixel_values"])):
        seen = []
        for _ in range(2):
            with vtc.compress(model, spec) as run:
                model(**{**inputs, "pixel_values": pixels})
            assert run.last is not None
            seen.append(run.last.kept)
            for kept in run.last.kept:
                assert list(kept) == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < TOKENS
        assert seen[0] == seen[1]


@every_dtype
@every_attention
@every_dropping_spec
@torch.no_grad()
def test_law_7_no_memory(spec: str, attention: str, dtype: torch.dtype) -> None:
    """Nothing of one call, thread or model is left in another."""
    model, other = llava(attention=attention, dtype=dtype), make_llava(text="qwen2", attention=attention, dtype=dtype)
    inputs = [batch(1, seed=seed, dtype=dtype).inputs() for seed in range(3)]
    expected = []
    for one in inputs:
        with vtc.compress(model, spec):
            expected.append(model(**one).logits)
    with vtc.compress(other, "random:keep=3"):
        other_expected = other(**inputs[0]).logits

    with vtc.compress(model, spec), vtc.compress(other, "random:keep=3"):
        for number in (0, 1, 0, 2, 1):
            assert torch.equal(model(**inputs[number]).logits, expected[number])
            assert torch.equal(other(**inputs[0]).logits, other_expected)

        wrong: list[int] = []

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(8):
                    if not torch.equal(model(**inputs[number]).logits, expected[number]):
                        wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@torch.no_grad()
def test_law_7_interleaved_generation() -> None:
    """Two conversations decode in turns, each on its own cache."""
    model, first, second = llava(), batch(1, seed=1).inputs(), batch(2, seed=2).inputs()
    with vtc.compress(model, "fastervlm:keep=4"):
        expected = [generate(model, inputs)[1][0] for inputs in (first, second)]
        outs = [model(**inputs) for inputs in (first, second)]
        for step in range(GREEDY["max_new_tokens"] - 1):
            for number in (0, 1):
                logits = outs[number].logits[:, -1]
                assert error(logits[0], expected[number][step]) < CLOSE[torch.float32]
                logits[:, IMAGE] = -torch.inf
                token = logits.argmax(-1, keepdim=True)
                outs[number] = model(input_ids=token, past_key_values=outs[number].past_key_values)


@torch.no_grad()
def test_law_7_a_session_holds_no_tensor_of_a_call() -> None:
    """Prompts, pixels and features are freed with the call; a report needs a few indices only."""
    model, inputs = llava(), batch(1, 2).inputs()
    given = {name: weakref.ref(tensor) for name, tensor in inputs.items()}
    with vtc.compress(model, "fastervlm:keep=4") as run:
        out = model(**inputs)
        given["logits"] = weakref.ref(out.logits)
        del inputs, out
        gc.collect()
        assert {name for name, tensor in given.items() if tensor() is not None} == set()
        assert run.last is not None


def hook_tables(model: torch.nn.Module) -> dict[str, list[int]]:
    tables = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    more = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        f"{name}.{table}": list(getattr(module, table))
        for name, module in model.named_modules()
        for table in tables + more
    }


@every_dtype
@every_attention
@every_spec
@torch.no_grad()
def test_law_8_undo(spec: str, attention: str, dtype: torch.dtype) -> None:
    """However a session ends, the hook tables and the outputs of every sub-module are as found."""
    model, inputs = make_llava(attention=attention, dtype=dtype), batch(1, 2, dtype=dtype).inputs()
    model.model.language_model.layers[1].register_forward_hook(lambda *args: None)  # the user's own
    logits = model(**inputs, output_hidden_states=True).logits  # makes transformers install its own hooks
    before, attributes = hook_tables(model), {name: set(vars(module)) for name, module in model.named_modules()}

    def untouched() -> bool:
        same = {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        return same and hook_tables(model) == before and torch.equal(model(**inputs).logits, logits)

    session = vtc.compress(model, spec)
    model(**inputs)
    assert hook_tables(model) != before and session.active
    vtc.restore(model)
    assert untouched() and not session.active
    vtc.restore(model)  # nothing to undo
    session.remove()
    assert untouched()

    with vtc.compress(model, spec):
        generate(model, inputs)
    assert untouched()

    with pytest.raises(ZeroDivisionError), vtc.compress(model, spec):
        model(**inputs)
        raise ZeroDivisionError
    assert untouched()

    first = vtc.compress(model, spec)
    count = sum(map(len, hook_tables(model).values()))
    second = vtc.compress(model, spec)
    assert sum(map(len, hook_tables(model).values())) == count and not first.active and second.active
    first.remove()  # a session that was replaced removes nothing of its successor
    assert sum(map(len, hook_tables(model).values())) == count
    second.remove()
    assert untouched()


@torch.no_grad()
def test_law_8_an_error_inside_a_call_leaves_nothing_behind() -> None:
    model, inputs = make_llava(), batch(1).inputs()

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with vtc.compress(model, "fastervlm:keep=4"):
        expected = model(**inputs).logits
        for module in (model.model.vision_tower, model.model.language_model.layers[1], model.model.language_model):
            handle = module.register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            handle.remove()
            assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_law_8_an_interrupted_call_leaves_nothing_behind() -> None:
    """Not even what Python does not count as an error: somebody stops a notebook cell in the middle of a call."""
    model, inputs = make_llava(), batch(1).inputs()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with vtc.compress(model, "fastervlm:keep=4"):
        expected = model(**inputs).logits
        for _ in range(3):
            handle = model.model.language_model.layers[1].register_forward_hook(interrupt)
            pixels = inputs["pixel_values"].clone()
            ids = inputs["input_ids"].clone()
            held = weakref.ref(ids)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=ids, pixel_values=pixels)
            handle.remove()
            assert torch.equal(model(**inputs).logits, expected)
            del ids
            gc.collect()
            assert held() is None


@every_dtype
@every_attention
@every_dropping_spec
@every_batch
@torch.no_grad()
def test_law_10_no_host_synchronisation(spec: str, shape: tuple[int, ...], attention: str, dtype: torch.dtype) -> None:
    """A compressed prefill waits for the device no more often than the model itself does.

    The one exception is a batch of several prompts: how many images each row holds decides the new length, and only
    the ids know it, so that one number is read.
    """
    model, prompts = llava(attention=attention, dtype=dtype), batch(*shape, dtype=dtype)
    inputs = prompts.inputs()
    if len(shape) == 1:
        del inputs["attention_mask"]
    with Watch() as plain:
        model(**inputs)
    with vtc.compress(model, spec) as run:
        model(**inputs)  # the first selection of a session is validated, which reads
        with Watch() as compressed:
            model(**inputs)
    assert sum(shape) == 0 or (run.last is not None and run.last.tokens_out < run.last.tokens_in)
    allowed = 1 if len(shape) > 1 else 0
    assert len(compressed.waits) <= len(plain.waits) + allowed, (plain.waits, compressed.waits)


@pytest.mark.parametrize("spec", ["fastervlm:keep=5", "vtc-cls:keep=5,start=0", "todre:keep=5"])
@torch.no_grad()
def test_law_10_no_attention_map(spec: str) -> None:
    """No tensor of the size of one layer's attention maps is ever made on account of a saliency row."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=8, image_size=256, patch_size=8
    )
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    tokens, heads = 32 * 32, 8
    ids = torch.cat([torch.full((tokens,), IMAGE), torch.arange(10, 14)])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 256, 256)}
    with vtc.compress(model, spec), Watch() as compressed:
        model(**inputs)
    assert compressed.largest < heads * tokens * tokens / 4


def test_batches_say_what_they_hold() -> None:
    prompts = Batch((1, 0), (torch.tensor([1, 2]), torch.tensor([3])), torch.zeros(1, 3, 2, 2))
    assert prompts.inputs()["input_ids"].tolist() == [[1, 2], [0, 3]]
    assert prompts.inputs()["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert "pixel_values" not in prompts.alone(1)
