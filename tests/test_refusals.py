"""Bad input: one clear line that says what would be right, and a model that is as it was."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vtc
from families import llava
from models import IMAGE, batch, make_llava


@dataclass(kw_only=True)
class Wrong(vtc.Compressor):
    """A strategy that returns what it must not."""

    index: tuple[int, ...] = ()
    need: str = "features"

    def _check_types(self) -> None: ...

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.need})

    def select(self, visual: vtc.Visual) -> vtc.Selection:
        index = torch.tensor(self.index).expand(visual.features.shape[0], -1)
        return vtc.Selection(index, visual.layout.tokens)


REFUSED = {
    "unknown strategy": ("fastvlm:keep=5", "did you mean 'fastervlm'"),
    "unknown key": ("fastervlm:kep=5", "did you mean 'keep'"),
    "keep of zero": ("fastervlm:keep=0", "at least 1 token"),
    "negative keep": ("fastervlm:keep=-3", "at least 1 token"),
    "fraction above one": ("fastervlm:keep=1.5", "0 < keep <= 1.0"),
    "more than there are": ("fastervlm:keep=17", "at most 16"),
    "not a number": ("fastervlm:keep=many", "a whole number or a fraction"),
    "a layer too deep": ("fastervlm:layer=3", "3 layers"),
    "nothing": ([], "name at least one"),
    "a number": (5, "spec string"),
    "two at one place": (["random", "uniform"], "one compressor"),
    "an unknown need": (Wrong(need="telepathy"), "telepathy"),
}


@pytest.mark.parametrize(("spec", "hint"), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_a_bad_spec_leaves_the_model_as_it_was(spec: Any, hint: str) -> None:
    model, inputs = make_llava(), batch(1).inputs()
    with pytest.raises(vtc.VtcError, match=hint) as caught:
        vtc.compress(model, spec)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    session = vtc.compress(model, "random:keep=4")
    expected = model(**inputs).logits
    with pytest.raises(vtc.VtcError):
        vtc.compress(model, spec)
    assert session.active and torch.equal(model(**inputs).logits, expected)


def text_only() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )


def with_class_token_in_the_features() -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_only().config,
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def without_rotary_positions() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "num_experts": 1}
    text = JambaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, pad_token_id=0
    )
    return llava(text=lambda: text)


def two_models() -> nn.Module:
    return nn.ModuleList([make_llava(), make_llava()])


UNSUPPORTED = {
    "text only": (text_only, "random", "not a vision-language model"),
    "a module": (lambda: nn.Linear(2, 2), "random", "not a vision-language model"),
    "no rotary positions": (without_rotary_positions, "random", "no rotary_emb"),
    "two models": (two_models, "random", "each of them on its own"),
    "no module": (lambda: "llava", "random", "expected a torch.nn.Module"),
    "no class token": (lambda: make_llava("siglip"), "fastervlm", "fastervlm:keep=0.25,saliency=received, .*divprune"),
    "pivot without class token": (lambda: make_llava("siglip"), "todre", "todre:keep=0.25,pivot=random"),
    "class token among the features": (with_class_token_in_the_features, "random", "'default' does"),
}


@pytest.mark.parametrize(("build", "spec", "hint"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_model_is_refused(build: Any, spec: str, hint: str) -> None:
    model = build()
    with pytest.raises(vtc.UnsupportedModelError, match=hint) as caught:
        vtc.compress(model, spec)
    assert "\n" not in str(caught.value)
    if isinstance(model, nn.Module):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


WRONG = {
    "too few": (0, 1, 2),
    "descending": (3, 2, 1, 0),
    "twice the same": (0, 1, 1, 2),
    "beyond the end": (0, 1, 2, 16),
    "before the start": (-1, 0, 1, 2),
}


@pytest.mark.parametrize("index", WRONG.values(), ids=WRONG)
@torch.no_grad()
def test_a_strategy_that_breaks_its_contract_is_caught(index: tuple[int, ...]) -> None:
    model = make_llava()
    with vtc.compress(model, Wrong(keep=4, index=index)), pytest.raises((vtc.VtcError, RuntimeError)) as caught:
        model(**batch(2).inputs())
    assert isinstance(caught.value, vtc.VtcError)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("part", ["", "model.vision_tower"])
@torch.no_grad()
def test_a_compressed_model_is_not_copied(part: str, copied: Any) -> None:
    """Hooks of the copy would act on the model that it was copied from."""
    model, inputs = make_llava(), batch(1).inputs()
    with vtc.compress(model, "fastervlm:keep=4"), pytest.raises(vtc.VtcError, match="restore"):
        copied(model.get_submodule(part))
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


def test_a_session_that_is_over_is_not_entered() -> None:
    """The block would run uncompressed, or under another strategy."""
    model = make_llava()
    undone = vtc.compress(model, "uniform:keep=4")
    with undone:
        pass
    replaced = vtc.compress(model, "uniform:keep=4")
    with vtc.compress(model, "random:keep=4") as run:
        for session in (undone, replaced):
            with pytest.raises(vtc.VtcError, match=r"uniform.* removed>.*again"), session:
                pass
        assert run.active


@torch.no_grad()
def test_replicas_are_refused() -> None:
    """They share the hooks of the model, which know its parts alone."""
    model, inputs = make_llava(), batch(1).inputs()
    with vtc.compress(model, "uniform:keep=4"):
        replica = copy.copy(model.model)  # as shallow as those of torch.nn.DataParallel
        with pytest.raises(vtc.VtcError, match="DataParallel"):
            replica(**inputs)
        model(**inputs)
    replica(**inputs)


def test_an_undeclared_need_is_named() -> None:
    model = make_llava()
    with (
        vtc.compress(model, Wrong(keep=1, index=(0,), need="cls")),
        pytest.raises(AttributeError, match=r"features.*needs"),
    ):
        model(**batch(1).inputs())


@torch.no_grad()
def test_pixels_that_are_never_encoded_are_an_error() -> None:
    """Should the model find another way to its features, the caller hears that nothing was dropped."""
    model, inputs = make_llava(), batch(1).inputs()
    features = model.get_image_features(inputs["pixel_values"])
    with vtc.compress(model, "random:keep=4"), pytest.raises(vtc.VtcError, match="never ran"):
        model.model.get_image_features = lambda *args, **kwargs: features
        model(**inputs)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("fastv:keep=4,layer=1", "model.language_model.layers.1"),
        ("fastv:keep=4,layer=1", "model.language_model"),
        ("uniform:keep=4,positions=original", "model.language_model.rotary_emb"),
        ("uniform:keep=4", "model.language_model"),
        ("fastervlm:keep=4", "model.vision_tower.encoder.layers.1.self_attn"),
        ("fastervlm:keep=4", "model.vision_tower.encoder.layers.1.self_attn.k_proj"),
    ],
)
@torch.no_grad()
def test_parts_that_run_without_their_hooks_are_noticed(spec: str, part: str) -> None:
    """Code that torch.compile made earlier does so: it takes the hooks of inner modules for constant."""
    model, inputs = make_llava(), batch(1).inputs()
    with vtc.compress(model, spec):
        expected = model(**inputs).logits
        hooks = [vars(model.get_submodule(part))[f"_forward_{name}"] for name in ("pre_hooks", "hooks")]
        saved = [dict(table) for table in hooks]
        for table in hooks:
            table.clear()
        with pytest.raises(vtc.VtcError, match="skip_nnmodule_hook_guards"):
            model(**inputs)
        for table, before in zip(hooks, saved, strict=True):
            table.update(before)
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_saliency_of_a_compiled_encoder() -> None:
    model, inputs = make_llava(), batch(1).inputs()
    with vtc.compress(model, "fastervlm:keep=4") as run:
        model(**inputs)
        kept = run.last.kept  # type: ignore[union-attr]
    torch.compiler.reset()
    model.model.vision_tower.encoder.layers[1].self_attn.compile(backend="eager")
    with vtc.compress(model, "fastervlm:keep=4") as run:
        model(**inputs)
    assert run.last is not None and run.last.kept == kept
    torch.compiler.reset()


@torch.no_grad()
def test_projections_replaced_under_the_hooks_are_noticed() -> None:
    """LoRA wraps the projections that scores are read from; their hooks stay inside and see no LoRA."""
    import peft

    model, inputs = make_llava(), batch(1).inputs()
    config = peft.LoraConfig(target_modules=r".*vision_tower.*\.(q_proj|k_proj)", r=2, init_lora_weights=False)
    session = vtc.compress(model, "fastervlm:keep=4")
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(vtc.VtcError, match="compress.* again"):
        wrapped(**inputs)
    session = vtc.compress(wrapped, "fastervlm:keep=4")
    wrapped(**inputs)
    kept = session.last.kept  # type: ignore[union-attr]
    merged = wrapped.merge_and_unload()
    with pytest.raises(vtc.VtcError, match="compress.* again"):
        merged(**inputs)
    with vtc.compress(merged, "fastervlm:keep=4") as run:
        merged(**inputs)
    assert run.last is not None and run.last.kept == kept


def test_a_method_of_the_callers_own_is_put_back() -> None:
    model, inputs = make_llava(), batch(1).inputs()
    encode, calls = model.model.get_image_features, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return encode(*args, **kwargs)

    model.model.get_image_features = own
    with vtc.compress(model, "random:keep=4") as run:
        model(**inputs)
    assert calls and run.last is not None and len(run.last.kept[0]) == 4
    assert vars(model.model)["get_image_features"] is own


@pytest.mark.parametrize("spec", ["uniform:keep=4", "uniform:keep=4,positions=original", "fastv:keep=4,layer=1"])
@torch.no_grad()
def test_a_compressed_cache_is_not_continued_without_a_session(spec: str) -> None:
    """The positions and masks of what follows would be wrong, and nothing would tell."""
    model, inputs = make_llava(), batch(1).inputs()
    word = torch.tensor([[20]])
    with vtc.compress(model, spec):
        cache = model(**inputs).past_key_values
        expected = model(input_ids=word, past_key_values=copy.deepcopy(cache)).logits
    with pytest.raises(vtc.VtcError, match="compress the model again"):
        model(input_ids=word, past_key_values=cache)
    with vtc.compress(model, spec):
        assert torch.equal(model(input_ids=word, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_a_call_that_would_have_no_token_left_is_refused() -> None:
    model, inputs = make_llava(), batch(1).inputs()
    ids = inputs["input_ids"][:, inputs["input_ids"][0] == IMAGE]
    with vtc.compress(model, "todre-inner:layer=2"), pytest.raises(vtc.VtcError, match="no token of this call"):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])
