"""The laws: what holds for every strategy, model family, prompt, attention implementation and precision."""

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
from cases import COMPOSED, DECODER_SPECS, DROPPING, SPECS
from combinations import ATTENTIONS, Case, applies, covering
from families import (
    FAMILIES,
    GREEDY,
    IMAGE,
    ONE_IMAGE,
    SHAPES,
    TEXT,
    TWO_IMAGES,
    Batch,
    Family,
    extended,
)
from oracle import CLOSE, Recorder, by_hand, error
from vtc.compressor import DecoderCompressor, parse
from watch import Watch

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
# One strategy in front of the language model, one inside it.
sites = pytest.mark.parametrize("spec", ["divprune:keep=4", "fastv:keep=4,layer=2"], ids=["input", "decoder"])


def with_keep(spec: str, keep: str) -> str:
    name, _, rest = spec.partition(":")
    return ",".join(
        [f"{name}:keep={keep}", *(part for part in rest.split(",") if part and not part.startswith("keep"))]
    )


def identity(case: Case) -> list[str]:
    return [with_keep(spec, "1.0") for spec in case.specs]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens `(B, T)` and their logits `(B, T, V)`."""
    out = model.generate(**inputs, **{**GREEDY, **options})
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def with_pixels(inputs: dict[str, Tensor], change: Any) -> dict[str, Tensor]:
    return {name: change(value) if name.startswith("pixel") else value for name, value in inputs.items()}


def kept_of(run: vtc.Session) -> tuple[tuple[int, ...], ...]:
    """What survives of each visual input of the last call."""
    return () if run.last is None else run.last.kept


def reads_the_last_token(case: Case) -> bool:
    """Whether the choice depends on the end of the prompt, so that a longer prompt is another choice."""
    return any(parse(spec).needs & {"attention", "ahead", "exchange"} for spec in case.specs)


def test_every_strategy_is_among_the_cases() -> None:
    assert {spec.partition(":")[0] for spec in [*SPECS.values(), *DECODER_SPECS.values()]} == set(vtc.available())


@pytest.mark.parametrize("law", range(1, 11))
def test_the_chosen_combinations_cover_all_pairs(law: int) -> None:
    specs = {**DROPPING, **DECODER_SPECS, **COMPOSED}
    cases = list(covering(specs, law))
    seen = {
        pair
        for case in cases
        for pair in (
            (case.spec, case.family.name),
            (case.family.name, case.shape),
            (case.spec, case.attention),
            (case.family.name, case.attention),
            (case.shape, case.attention),
            (case.family.name, case.dtype),
        )
    }
    families, dtypes = FAMILIES.values(), CLOSE
    wanted = {(spec, family.name) for spec in specs.values() for family in families if applies(spec, family)}
    wanted |= {(family.name, shape) for family in families for shape in family.shapes}
    wanted |= {(spec, attention) for spec in specs.values() for attention in ATTENTIONS}
    wanted |= {(family.name, attention) for family in families for attention in ATTENTIONS}
    wanted |= {(shape, attention) for shape in SHAPES for attention in ATTENTIONS}
    wanted |= {(family.name, dtype) for family in families for dtype in dtypes}
    assert wanted == seen


@torch.no_grad()
def test_law_1_identity(any_case: Case) -> None:
    """Keeping everything changes nothing, bit for bit."""
    model, inputs = any_case.model(), any_case.batch().inputs()
    logits, (tokens, scores) = model(**inputs).logits, generate(model, inputs)
    with vtc.compress(model, identity(any_case)):
        assert torch.equal(model(**inputs).logits, logits)
        again, scores_again = generate(model, inputs)
    assert torch.equal(again, tokens) and torch.equal(scores_again, scores)


@torch.no_grad()
def test_law_2_oracle(case: Case) -> None:
    """Compressed logits are those of the bare decoder layers fed what survives, prompt by prompt, by hand."""
    model, prompts, recorder = case.model(), case.batch(), Recorder(case.specs)
    with vtc.compress(model, recorder.compressors) as run:
        logits = model(**prompts.inputs()).logits
        kept = dict(zip([(row, item.places) for row, item in prompts.visuals()], kept_of(run), strict=True))
    for number, row in enumerate(prompts.rows):
        expected = by_hand(case, prompts, number, recorder)
        assert error(logits[number, prompts.padding(number) + expected.places], expected.logits) < CLOSE[case.dtype]
        assert [kept[number, item.places] for item in row.shown] == expected.kept


@torch.no_grad()
def test_law_3_cache(case: Case) -> None:
    """Decoding with the cache is decoding without one; where the prompt's end decides, it is the oracle's."""
    model, prompts, recorder = case.model(), case.batch(), Recorder(case.specs)
    inputs = prompts.inputs()
    with vtc.compress(model, recorder.compressors):
        tokens, logits = generate(model, inputs)
    if reads_the_last_token(case):
        for number, row in enumerate(prompts.rows):
            steps = by_hand(case, prompts, number, recorder, more=tokens[number, :-1])
            spoken = steps.logits[steps.places >= len(row.ids) - 1]
            assert error(logits[number], spoken) < CLOSE[case.dtype]
        return
    with vtc.compress(model, case.specs):
        # Teacher-forced, because in bfloat16 a near tie may fall either way and the texts would part.
        for step in range(tokens.shape[1]):
            longer = extended(inputs, tokens[:, :step])
            again = model(**longer, use_cache=False).logits[:, -1]
            assert error(again, logits[:, step]) < CLOSE[case.dtype]
        if case.dtype == torch.float32:
            assert torch.equal(generate(model, inputs, use_cache=False)[0], tokens)


def own_error(model: Any, prompts: Batch) -> float:
    """How far the rows of a batch are from these rows alone without compression, by rounding."""
    logits = model(**prompts.inputs()).logits[:, -1]
    alone = [model(**prompts.alone(number)).logits[0, -1] for number in range(len(prompts.rows))]
    return max(error(one, row) for one, row in zip(alone, logits, strict=True))


@torch.no_grad()
def test_law_4_batch(case: Case) -> None:
    """Every row of a ragged, padded batch is that row alone, in what is kept and in what is said."""
    model, prompts = case.model(), case.of(*case.family.shapes["ragged"], *case.rows)
    close = max(CLOSE[case.dtype], 2 * own_error(model, prompts)) if case.dtype == torch.bfloat16 else CLOSE[case.dtype]
    with vtc.compress(model, case.specs) as run:
        tokens, logits = generate(model, prompts.inputs())
        kept = {number: [] for number in range(len(prompts.rows))}
        for (number, _), survivors in zip(prompts.visuals(), kept_of(run), strict=True):
            kept[number].append(survivors)
        for number, row in enumerate(prompts.rows):
            alone, logits_alone = generate(model, prompts.alone(number))
            # In bfloat16 a near tie may fall either way, after which the texts differ.
            steps = len(tokens[number]) if case.dtype == torch.float32 else 1
            assert torch.equal(alone[0, :steps], tokens[number, :steps]) or case.dtype == torch.bfloat16
            if case.dtype == torch.float32 or not row.shown or kept[number] == list(kept_of(run)):
                assert error(logits_alone[0, :steps], logits[number, :steps]) < close
            if row.shown and case.dtype == torch.float32:
                assert list(kept_of(run)) == kept[number]


@pytest.mark.parametrize("name", ["llava", "llava-siglip"])
@every_attention
@sites
@torch.no_grad()
def test_law_4_rows_of_one_length_with_different_images(spec: str, attention: str, name: str) -> None:
    """Nothing is padded, so no mask is given; yet what is left of the rows differs in length."""
    family = FAMILIES[name]
    model, prompts = family.model(attention), family.batch([TWO_IMAGES, ONE_IMAGE, TEXT])
    generator = torch.Generator().manual_seed(1)
    longest = max(len(row.ids) for row in prompts.rows)
    rows = [
        replace(row, ids=torch.cat([row.ids, torch.randint(10, 100, (longest - len(row.ids),), generator=generator)]))
        for row in prompts.rows
    ]
    prompts = replace(prompts, rows=tuple(rows))
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


@every_family
@torch.no_grad()
def test_law_4_padding_is_not_carried_along(family: Family) -> None:
    """A long row with images and a short one without become as short as the survivors allow."""
    model, prompts = family.model(), family.batch([TWO_IMAGES, TEXT])
    with vtc.compress(model, "uniform:keep=2") as run:
        model(**prompts.inputs())
    assert run.last is not None
    tokens = [item.tokens for _, item in prompts.visuals()]
    assert run.last.sequence_out == len(prompts.rows[0].ids) - sum(tokens) + sum(map(len, run.last.kept))
    assert sum(map(len, run.last.kept)) < sum(tokens)


@pytest.mark.parametrize("keep", ["1", "0.5", "0.97"])
@torch.no_grad()
def test_law_5_budget(case: Case, keep: str) -> None:
    """The budget is a function of sizes and exactly that many tokens survive, whatever the image shows."""
    specs = [with_keep(spec, keep) for spec in case.specs if not spec.startswith("todre-inner")]
    if not specs or any(parse(spec).adaptive for spec in specs):
        return
    model, prompts = case.model(), case.batch()
    inputs, recorder = prompts.inputs(), Recorder(specs)
    counts = []
    for change in (torch.clone, torch.zeros_like, torch.randn_like):
        recorder.clear()
        with vtc.compress(model, recorder.compressors) as run:
            model(**with_pixels(inputs, change))
        counts.append([len(kept) for kept in kept_of(run)])
        if change is torch.clone:
            for (_, item), count in zip(prompts.visuals(), counts[0], strict=True):
                assert count == survivors(recorder, item.tokens)
    assert counts[1:] == counts[:1] * 2


def survivors(recorder: Recorder, tokens: int) -> int:
    """How many of `tokens` are left, by the budgets of the layouts that the strategies saw."""
    for compressor, calls in zip(recorder.compressors, recorder.calls, strict=True):
        layouts = {call.layout for call in calls if call.layout.tokens == tokens}
        decoder = isinstance(compressor, DecoderCompressor)
        found = {compressor.budgets(layout)[-1] if decoder else compressor.budget(layout) for layout in layouts}
        assert len(found) < 2
        tokens = found.pop() if found else tokens
    return tokens


@pytest.mark.parametrize("keep", [1, 7, 16, 0.01, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("name", ["divprune", "random", "fastervlm", "fastv", "holitom-inner"])
@torch.no_grad()
def test_law_5_budgets_count_tokens_or_share_them(name: str, keep: int | float) -> None:
    model, prompts = FAMILIES["llava"].model(), FAMILIES["llava"].batch([ONE_IMAGE, TWO_IMAGES])
    expected = min(keep, 16) if isinstance(keep, int) else max(1, int(keep * 16 + 0.5))
    with vtc.compress(model, f"{name}:keep={keep}") as run:
        model(**prompts.inputs())
    assert [len(kept) for kept in kept_of(run)] == [expected] * 3


@torch.no_grad()
def test_law_6_order(case: Case) -> None:
    """Survivors ascend and are unique, and the same input gives the same selection; a blank image ties everywhere."""
    model, prompts = case.model(), case.batch()
    inputs = prompts.inputs()
    for change in (torch.clone, torch.zeros_like):
        seen = []
        for _ in range(2):
            with vtc.compress(model, case.specs) as run:
                model(**with_pixels(inputs, change))
            seen.append(kept_of(run))
            for (_, item), kept in zip(prompts.visuals(), kept_of(run), strict=True):
                assert list(kept) == sorted(set(kept)) and set(kept) <= set(range(item.tokens))
        assert seen[0] == seen[1]


@torch.no_grad()
def test_law_7_no_memory(case: Case) -> None:
    """Nothing of one call, thread or model is left in another."""
    others = list(FAMILIES.values())
    family = others[(others.index(case.family) + 1) % len(others)]
    model, other = case.model(), family.model(case.attention, case.dtype)
    inputs = [case.batch(seed).inputs() for seed in range(3)]
    other_inputs = family.batch([ONE_IMAGE], dtype=case.dtype).inputs()
    expected = []
    for one in inputs:
        with vtc.compress(model, case.specs):
            expected.append(model(**one).logits)
    with vtc.compress(other, "random:keep=3"):
        other_expected = other(**other_inputs).logits

    with vtc.compress(model, case.specs), vtc.compress(other, "random:keep=3"):
        for number in (0, 1, 0):
            assert torch.equal(model(**inputs[number]).logits, expected[number])
        assert torch.equal(other(**other_inputs).logits, other_expected)

        wrong: list[int] = []

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(2):
                    if not torch.equal(model(**inputs[number]).logits, expected[number]):
                        wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@sites
@torch.no_grad()
def test_law_7_interleaved_generation(spec: str) -> None:
    """Two conversations decode in turns, each on its own cache."""
    family = FAMILIES["llava"]
    model, first, second = family.model(), family.batch([ONE_IMAGE]).inputs(), family.batch([TWO_IMAGES]).inputs()
    with vtc.compress(model, spec):
        expected = [generate(model, inputs)[1][0] for inputs in (first, second)]
        outs = [model(**inputs) for inputs in (first, second)]
        for step in range(GREEDY["max_new_tokens"] - 1):
            for number in (0, 1):
                logits = outs[number].logits[:, -1]
                assert error(logits[0], expected[number][step]) < CLOSE[torch.float32]
                logits[:, GREEDY["suppress_tokens"]] = -torch.inf
                token = logits.argmax(-1, keepdim=True)
                outs[number] = model(input_ids=token, past_key_values=outs[number].past_key_values)


@every_family
@sites
@torch.no_grad()
def test_law_7_a_session_holds_no_tensor_of_a_call(spec: str, family: Family) -> None:
    """Prompts, pixels and features are freed with the call; a report needs a few indices only."""
    model, inputs = family.model(), family.batch(family.shapes["ragged"]).inputs()
    given = {name: weakref.ref(tensor) for name, tensor in inputs.items()}
    with vtc.compress(model, spec) as run:
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


@torch.no_grad()
def test_law_8_undo(any_case: Case) -> None:
    """However a session ends, the hook tables and the outputs of every sub-module are as found."""
    model, specs, inputs = any_case.make(), any_case.specs, any_case.batch().inputs()
    model.model.language_model.layers[1].register_forward_hook(lambda *args: None)  # the user's own
    logits = model(**inputs, output_hidden_states=True).logits  # makes transformers install its own hooks
    before, attributes = hook_tables(model), {name: set(vars(module)) for name, module in model.named_modules()}

    def untouched() -> bool:
        same = {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        return same and hook_tables(model) == before and torch.equal(model(**inputs).logits, logits)

    session = vtc.compress(model, specs)
    model(**inputs)
    assert hook_tables(model) != before and session.active
    vtc.restore(model)
    assert untouched() and not session.active
    vtc.restore(model)  # nothing to undo
    session.remove()
    assert untouched()

    with vtc.compress(model, specs):
        generate(model, inputs)
    assert untouched()

    with pytest.raises(ZeroDivisionError), vtc.compress(model, specs):
        model(**inputs)
        raise ZeroDivisionError
    assert untouched()

    first = vtc.compress(model, specs)
    count = sum(map(len, hook_tables(model).values()))
    second = vtc.compress(model, specs)
    assert sum(map(len, hook_tables(model).values())) == count and not first.active and second.active
    first.remove()  # a session that was replaced removes nothing of its successor
    assert sum(map(len, hook_tables(model).values())) == count
    second.remove()
    assert untouched()


@every_family
def test_law_8_what_a_model_lacks_is_refused(family: Family) -> None:
    """At once or by the first image that shows it; the message names what works, and nothing is left behind."""
    model, inputs = family.model(), family.batch([TWO_IMAGES]).inputs()
    before = hook_tables(model)
    for spec in [*SPECS.values(), *DECODER_SPECS.values()]:
        if not applies(spec, family):
            refused = pytest.raises(vtc.VtcError, match="use |layer=2 is the first that works|take any")
            with refused, vtc.compress(model, spec):
                model(**inputs)
            assert hook_tables(model) == before


@every_family
@sites
@torch.no_grad()
def test_law_8_an_error_inside_a_call_leaves_nothing_behind(spec: str, family: Family) -> None:
    model, inputs = family.make(), family.batch([ONE_IMAGE]).inputs()
    encoder = getattr(model.model, "vision_tower", None) or model.model.visual

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with vtc.compress(model, spec):
        expected = model(**inputs).logits
        for module in (encoder, *model.model.language_model.layers, model.model.language_model):
            handle = module.register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            handle.remove()
            assert torch.equal(model(**inputs).logits, expected)


@every_family
@sites
@torch.no_grad()
def test_law_8_an_interrupted_call_leaves_nothing_behind(spec: str, family: Family) -> None:
    """Not even what Python does not count as an error: somebody stops a notebook cell in the middle of a call."""
    model, inputs = family.make(), family.batch([ONE_IMAGE]).inputs()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with vtc.compress(model, spec):
        expected, held = model(**inputs).logits, []
        for layer in model.model.language_model.layers[1:]:
            handle = layer.register_forward_hook(interrupt)
            copies = {name: value.clone() for name, value in inputs.items()}
            held.append(weakref.ref(copies["input_ids"]))
            with pytest.raises(KeyboardInterrupt):
                model(**copies)
            handle.remove()
            assert torch.equal(model(**inputs).logits, expected)
            del copies
        gc.collect()
        assert [tensor() for tensor in held] == [None] * 3


@torch.no_grad()
def test_law_10_no_host_synchronisation(case: Case) -> None:
    """A compressed prefill waits for the device no more often than the model itself does.

    The one exception is a batch of several prompts, or tiles to join: how many images each row holds decides the new
    length, and only the ids know it, so that one list is read.
    """
    model, prompts = case.model(), case.batch()
    inputs = prompts.inputs()
    if len(prompts.rows) == 1:
        del inputs["attention_mask"]
    with Watch() as plain:
        model(**inputs)
    with vtc.compress(model, case.specs) as run:
        model(**inputs)  # the first selection of a session is validated, which reads
        with Watch() as compressed:
            model(**inputs)
    if any(parse(spec).adaptive for spec in case.specs):
        return
    assert not prompts.visuals() or (run.last is not None and run.last.tokens_out < run.last.tokens_in)
    joins = case.family.name == "internvl" and len(prompts.visuals()) > 0
    allowed = int(len(prompts.rows) > 1 or joins) + case.zeros
    assert len(compressed.waits) <= len(plain.waits) + allowed, (plain.waits, compressed.waits)


@pytest.mark.parametrize(
    "spec",
    ["fastervlm:keep=5", "vtc-cls:keep=5,start=0", "todre:keep=5", "fastv:keep=5,layer=1", "pyramiddrop:stages=1"],
)
@torch.no_grad()
def test_law_10_no_attention_map(spec: str) -> None:
    """No tensor of the size of one layer's attention maps is ever made on account of a saliency row."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=8, image_size=256, patch_size=8
    )
    text = LlamaConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=8, vocab_size=128)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    tokens, heads = 32 * 32, 8
    ids = torch.cat([torch.full((tokens,), IMAGE), torch.arange(10, 14)])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 256, 256)}
    with vtc.compress(model, spec), Watch() as compressed:
        model(**inputs)
    assert compressed.largest < heads * tokens * tokens / 4


def test_batches_say_what_they_hold() -> None:
    prompts = FAMILIES["llava"].batch([ONE_IMAGE, TEXT])
    inputs = prompts.inputs()
    real = inputs["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"][0], prompts.rows[0].ids) and real[0].all()
    assert torch.equal(inputs["input_ids"][1][real[1]], prompts.rows[1].ids)
    assert real[1].sum() == len(prompts.rows[1].ids) and not real[1, : prompts.padding(1)].any()
    assert (prompts.rows[0].ids[list(prompts.rows[0].shown[0].places)] == IMAGE).all()
    assert "pixel_values" not in prompts.alone(1)


@every_family
@torch.no_grad()
def test_uncompressed_rows_of_a_batch_are_those_rows_alone(family: Family) -> None:
    """What the laws presuppose of the models themselves."""
    model, prompts = family.model(), family.batch(family.shapes["ragged"])
    tokens, logits = generate(model, prompts.inputs())
    for number in range(len(prompts.rows)):
        alone, logits_alone = generate(model, prompts.alone(number))
        assert torch.equal(alone[0], tokens[number])
        assert error(logits_alone[0], logits[number]) < CLOSE[torch.float32]
