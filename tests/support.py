"""What surrounds a model and still works when it is compressed: the checks behind the table in README.md.

    python tests/support.py           print the table
    python tests/support.py --write   put it into README.md

Each check raises if it fails. What it asks for is what the compressed model does otherwise: one-shot, alone, unpadded.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import conftest  # noqa: F401  # mends torchvision before transformers looks for it
import vtc
from families import (
    BOTH,
    FAMILIES,
    GREEDY,
    LAYERS,
    ONE_CLIP,
    ONE_IMAGE,
    TWO_IMAGES,
    Family,
    Row,
    extended,
    llama,
)
from oracle import CLOSE, error
from vtc.compressor import LayerCompressor
from vtc.selection import Selection
from vtc.visual import Visual

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support table -->\n", "<!-- end -->\n"


@dataclass(kw_only=True)
class Spaced(LayerCompressor):
    """Keep every other token: a choice inside the language model that does not depend on what follows in the prompt."""

    name: ClassVar[str] = "spaced"

    def select(self, visual: Visual) -> Selection:
        index = torch.arange(visual.budget, device=visual.device) * visual.layout.tokens // visual.budget
        return Selection.keep(index.expand(visual.inputs, -1), visual.layout.tokens)


# Every kind of strategy: one that drops, one that merges and renumbers, one inside, and two at once.
SITES: dict[str, Callable[[], Any]] = {
    "drop": lambda: "uniform:keep=0.4",
    "merge": lambda: "pool:keep=6,positions=contiguous",
    "inside": lambda: Spaced(keep=0.4, layer=2),
    "both": lambda: ["uniform:keep=9", "todre-inner:layer=3"],
}


def near(value: Tensor, expected: Tensor) -> bool:
    return error(value, expected) < CLOSE[torch.float32]


def say(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **{**GREEDY, **options})


def new(out: Any) -> Tensor:
    """The tokens that were generated, `(B, T)`."""
    return out.sequences[:, -GREEDY["max_new_tokens"] :]


# ------------------------------------------------------------------------------------------------------------ checks


def images(family: Family, model: Any) -> None:
    """Prompts with several images, padded to one length."""
    same_alone(family, model, [row for row in family.shapes["ragged"] if "clip" not in row])


def clips(family: Family, model: Any) -> None:
    """Prompts with clips, padded to one length."""
    same_alone(family, model, [ONE_CLIP, BOTH])


def same_alone(family: Family, model: Any, rows: Any, **options: Any) -> None:
    prompts = family.batch(rows)
    together = new(say(model, prompts.inputs(), **options))
    for number in range(len(rows)):
        assert torch.equal(new(say(model, prompts.alone(number), **options))[0], together[number])


def second_turn(family: Family, model: Any) -> None:
    """More text on the returned cache is the whole conversation in one go."""
    for rows in ([ONE_IMAGE], family.shapes["ragged"]):
        inputs = family.batch(rows).inputs()
        first = say(model, inputs)
        more = torch.randint(10, 100, (len(rows), 4), generator=torch.Generator().manual_seed(1))
        whole = extended(inputs, torch.cat([new(first), more], dim=1))
        text = {name: whole[name] for name in whole if name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        second, expected = say(model, text, past_key_values=first.past_key_values), say(model, whole)
        assert torch.equal(second.sequences, expected.sequences)
        assert near(torch.stack(second.logits), torch.stack(expected.logits))


def second_image(family: Family, model: Any) -> None:
    """Another image or clip on the cache of a call is the whole conversation in one go."""
    segment = "clip" if family.name == "llava-onevision" else "image"  # whose only image is another than one of two
    prompts = family.batch([("text", "image", "text", segment, "text")])
    row = prompts.rows[0]
    start = row.shown[-1].places[0] - 2
    parts = [Row(row.ids[:start], row.shown[:1]), Row(row.ids[start:], row.shown[1:])]
    whole, first, second = (replace(prompts, rows=(part,)).inputs() for part in (row, *parts))
    if hasattr(model.model, "get_rope_index"):  # the sizes of earlier images decide where later ones stand
        sizes = {name: value for name, value in whole.items() if "pixel" not in name and name != "attention_mask"}
        second["position_ids"] = model.model.get_rope_index(**sizes)[0][:, :, start:]
    second["attention_mask"] = whole["attention_mask"]
    out = model(**second, past_key_values=model(**first).past_key_values)
    assert near(out.logits[:, -1], model(**whole).logits[:, -1])


def interleaved(family: Family, model: Any) -> None:
    """Two conversations take turns, each on its own cache."""
    inputs = [family.batch([rows]).inputs() for rows in (ONE_IMAGE, TWO_IMAGES)]
    expected = [say(model, one) for one in inputs]
    outs = [model(**one) for one in inputs]
    for step in range(1, GREEDY["max_new_tokens"]):
        for number in (0, 1):
            token = new(expected[number])[:, step - 1 : step]
            outs[number] = model(input_ids=token, past_key_values=outs[number].past_key_values)
            assert near(outs[number].logits[:, -1], expected[number].logits[step])


def beams(family: Family, model: Any) -> None:
    """Beam search."""
    same_alone(family, model, [ONE_IMAGE, ONE_IMAGE], num_beams=2)
    if family.frames:
        same_alone(family, model, [ONE_CLIP, ONE_CLIP], num_beams=2)


def several_beams(family: Family, model: Any) -> None:
    """Beam search over prompts with different numbers of images."""
    same_alone(family, model, [ONE_IMAGE, TWO_IMAGES], num_beams=2)


def samples(family: Family, model: Any) -> None:
    """Samples repeat under a seed, and several per prompt see the same tokens of the same images."""
    inputs = family.batch([ONE_IMAGE, ONE_IMAGE]).inputs()
    greedy, likeliest = say(model, inputs), say(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(new(likeliest), new(greedy).repeat_interleave(2, dim=0))
    assert near(likeliest.logits[0], greedy.logits[0].repeat_interleave(2, dim=0))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(new(say(model, inputs, do_sample=True, num_return_sequences=2)))
    assert torch.equal(*drawn)


def static_cache(family: Family, model: Any) -> None:
    """`cache_implementation="static"`."""
    for rows in ([ONE_IMAGE], family.shapes["ragged"]):
        inputs = family.batch(rows).inputs()
        assert torch.equal(new(say(model, inputs, cache_implementation="static")), new(say(model, inputs)))


def compiled(family: Family, model: Any) -> None:
    """`torch.compile` of the decoding step."""
    inputs = family.batch([ONE_IMAGE]).inputs()
    expected = say(model, inputs)
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager")
    cache = model(**inputs).past_key_values
    for number in range(1, 3):
        token = new(expected)[:, number - 1 : number]
        assert near(step(input_ids=token, past_key_values=cache).logits[:, -1], expected.logits[number])


def prompt_lookup(family: Family, model: Any) -> None:
    """`prompt_lookup_num_tokens`."""
    inputs = family.batch([ONE_IMAGE]).inputs()
    inputs["input_ids"][:, -4:] = torch.tensor([20, 21, 20, 21])  # something to look up
    assert torch.equal(new(say(model, inputs, prompt_lookup_num_tokens=2)), new(say(model, inputs)))


def draft_model(family: Family, model: Any) -> None:
    """`assistant_model`: a small language model proposes tokens."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    draft, inputs = LlamaForCausalLM(llama()).eval(), family.batch([ONE_IMAGE]).inputs()
    assert torch.equal(new(say(model, inputs, assistant_model=draft)), new(say(model, inputs)))


def chunked_prefill(family: Family, model: Any) -> None:
    """`prefill_chunk_size`."""
    inputs = family.batch([ONE_IMAGE]).inputs()
    assert torch.equal(new(say(model, inputs, prefill_chunk_size=10)), new(say(model, inputs)))


def embeddings(family: Family, model: Any) -> None:
    """`inputs_embeds`, in which the model fills the placeholders, beside pixel values."""
    inputs = family.batch([ONE_IMAGE, TWO_IMAGES]).inputs()
    expected, ids = model(**inputs).logits, inputs.pop("input_ids")
    given = {**inputs, "inputs_embeds": model.get_input_embeddings()(ids)}
    if hasattr(model.model, "get_rope_index"):  # which needs ids
        sizes = {name: value for name, value in inputs.items() if "pixel" not in name}
        given["position_ids"] = model.model.get_rope_index(input_ids=ids, **sizes)[0]
    assert near(model(**given).logits, expected)


def shapes(family: Family, model: Any) -> None:
    """`logits_to_keep`, `return_dict=False` and `output_hidden_states` give what they always gave."""
    inputs = family.batch([ONE_IMAGE, TWO_IMAGES]).inputs()
    out = model(**inputs, output_hidden_states=True)
    assert {layer.shape[:2] for layer in out.hidden_states} == {inputs["input_ids"].shape}
    assert len(out.hidden_states) == LAYERS + 1
    assert near(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
    assert near(model(**inputs, logits_to_keep=3).logits, out.logits[:, -3:])


def offloaded(family: Family, model: Any) -> None:
    """accelerate keeps the language model's weights on disk and fetches them for each layer."""
    import accelerate
    from accelerate.hooks import remove_hook_from_submodules

    inputs = family.batch([ONE_IMAGE]).inputs()
    expected = say(model, inputs)
    parts = [*(f"model.{name}" for name, _ in model.model.named_children()), "model.image_newline", "lm_head"]
    places = {part: "disk" if part == "model.language_model" else "cpu" for part in parts}
    with tempfile.TemporaryDirectory() as folder:
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        assert next(model.model.language_model.layers.parameters()).is_meta
        assert near(model(**inputs).logits[:, -1], expected.logits[0])
        try:
            assert torch.equal(new(say(model, inputs)), new(expected))
        finally:
            remove_hook_from_submodules(model)


def training(family: Family, model: Any, **options: Any) -> dict[str, Tensor]:
    """A loss with labels and a backward pass through LoRA adapters; returns their gradients."""
    inputs = family.batch([ONE_IMAGE]).inputs()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 10, -100)
    with torch.enable_grad():
        out = model(**inputs, labels=labels, **options)
        short, shifted = out.logits[:, :-1], labels[:, 1:]
        expected = torch.nn.functional.cross_entropy(short.flatten(0, 1), shifted.flatten())
        assert (out.loss - expected).abs() < 1e-5
        out.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    for index in range(LAYERS):
        assert any(f"layers.{index}." in name and grad.norm() > 0 for name, grad in gradients.items())
    return gradients


def lora(family: Family, model: Any) -> None:
    training(family, with_lora(model))


def checkpointed(family: Family, model: Any) -> None:
    """Gradient checkpointing runs every layer twice, and the gradients are the same."""
    wrapped = with_lora(model)
    expected = training(family, wrapped)
    wrapped.zero_grad()
    wrapped.gradient_checkpointing_enable()
    again = training(family, wrapped.train())
    assert again.keys() == expected.keys() and all(near(again[name], expected[name]) for name in again)


def with_lora(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    torch.manual_seed(2)
    return peft.get_peft_model(model, config)


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes:
        words: what is tried, for readers.
        run: tries it on a model of a family.
        changes: whether it changes the model, which is then not used again.
        clips: whether it is about clips.
        sites: the strategies it is tried with.
    """

    words: str
    run: Callable[[Family, Any], Any]
    changes: bool = False
    clips: bool = False
    sites: tuple[str, ...] = tuple(SITES)


CHECKS: dict[str, Check] = {
    check.run.__name__: check
    for check in (
        Check("images, several per prompt, padded batches", images),
        Check("clips, padded batches", clips, clips=True),
        Check("second turn on the cache: text", second_turn),
        Check("second turn on the cache: another image", second_image),
        Check("two conversations in turns", interleaved),
        Check("beam search", beams),
        Check("beam search, several images per prompt", several_beams),
        Check("sampling, `num_return_sequences`", samples),
        Check("static cache", static_cache),
        Check("`torch.compile` of decoding", compiled, sites=("both",)),  # seconds per model
        Check("prompt lookup", prompt_lookup),
        Check("draft model", draft_model),
        Check("chunked prefill", chunked_prefill),
        Check("`inputs_embeds` with pixel values", embeddings),
        Check("hidden states, `logits_to_keep`", shapes),
        Check("LoRA training with `labels`", lora, changes=True),
        Check("gradient checkpointing", checkpointed, changes=True),
        Check("weights offloaded by accelerate", offloaded, changes=True),
    )
}

# ------------------------------------------------------------------------------------------------------------- table

YES, REFUSED, UPSTREAM, NONE = "yes", "refused", "no: transformers", "no clips"
# "refused": vtc says why and what to do instead. "no: transformers": the uncompressed model cannot do it either.


@torch.no_grad()
def attempt(check: Check, family: Family, spec: Any) -> None:
    """Run a check on a fresh or shared model, compressed by `spec` unless that is `None`."""
    model = family.make() if check.changes else family.model()
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # what transformers remembers of earlier calls
    if spec is None:
        check.run(family, model)
        return
    with vtc.compress(model, spec) as run:
        check.run(family, model)
        report = run.last
        assert report is not None and report.tokens_out < report.tokens_in


@cache
def works_uncompressed(name: str, family: str) -> bool:
    try:
        attempt(CHECKS[name], FAMILIES[family], None)
    except (AssertionError, RuntimeError, ValueError, TypeError, StopIteration):
        return False
    return True


@cache
def outcome(name: str, family: str, site: str) -> str:
    """What happens: a cell of the table. Anything but success, refusal and a failure of the host is raised."""
    check = CHECKS[name]
    if check.clips and not FAMILIES[family].frames:
        return NONE
    try:
        attempt(check, FAMILIES[family], SITES[site]())
    except vtc.VtcError:
        return REFUSED
    except Exception:
        if works_uncompressed(name, family):
            raise
        return UPSTREAM
    return YES


def table() -> str:
    """The table as Markdown: a line per check, with the families on which something else happens than on most."""
    lines = [f"| on {len(FAMILIES)} families | |", "|---|---|"]
    for name, check in CHECKS.items():
        where: dict[str, list[str]] = {}
        for family in FAMILIES:
            found = " / ".join(sorted({outcome(name, family, site) for site in check.sites}))
            where.setdefault(found, []).append(family)
        usual, *others = sorted(where, key=lambda found: -len(where[found]))
        cell = "; ".join([usual, *(f"{found} ({list_of(where[found])})" for found in others)])
        lines.append(f"| {check.words} | {cell} |")
    return "\n".join(lines) + "\n"


def list_of(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def main() -> None:
    torch.set_num_threads(1)
    made = table()
    print(made)
    if "--write" in sys.argv:
        before, _, rest = README.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        README.write_text(before + BEGIN + made + END + after)


if __name__ == "__main__":
    main()
