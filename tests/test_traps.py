"""Mistakes that implementations of such methods have made, or that their host invites, and the tests that would notice.

Each line of `TRAPS` was tried: with the mistake made on purpose, its tests fail. What no other file tests is here.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import vtc
from cases import DECODER_SPECS, DROPPING
from combinations import applies
from families import BOTH, CLIP, FAMILIES, GREEDY, IMAGE, ONE_CLIP, ONE_IMAGE, TEXT, TWO_IMAGES, Family
from oracle import CLOSE, Recorder, error
from vtc.boundary import bind
from vtc.compressor import parse, strategy
from vtc.kernels import density_peaks
from vtc.strategies.holitom import cluster

TESTS = Path(__file__).parent

# What goes wrong -> the tests that fail then.
TRAPS: dict[str, tuple[str, ...]] = {
    # Methods, as others have written them
    "numbers of tokens, layers or placeholder ids of one model are written into the code": (
        "test_traps.py::test_no_id_of_a_placeholder_is_known_in_advance",
        "test_laws.py::test_law_2_oracle",
    ),
    "row 0 of a batch, or its first image, stands for all": (
        "test_laws.py::test_law_4_batch",
        "test_decoder_site.py::test_what_each_layer_of_the_cache_holds",
    ),
    "a class is patched, for every model in the process": ("test_traps.py::test_no_class_is_changed",),
    "environment variables decide": ("test_traps.py::test_no_environment_and_no_eval",),
    "a layer is run in eager attention, for one row of its map": (
        "test_traps.py::test_nobody_is_asked_for_attention_maps",
        "test_laws.py::test_law_10_no_attention_map",
    ),
    "the mask of a layer is None, and its scores are taken without any": (
        "test_decoder_site.py::test_exchanged_attention_is_that_of_the_whole_map",
        "test_decoder_site.py::test_padding_on_the_right",
    ),
    "density peaks break ties at random": (
        "test_traps.py::test_density_peaks_are_not_drawn_by_lot",
        "test_holitom.py::test_every_budget",
    ),
    "survivors reach the language model in order of score": (
        "test_selection.py::test_keep_puts_indices_into_raster_order",
        "test_refusals.py::test_a_strategy_that_breaks_its_contract_is_caught",
        "test_laws.py::test_law_6_order",
    ),
    "members of a group are averaged in whatever order they come": (
        "test_decoder_strategies.py::test_holitom_inner",
        "test_decoder_strategies.py::test_the_later_member_weighs_more",
    ),
    "merged tokens are summed, not averaged": ("test_traps.py::test_merging_is_averaging",),
    "tokens are masked but carried along, and counted as saved": (
        "test_traps.py::test_layers_really_get_fewer_tokens",
        "test_laws.py::test_law_4_padding_is_not_carried_along",
        "test_decoder_site.py::test_what_each_layer_of_the_cache_holds",
    ),
    "newlines come on top of the budget": ("test_traps.py::test_the_budget_is_the_number_in_the_spec",),
    "how many tokens survive depends on what is seen": (
        "test_traps.py::test_by_default_no_length_depends_on_content",
        "test_holitom.py::test_a_still_clip_stays_short_as_published_and_is_filled_by_default",
        "test_laws.py::test_law_5_budget",
    ),
    "survivors are numbered anew where a method keeps positions, or the other way round": (
        "test_laws.py::test_law_2_oracle",
        "test_decoder_site.py::test_prefill_and_decoding_are_those_of_the_layers_by_hand",
    ),
    "layers in front of a cut keep everything in the cache, and nothing can be done about it": (
        "test_decoder_site.py::test_what_each_layer_of_the_cache_holds",
        "test_decoder_site.py::test_prefill_and_decoding_are_those_of_the_layers_by_hand",
    ),
    "a segment of one frame is all static, or divides nothing by nothing": (
        "test_holitom.py::test_segments",
        "test_holitom.py::test_every_budget",
    ),
    "text is evaluated as code": ("test_traps.py::test_no_environment_and_no_eval",),
    "a branch that nobody ran uses a name that does not exist": ("test_traps.py::test_every_name_exists",),
    # The host
    "sub-modules are called with positional arguments, which nobody looks at": (
        "test_interception.py::test_positional_arguments",
        "test_laws.py::test_law_2_oracle",
    ),
    "callers pass inputs_embeds, and there are no ids to look for placeholders in": (
        "test_interception.py::test_inputs_embeds_with_pixel_values",
        "test_support.py::test_law_9",
    ),
    "tokens are dropped before the placeholders are filled": ("test_laws.py::test_law_2_oracle",),
    "the attention mask is None, 4-D, or a dict of masks": (
        "test_interception.py::test_prepared_masks",
        "test_support.py::test_law_9",
    ),
    "positions with gaps are taken for packed sequences": ("test_traps.py::test_gaps_in_positions_are_not_borders",),
    "positions have a leading row for text": ("test_laws.py::test_law_3_cache",),
    "what is generated later keeps the old numbers though the prompt was numbered anew": (
        "test_laws.py::test_law_3_cache",
        "test_decoder_site.py::test_prefill_and_decoding_are_those_of_the_layers_by_hand",
    ),
    "images are encoded before the call, so no pixels arrive": (
        "test_interception.py::test_image_features_computed_before_the_call",
        "test_laws.py::test_law_3_cache",
    ),
    "a call with several tokens is taken for the first one": (
        "test_support.py::test_law_9",
        "test_decoder_site.py::test_pieces_of_a_prompt_on_one_cache_are_the_prompt_at_once",
    ),
    "what a conversation needs later is kept on the module": (
        "test_laws.py::test_law_7_interleaved_generation",
        "test_interception.py::test_a_copied_cache_is_its_own",
    ),
    "the length of a cache is that of its tensors, and generate slices the next prompt by it": (
        "test_interception.py::test_a_second_turn_on_the_returned_cache",
        "test_support.py::test_law_9",
    ),
    "masks are as long as the text, and the cache is not": (
        "test_laws.py::test_law_4_batch",
        "test_decoder_site.py::test_second_turns_in_a_batch",
    ),
    "layers behind a cut get the mask or rotation of layer 0": (
        "test_decoder_site.py::test_prefill_and_decoding_are_those_of_the_layers_by_hand",
        "test_laws.py::test_law_4_batch",
    ),
    "features that a model adds behind its first layers keep their old places": ("test_laws.py::test_law_2_oracle",),
    "tensors of the caller are written to": ("test_traps.py::test_tensors_of_callers_stay_as_they_were",),
    "scores are read in another layer than the one that features come from": (
        "test_traps.py::test_features_come_from_the_feature_layer",
        "test_adapters_internvl.py::test_the_feature_layer_is_the_one_that_features_come_from",
    ),
    "scores do not follow the packing of crops": (
        "test_adapters_llava.py::test_scores_of_images_go_the_way_of_features",
        "test_adapters_llava.py::test_scores_of_images_equal_scores_packed_by_the_model",
    ),
    "scores do not follow the pooling of frames": (
        "test_adapters_llava.py::test_scores_of_clips_equal_scores_pooled_by_the_model",
    ),
    "scores do not follow the merging of patches": (
        "test_adapters_qwen.py::test_scores_go_the_way_of_features",
        "test_adapters_qwen.py::test_tokens_stand_where_their_patches_stand",
    ),
    "beams repeat a prompt with its images, and scores of another image are taken": (
        "test_interception.py::test_beams_and_samples_repeat_the_images",
        "test_interception.py::test_beams_with_several_images_per_prompt",
        "test_traps.py::test_copies_of_encoded_images_are_not_confused",
    ),
}

SITES = {"input": "pool:keep=4", "drop": "random:keep=4,positions=original", "inside": "holitom-inner:keep=4,layer=2"}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_site = pytest.mark.parametrize("spec", SITES.values(), ids=SITES)


def test_every_trap_has_tests_that_exist() -> None:
    defined = {
        f"{path.name}::{node.name}"
        for path in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert all(TRAPS.values())
    assert {name for names in TRAPS.values() for name in names} <= defined


def segments(family: Family) -> list[tuple[str, ...]]:
    """Prompts of everything that the family takes."""
    return [TWO_IMAGES, TEXT, *([ONE_CLIP, BOTH] if family.frames else []), ONE_IMAGE]


# Methods


@every_family
@torch.no_grad()
def test_no_id_of_a_placeholder_is_known_in_advance(family: Family) -> None:
    """The same prompts, with other ids for the placeholders, and the old ones as words: the same answer."""
    model, prompts = family.make(), family.batch(segments(family))
    inputs = prompts.inputs()
    swapped = inputs["input_ids"].clone()
    for old, new in ((IMAGE, 120), (CLIP, 121)):
        swapped[inputs["input_ids"] == old] = new
    words, table = swapped[(swapped >= 10) & (swapped < 100)].unique()[:2], model.get_input_embeddings().weight
    table[[IMAGE, CLIP]] = table[words]  # for when they are words
    with vtc.compress(model, ["uniform:keep=5", "fastv:keep=3,layer=2"]) as run:
        expected = model(**inputs).logits
        kept = run.last.kept  # type: ignore[union-attr]
        for name, value in (("image_token_id", 120), ("video_token_id", 121)):
            if hasattr(model.config, name):
                setattr(model.config, name, value)
        assert torch.equal(model(**{**inputs, "input_ids": swapped}).logits, expected)
        assert run.last.kept == kept  # type: ignore[union-attr]
        for old, new in zip(words, (IMAGE, CLIP), strict=True):
            swapped[swapped == old] = new
        assert torch.equal(model(**{**inputs, "input_ids": swapped}).logits, expected)
        assert run.last.kept == kept  # type: ignore[union-attr]


def behaviour(model: Any) -> dict[tuple[type, str], Any]:
    """Every attribute of every class that a call goes through."""
    from transformers import DynamicCache

    classes = {cls for module in model.modules() for cls in type(module).__mro__} | set(DynamicCache.__mro__)
    return {(cls, name): value for cls in classes for name, value in vars(cls).items()}


@every_site
@torch.no_grad()
def test_no_class_is_changed(spec: str) -> None:
    """While one model is compressed, another of the same class and its caches are as they were."""
    family = FAMILIES["llava"]
    model, other, inputs = family.make(), family.make(), family.batch([TWO_IMAGES, ONE_IMAGE]).inputs()
    expected, before = other.generate(**inputs, **GREEDY), behaviour(other)
    with vtc.compress(model, spec):
        model.generate(**inputs, **GREEDY)
        now = behaviour(other)
        assert {key for key, value in now.items() if before.get(key) is not value} <= {
            key
            for key in now
            if key[1].startswith(("_abc_", "__"))  # caches of Python's own
        }
        again = other.generate(**inputs, **GREEDY)
        assert torch.equal(torch.stack(again.logits), torch.stack(expected.logits))
        assert type(again.past_key_values) is type(expected.past_key_values)
        assert not any("get_image_features" in vars(module) for module in other.modules())


def sources() -> Iterator[tuple[str, ast.AST]]:
    for folder in ("vtc", "adapters", "eval"):
        for path in sorted((TESTS.parent / folder).rglob("*.py")):
            yield str(path.relative_to(TESTS.parent)), ast.parse(path.read_text(encoding="utf-8"))


def test_no_environment_and_no_eval() -> None:
    found, files = [], 0
    for name, tree in sources():
        files += 1
        for node in ast.walk(tree):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            read = node.attr if isinstance(node, ast.Attribute) else ""
            taken = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if {called} & {"eval", "exec", "compile", "__import__"} or {read, *taken} & {"environ", "getenv", "putenv"}:
                found.append(f"{name}:{getattr(node, 'lineno', 0)}")
    assert files > 50 and not found


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def test_every_name_exists() -> None:
    """Also those that only a rare branch looks up."""
    missing, looked = [], 0
    for found in pkgutil.walk_packages(vtc.__path__, "vtc."):
        if found.name.endswith("__main__"):
            continue
        try:
            module: Any = importlib.import_module(found.name)
        except ImportError:  # what it needs is optional
            continue
        for code in codes(module.__spec__.loader.get_code(found.name)):
            names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
            looked += len(names)
            missing += [
                f"{found.name}: {name}" for name in names if not (hasattr(module, name) or hasattr(builtins, name))
            ]
    assert looked > 1000 and not missing


@pytest.mark.parametrize("name", ["llava", "llava-siglip", "qwen25vl", "internvl"])
@pytest.mark.parametrize(
    "spec",
    ["fastervlm:keep=5,saliency=received", "fastv:keep=5,layer=2", "pyramiddrop:stages=1", "todre-inner:tau=0.9"],
)
@torch.no_grad()
def test_nobody_is_asked_for_attention_maps(spec: str, name: str) -> None:
    """No module is called with `output_attentions`, and all run the attention that they were set to."""
    family = FAMILIES[name]
    model, inputs, seen = family.make("sdpa"), family.batch([TWO_IMAGES, ONE_IMAGE]).inputs(), []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
        seen.append((bool(kwargs.get("output_attentions")), chosen))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    with vtc.compress(model, spec) as run:
        model.generate(**inputs, **GREEDY)
    for handle in handles:
        handle.remove()
    assert run.last is not None and run.last.kept
    assert set(seen) == {(False, "sdpa")}


@pytest.mark.parametrize("seed", range(5))
def test_density_peaks_are_not_drawn_by_lot(seed: int) -> None:
    """Of a row and its copies the first is the centre, whatever the random numbers; signs are exact in float32."""
    draw = torch.Generator().manual_seed(seed)
    once = torch.randint(0, 2, (1, 7, 16), generator=draw) * 2.0 - 1.0
    rows, everything = torch.cat([once, once, once], dim=1), torch.ones(1, 21, dtype=torch.bool)
    seen = []
    for lot in range(4):
        torch.manual_seed(lot)
        owner, _ = cluster(rows, everything, torch.tensor([[4]]), 0.6)
        assert len(set(owner[0].tolist())) == 4 and owner.max() < 7
        peaks = density_peaks(rows, 4, 3)
        assert peaks.max() < 7
        seen.append((owner.tolist(), peaks.tolist()))
    assert seen == seen[:1] * 4


@every_family
@torch.no_grad()
def test_merging_is_averaging(family: Family) -> None:
    """The weights of what goes into a survivor sum to one, so that nothing grows with the number of tokens merged."""
    model, inputs, merged = family.model(), family.batch(segments(family)).inputs(), 0
    for spec in [*DROPPING.values(), *DECODER_SPECS.values()]:
        if not applies(spec, family):
            continue
        recorder = Recorder([spec])
        with vtc.compress(model, recorder.compressors):
            model(**inputs)
        for call in recorder.calls[0]:
            if call.selection.merges:
                merged += 1
                sums = call.selection.matrix().sum(2)
                assert torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-5), spec
    assert merged


@every_family
@pytest.mark.parametrize("spec", [*SITES.values(), "pyramiddrop:stages=1,keep=2"])
@torch.no_grad()
def test_layers_really_get_fewer_tokens(spec: str, family: Family) -> None:
    """The tensors that decoder layers are given are as short as the report says."""
    model, prompts = family.model(), family.batch([TWO_IMAGES])
    seen: list[int] = []
    with vtc.compress(model, spec) as run:
        handles = [
            layer.register_forward_hook(
                lambda module, args, kwargs, output: seen.append(output.shape[1]), with_kwargs=True
            )
            for layer in model.model.language_model.layers
        ]
        out = model(**prompts.inputs())
        for handle in handles:
            handle.remove()
    size, tokens = len(prompts.rows[0].ids), sum(item.tokens for _, item in prompts.visuals())
    assert run.last is not None and seen == list(run.last.lengths)
    assert seen[-1] == size - tokens + sum(map(len, run.last.kept)) < size
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == seen


@pytest.mark.parametrize("name", ["llava-next", "llava-next-video", "llava-onevision", "qwen3vl", "internvl"])
@torch.no_grad()
def test_the_budget_is_the_number_in_the_spec(name: str) -> None:
    """Newlines and all: `keep=11` is 11 of what the language model would see of an image, `keep=0.5` is half of it."""
    family = FAMILIES[name]
    model, prompts = family.model(), family.batch(segments(family))
    inputs, sizes = prompts.inputs(), [item.tokens for _, item in prompts.visuals()]
    options = {
        "fastervlm": ",saliency=received",
        "globalcom2": "" if family.class_token else ",saliency=mean",
        "pyramiddrop": ",stages=1",
        "todre": ",pivot=received",
        "vtc-cls": ",start=0",
    }
    for one in sorted(set(vtc.available()) - {"none", "todre-inner"}):  # which take no number
        for keep in ("11", "0.5"):
            spec = f"{one}:keep={keep}{options.get(one, '')}"
            if not applies(spec, family):
                continue
            with vtc.compress(model, spec) as run:
                model(**inputs)
            counts = [len(kept) for kept in run.last.kept]  # type: ignore[union-attr]
            half = int if one == "pyramiddrop" else lambda size: int(size + 0.5)  # published so
            wanted = [min(11, size) if keep == "11" else half(size / 2) for size in sizes]
            if one == "pool":  # whose grids of blocks can only be smaller
                assert all(count <= most for count, most in zip(counts, wanted, strict=True)), spec
            else:
                assert counts == wanted, spec


def test_by_default_no_length_depends_on_content() -> None:
    for name in vtc.available():
        assert not strategy(name)().adaptive, name


# The host


@pytest.mark.parametrize("name", ["llava", "llava-siglip", "qwen2vl", "qwen3vl"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_site
@torch.no_grad()
def test_gaps_in_positions_are_not_borders(spec: str, attention: str, name: str) -> None:
    """Without a mask and without a cache, transformers would see packed sequences; flash attention always would."""
    family = FAMILIES[name]
    model, inputs = family.model(attention), family.batch([TWO_IMAGES]).inputs()
    numbers: list[Tensor] = []
    turned: list[Tensor] = []
    text = model.model.language_model
    with vtc.compress(model, spec):
        expected = model(**inputs).logits
        handles = [
            *(
                layer.register_forward_pre_hook(
                    lambda m, args, kwargs: numbers.append(kwargs["position_ids"]), with_kwargs=True
                )
                for layer in text.layers
            ),
            text.rotary_emb.register_forward_pre_hook(
                lambda m, args, kwargs: turned.append(bind(m, args, kwargs)["position_ids"]), with_kwargs=True
            ),
        ]
        del inputs["attention_mask"]
        assert error(model(**inputs, use_cache=False).logits, expected) < CLOSE[torch.float32]
        for handle in handles:
            handle.remove()
    assert len(numbers) == len(text.layers)
    given = [number for number in numbers if number is not None]  # Qwen gives its layers none
    assert all((number.diff(dim=-1) == 1).all() for number in given)
    assert given or name == "qwen2vl"
    if "contiguous" not in str(parse(spec).positions):
        assert (turned[-1].diff(dim=-1) > 1).any()  # these are the true ones


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


@every_family
@every_site
@torch.no_grad()
def test_tensors_of_callers_stay_as_they_were(spec: str, family: Family) -> None:
    """What the model's caller passes, what the model passes to its language model, and what the encoder returned."""
    model, inputs = family.make(), family.batch(segments(family)).inputs()
    given: list[tuple[Tensor, Tensor]] = [(value, value.clone()) for value in inputs.values()]

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.extend((value, value.clone()) for value in tensors([args, kwargs]))

    def note_output(module: Any, args: Any, output: Any) -> None:
        given.extend((value, value.clone()) for value in tensors([output]))

    text = model.model.language_model
    text.register_forward_pre_hook(note, with_kwargs=True)  # before those of the session
    for module in (text.layers[0], text.layers[1], getattr(model.model, "multi_modal_projector", None)):
        if module is not None:
            module.register_forward_hook(note_output)
    size = inputs["input_ids"].shape[1]
    with vtc.compress(model, spec):
        out = model(**inputs)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(out.logits), 1, dtype=torch.long)], dim=1)
        numbers = torch.full((len(out.logits), 1), size)
        numbers = numbers.expand(3, -1, -1).clone() if hasattr(model.model, "get_rope_index") else numbers
        more = {"input_ids": torch.full((len(out.logits), 1), 11), "attention_mask": mask, "position_ids": numbers}
        given.extend((value, value.clone()) for value in more.values())
        model(**more, past_key_values=out.past_key_values)
    assert len(given) > 10
    assert all(torch.equal(value, before) for value, before in given)


@pytest.mark.parametrize(
    ("name", "number", "layer"), [("llava", -2, 1), ("llava", -1, 2), ("llava", 1, 0), ("llava-siglip", -2, 1)]
)
@torch.no_grad()
def test_features_come_from_the_feature_layer(name: str, number: int, layer: int) -> None:
    """What later layers of the encoder do changes no feature; `number` counts as `vision_feature_layer` does."""
    from vtc import adapters

    def shifted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = bind(module, args, kwargs)
        hidden = given.pop("hidden_states")
        return (hidden + torch.randn(hidden.shape[1:]),), given

    model = FAMILIES[name].make()
    model.config.vision_feature_layer = number
    pixels = torch.randn(1, 3, 56, 56)
    adapter = adapters.find(model)
    assert adapter.encoder_info.feature_layer == layer
    expected = model.model.get_image_features(pixels).pooler_output[0]
    layers = adapter._layers  # type: ignore[attr-defined]
    for index, part in enumerate(layers):
        handle = part.register_forward_pre_hook(shifted, with_kwargs=True)
        changed = model.model.get_image_features(pixels).pooler_output[0]
        handle.remove()
        assert torch.equal(changed, expected) == (index > layer)


@pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters,
    reason="this transformers release does not run the encoder ahead of the prefill",
)
@torch.no_grad()
def test_copies_of_encoded_images_are_not_confused() -> None:
    """Prompts of beams come with copies of what was encoded once; each keeps what the scores of its own image say."""
    family = FAMILIES["llava"]
    model, prompts = family.model(), family.batch([TWO_IMAGES, TEXT, ONE_IMAGE])
    inputs = prompts.inputs()
    pixels = inputs.pop("pixel_values")
    with vtc.compress(model, "fastervlm:keep=5") as run:
        expected = model(**inputs, pixel_values=pixels).logits
        first, second, third = run.last.kept  # type: ignore[union-attr]
        assert len({first, second, third}) == 3
        for beams in (1, 2, 3):
            encoded = model.model.get_image_features(pixels, return_dict=True)
            one, two, three = encoded.pooler_output
            encoded["pooler_output"] = [feature.clone() for feature in [one, two] * beams + [three] * beams]
            repeated = {name: value.repeat_interleave(beams, dim=0) for name, value in inputs.items()}
            out = model(**repeated, mm_encoder_outputs={"image": encoded})
            assert run.last.kept == (first, second) * beams + (third,) * beams  # type: ignore[union-attr]
            assert error(out.logits, expected.repeat_interleave(beams, dim=0)) < CLOSE[torch.float32]
