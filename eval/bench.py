"""The comparison behind `vtc bench`: one model, many settings, one row of measurements for each.

A setting is a compressor, or one of two baselines that every run has: `none`, the uncompressed model, and `blind`, the
same questions without the picture. The strategies `random` (three seeds), `uniform` and `pool` are baselines too: they
join every run at every `keep` that occurs in it.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tqdm import tqdm

import vtc
from vtc import adapters, zoo
from vtc.compressor import Compressor, as_compressors, available, parse
from vtc.errors import SpecError, UnsupportedModelError, VtcError
from vtc.eval import accuracy, flops, latency, lines, resume, tasks
from vtc.eval.items import Item
from vtc.report import Report

BASELINES = ("random", "uniform", "pool")
SEEDS = 3  # of `random`, which is reported as a mean with its spread
KEEPS: tuple[int | float, ...] = (0.5, 0.25, 0.11)
DRAWN = ("grid", "kept", "sources")  # what a drawing of the survivors needs
SPLIT = "test"  # of the bundled questions
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

NOTHING = resume.Earlier()

Row = dict[str, Any]
Sample = dict[str, Any]  # one question under one setting


@dataclass(frozen=True)
class Options:
    """What to compare and how; the command line's options."""

    model: str = "tiny-llava"
    task: str | None = None  # by default the one that a bundled model was trained for
    specs: tuple[str, ...] = ()  # all strategies if empty
    keeps: tuple[int | float, ...] = KEEPS  # for specs that do not name their own
    limit: int | None = None  # number of questions
    batch_size: int = 50
    seed: int = 0
    attention: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    positions: Literal["original", "contiguous"] | None = None  # overrides every strategy's own
    latency: bool = True

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise VtcError(f"--{name.replace('_', '-')} is {value}; use at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise VtcError(f"--dtype is '{self.dtype}'; use one of {', '.join(DTYPES)}")
        for keep in self.keeps:
            Compressor(keep=keep)  # refuses what is out of range
        tasks.check(self.asked)
        check_device(self.device)

    @property
    def asked(self) -> str:
        """The task whose questions are asked."""
        return self.task or tasks.task_of(self.model)


@dataclass(frozen=True)
class Setting:
    """One line of the comparison."""

    name: str  # "none", "blind", or the strategies
    compressors: tuple[Compressor, ...] = ()  # the budgets vary that of the first

    @property
    def spec(self) -> str:
        return "+".join(str(one) for one in self.compressors) or self.name

    @property
    def compressor(self) -> Compressor | None:
        return self.compressors[0] if self.compressors else None

    @property
    def blind(self) -> bool:
        return self.name == "blind"

    @property
    def keep(self) -> int | float:
        if self.compressor is not None:
            return self.compressor.keep
        return 0.0 if self.blind else 1.0

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """The context in which `model` is compressed like this."""
        return vtc.compress(model, self.compressors) if self.compressors else nullcontext()


@dataclass(frozen=True)
class Sizes:
    """What a setting does to the first prompt: lengths and FLOPs, for one sequence."""

    tokens_in: int  # visual tokens
    tokens_out: int
    sequence_in: int  # text included
    sequence_out: int
    encoder_flops: int
    projector_flops: int
    prefill_flops: int  # language model, one row of logits
    decode_flops: int  # of the first generated token
    kv_cache_bytes: int  # after the prompt


# ---------------------------------------------------------------------------------------------------------- the plan


def check_device(name: str) -> None:
    """Refuse a device that does not exist here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise VtcError(f"device '{name}' is not available here; use one of: {have}") from error


def settings(options: Options) -> list[Setting]:
    """All settings of a run, each once: `none` and `blind`, then strategy by strategy, the largest budget first."""
    if not options.keeps:
        raise SpecError("--keep names no budget: give at least one, for example 0.25")
    specs = options.specs or tuple(name for name in available() if name != "none")
    asked = [one for spec in specs for one in _expand(spec, options.keeps, options.seed)]
    keeps = _distinct([one[0].keep for one in asked if one[0].keep]) or options.keeps  # baselines keep something
    usual = [one for name in BASELINES for one in _expand(name, keeps, options.seed)]
    found: dict[str, Setting] = {}
    for compressors in [*asked, *usual]:
        if options.positions is not None:
            compressors = tuple(replace(one, positions=options.positions) for one in compressors)
        setting = Setting("+".join(one.name for one in compressors), compressors)
        found.setdefault(setting.spec, setting)
    order = _distinct([setting.name for setting in found.values()])
    compressed = sorted(found.values(), key=lambda setting: order.index(setting.name))  # stable
    return [Setting("none"), Setting("blind"), *compressed]


def budgets(spec: str, keeps: Sequence[int | float]) -> list[tuple[Compressor, ...]]:
    """The compressors of `spec` once per budget of the first, or as the spec asks itself; without `keeps`, the default.

    A strategy that by default keeps nothing has no budget to vary.
    """
    first, *others = as_compressors(spec)
    if "keep" in _named(spec) or not keeps or first.keep == 0:
        return [(first, *others)]
    return [(replace(first, keep=keep), *others) for keep in keeps]


def _expand(spec: str, keeps: Sequence[int | float], seed: int) -> list[tuple[Compressor, ...]]:
    """The settings that a spec stands for: its budgets, and several seeds of `random` unless it names one."""
    if as_compressors(spec)[0].name == "none":
        return []  # every run has it
    found = budgets(spec, keeps)
    first = found[0][0]
    if first.name != "random" or "seed" in _named(spec):
        return found
    return [(parse(f"{one},seed={seed + k}"), *others) for one, *others in found for k in range(SEEDS)]


def _named(spec: str) -> set[str]:
    """The keys that the first compressor of a spec is given."""
    return {part.partition("=")[0].strip() for part in spec.partition("+")[0].partition(":")[2].split(",")}


def _distinct(values: Sequence[Any]) -> list[Any]:
    # The key tells the int 1 (one token) from the float 1.0 (all of them).
    return list({(type(value), value): value for value in values}.values())


# ----------------------------------------------------------------------------------------------------- measuring


def sizes(model: Any, setting: Setting, inputs: dict[str, torch.Tensor]) -> Sizes:
    """Run one prompt, to see that the setting works on this model and what it does to the lengths."""
    adapter = adapters.find(model)
    before = sum(int(mask.sum()) for mask in adapter.placeholders(inputs["input_ids"], None).values())
    with setting.on(model) as session:
        run = latency.run(model, inputs)
        report = None if session is None else session.last
    after = before if report is None else report.tokens_out
    config: Any = adapter.multimodal.config
    text = adapter.text_config
    lengths = [run.length] * text.num_hidden_layers if report is None else report.lengths
    return Sizes(
        tokens_in=before,
        tokens_out=after,
        sequence_in=inputs["input_ids"].shape[1],
        sequence_out=lengths[-1],
        encoder_flops=encoder_flops(config.vision_config, run.images, inputs),
        projector_flops=flops.projector_flops(config, projected(config.vision_config, run.images, before)),
        prefill_flops=flops.prefill_flops(text, lengths),
        decode_flops=flops.decode_flops(text, [length + 1 for length in lengths]),
        kv_cache_bytes=flops.kv_cache_bytes(text, lengths, model.dtype),
    )


def encoder_flops(vision_config: Any, views: int, inputs: dict[str, torch.Tensor]) -> int:
    """FLOPs of the encoder on the visual inputs of a prompt, which it sees as `views` views of one size, or packed."""
    if vision_config.model_type not in flops.PACKED:
        return flops.encoder_flops(vision_config, images=views)
    side, total = vision_config.spatial_merge_size, 0
    for name in ("image_grid_thw", "video_grid_thw"):
        for frames, rows, columns in inputs[name].tolist() if name in inputs else []:
            total += flops.encoder_flops(vision_config, grid=(frames, rows // side, columns // side))
    return total


def projected(vision_config: Any, views: int, tokens: int) -> int:
    """Rows that the projector computes: a LLaVA's come before padding is cut off and frames are pooled."""
    if vision_config.model_type in (*flops.PACKED, "internvl_vision"):
        return tokens
    return views * flops.per_edge(vision_config) ** 2


def load_model(options: Options) -> tuple[Any, Any]:
    """The model and its processor; refuses families that are not supported."""
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    model, processor = zoo.load(options.model, dtype=dtype, device=options.device, attention=options.attention)
    adapters.find(model)
    return model, processor


@dataclass(frozen=True)
class Bench:
    """A loaded model with its questions, ready to measure settings one after the other."""

    options: Options
    model: Any
    processor: Any
    items: Sequence[Item]

    def able(self, plan: Sequence[Setting]) -> list[Setting]:
        """The settings of `plan` that this model can do. One that was asked for by name must be among them."""
        found = []
        for setting in plan:
            try:
                with setting.on(self.model):
                    found.append(setting)
            except UnsupportedModelError:
                if self.options.specs:
                    raise
        return found

    def try_out(self, plan: Sequence[Setting]) -> list[Sizes]:
        """Every setting on one prompt: a mistake in the last one shows before the first is measured."""
        return [sizes(self.model, setting, self._first(setting.blind)) for setting in plan]

    def rows(
        self,
        plan: Sequence[Setting],
        shapes: Sequence[Sizes],
        *,
        progress: bool = False,
        earlier: resume.Earlier = NOTHING,
    ) -> Iterator[tuple[Row, list[Sample]]]:
        """Measure the settings in order: a row each, and what became of every question.

        `plan` begins with `none`; `shapes` is from `try_out(plan)`. What `earlier` has is not measured again.
        """
        torch.manual_seed(self.options.seed)
        reference = earlier.reference
        todo = [
            (setting, shape) for setting, shape in zip(plan, shapes, strict=True) if setting.spec not in earlier.specs
        ]
        # Off a terminal, in a log file, a line every ten seconds is enough.
        pace = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(total=len(todo) * len(self.items), unit="answer", disable=not progress, mininterval=pace) as bar:
            batches = self._batches(blind=False)
            for setting, shape in todo:
                bar.set_description(setting.spec, refresh=False)
                timing = self._time(setting) if self.options.latency else None
                prepared = self._batches(blind=True) if setting.blind else batches
                answers, seen = self._answer(setting, prepared, bar)
                reference = answers if reference is None else reference
                row = self._row(setting, shape, shapes[0], timing, answers, reference)
                yield row, self._samples(setting, answers, reference, seen)

    def _first(self, blind: bool) -> dict[str, torch.Tensor]:
        item = self.items[0]
        one = accuracy.process(self.processor, [item.question], [() if blind else item.media])
        return accuracy.to_device(one, self.model)

    def _batches(self, *, blind: bool) -> list[accuracy.Batch]:
        return accuracy.batches(self.processor, self.items, self.options.batch_size, blind=blind)

    def _time(self, setting: Setting) -> latency.Latency:
        return latency.measure(
            self.model,
            self._first(setting.blind),
            partial(setting.on, self.model),
            baseline=self._first(blind=False),
        )

    def _answer(
        self, setting: Setting, prepared: Sequence[accuracy.Batch], bar: tqdm
    ) -> tuple[list[str], list[Sample]]:
        """The answers, and what the language model saw of each picture; both in the order of the questions."""
        tokens = accuracy.longest_answer(self.processor, self.items)
        seen: dict[int, Sample] = {}
        with setting.on(self.model) as session:

            def done(batch: accuracy.Batch) -> None:
                report = None if session is None else session.last
                found = (
                    self._uncompressed(batch)
                    if report is None
                    else [survivors(report, k) for k in range(len(batch.rows))]
                )
                seen.update(zip(batch.rows, found, strict=True))
                bar.update(len(batch.rows))

            try:
                answers = accuracy.answer(self.model, self.processor, prepared, tokens, done)
            except RuntimeError as error:
                raise RuntimeError(f"{setting.spec}: {error}") from error
        return answers, [seen[row] for row in range(len(answers))]

    def _uncompressed(self, batch: accuracy.Batch) -> list[Sample]:
        masks = adapters.find(self.model).placeholders(batch.inputs["input_ids"], None).values()  # (B, S) each
        counts = [0] * len(batch.rows)
        for mask in masks:
            counts = [count + more for count, more in zip(counts, mask.sum(1).tolist(), strict=True)]
        return [{"tokens_in": count, "tokens_out": count} for count in counts]

    def _samples(
        self, setting: Setting, answers: Sequence[str], reference: Sequence[str], seen: Sequence[Sample]
    ) -> list[Sample]:
        """One object per question. Which tokens survived is told only where the answer is not the full model's."""
        samples = []
        for item, answer, other, what in zip(self.items, answers, reference, seen, strict=True):
            samples.append(
                {
                    "spec": setting.spec,
                    "id": sample_id(item),
                    "type": item.type,
                    "question": item.question,
                    "expected": item.answer,
                    "answer": answer,
                    "right": accuracy.right(answer, item),
                    **{key: value for key, value in what.items() if answer != other or key not in DRAWN},
                }
            )
        return samples

    def _row(
        self,
        setting: Setting,
        shape: Sizes,
        full: Sizes,
        timing: latency.Latency | None,
        answers: list[str],
        reference: list[str],
    ) -> Row:
        total, types = accuracy.score(answers, self.items)
        empty = dict.fromkeys((item.name for item in fields(latency.Latency)), None)
        measured = {**empty, **asdict(shape)} if timing is None else {**asdict(shape), **asdict(timing)}
        return {
            "model": self.options.model,
            "task": self.options.asked,
            "spec": setting.spec,
            "strategy": setting.name,
            "keep": setting.keep,
            **measured,
            "prefill_flops_ratio": shape.prefill_flops / full.prefill_flops,
            "accuracy": total.accuracy,
            "accuracy_ci": list(total.interval),
            "by_type": {name: score.to_dict() for name, score in types.items()},
            "agreement": accuracy.agreement(answers, reference),
            "n": total.n,
            "seed": getattr(setting.compressor, "seed", self.options.seed),
            "positions": getattr(setting.compressor, "positions", None),
            **environment(self.model),
        }


def sample_id(item: Item) -> str:
    """The name of a question, the same in every run: a scene is asked at most one question per type."""
    return f"{SPLIT}/{item.index}/{item.type}"


def survivors(report: Report, number: int) -> Sample:
    """What a call did to one of its pictures; with what a drawing needs if the picture is one grid of tokens."""
    layout, kept = report.layouts[number], report.kept[number]
    counts: Sample = {"tokens_in": layout.tokens, "tokens_out": len(kept)}
    if layout.tokens != math.prod(layout.grid) or layout.grid[0] != 1:
        return counts
    sources = report.sources[number]
    return {**counts, "grid": list(layout.grid[1:]), "kept": list(kept), "sources": sources and list(sources)}


def environment(model: Any) -> Row:
    """Where and with what a row was measured."""
    config = model.config.get_text_config()
    return {
        "family": adapters.find(model).family,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "threads": torch.get_num_threads(),
        "flops_convention": flops.CONVENTION,
        "versions": {
            "vtc": vtc.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# -------------------------------------------------------------------------------------------------------- on disk


def check_folder(out: Path, *, overwrite: bool = False) -> Path:
    """The path of the folder's `rows.jsonl`. Results of an earlier run are refused, unless `overwrite`."""
    path = out / "rows.jsonl"
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise VtcError(f"--out {out}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK):
        raise VtcError(f"--out {out}: {nearest} cannot be written to; give another folder")
    if path.exists() and path.stat().st_size and not overwrite:
        raise VtcError(
            f"{path} has results already: choose another --out, go on with --resume, or replace them with --overwrite"
        )
    return path


def read(path: Path) -> list[Row]:
    """The rows of a run.

    Raises:
        VtcError: there is no such file, or a line of it is cut off.
    """
    return [row for _, row in lines.read(path)]


def run(
    options: Options, out: Path, *, overwrite: bool = False, go_on: bool = False, progress: bool = False
) -> list[Row]:
    """The whole comparison. Rows go to `out/rows.jsonl` as they are measured, answers to `out/samples.jsonl`.

    A run that is killed keeps what it has measured; a setting's answers are there before its row. With `go_on` a run of
    the same kind is continued: settings that have a row are not measured again, and its rows come first.
    """
    plan = settings(options)
    path = check_folder(out, overwrite=overwrite or go_on)
    bench = Bench(options, *load_model(options), list(tasks.questions(options.asked, SPLIT, options.limit)))
    plan = bench.able(plan)
    shapes = bench.try_out(plan)
    earlier = NOTHING
    if go_on and not overwrite:
        now = {
            "model": options.model,
            "task": options.asked,
            "n": len(bench.items),
            "timed": options.latency,
            **environment(bench.model),
        }
        earlier = resume.load(out, now, [sample_id(item) for item in bench.items])
    rows = list(earlier.rows)
    out.mkdir(parents=True, exist_ok=True)
    mode: Literal["a", "w"] = "a" if rows else "w"
    with path.open(mode, encoding="utf-8") as results, (out / "samples.jsonl").open(mode, encoding="utf-8") as answers:
        for row, samples in bench.rows(plan, shapes, progress=progress, earlier=earlier):
            lines.append(answers, samples)
            lines.append(results, [row])
            rows.append(row)
    return rows
