"""The comparison behind `vtc bench`: one model, many settings (see `vtc.eval.plan`), a row of measurements for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from tqdm import tqdm

from vtc import adapters, zoo
from vtc.errors import UnsupportedModelError, VtcError
from vtc.eval import accuracy, checkpoints, downsample, flops, latency, lines, resume, tasks
from vtc.eval.conditions import environment
from vtc.eval.costs import Sizes, sizes
from vtc.eval.items import Item
from vtc.eval.made_up import count
from vtc.eval.plan import DOWNSAMPLE, DTYPES, Options, Setting, budgets, settings
from vtc.eval.prompts import Asked, Invented, Prompts
from vtc.eval.survivors import owners, survivors

__all__ = ["SPLIT", "Bench", "Options", "Setting", "budgets", "check_folder", "environment", "load_model", "run"]

DRAWN = ("grid", "layout", "kept", "sources")  # what a drawing of the survivors needs
SPLIT = "test"  # of the bundled questions
NOTHING = resume.Earlier()

Row = dict[str, Any]
Sample = dict[str, Any]  # one question under one setting


def load_model(options: Options) -> tuple[Any, Any]:
    """The model and its processor; refuses families that are not supported. Random weights have no processor."""
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    if options.made_up is None:
        model, processor = zoo.load(options.model, dtype=dtype, device=options.device, attention=options.attention)
        adapters.find(model)
        return model, processor
    torch.manual_seed(options.seed)
    usual = torch.float32 if torch.device(options.device).type == "cpu" else torch.bfloat16
    more = {} if options.attention is None else {"attn_implementation": options.attention}
    try:
        model = checkpoints.random_weights(options.model, dtype=dtype or usual, device=options.device, **more)
    except (ValueError, ImportError) as error:  # transformers' ways to say that there is no such attention
        raise VtcError(f"cannot make '{options.model}': {' '.join(str(error).split())}") from error
    adapters.find(model)
    return model, None


def prompts_for(options: Options, model: Any, processor: Any) -> Prompts:
    """What is asked, or the prompt that is made up."""
    if options.made_up is not None:
        return Invented(model, options.made_up)
    return Asked(model, processor, list(tasks.questions(options.asked, SPLIT, options.limit)), options.batch_size)


@dataclass(frozen=True)
class Bench:
    """A loaded model with its prompts, ready to measure settings one after the other."""

    options: Options
    model: Any
    processor: Any
    prompts: Prompts

    @property
    def fixed(self) -> bool:
        """Whether the usual prompt has equally many visual tokens at every scale, so that there is no `downsample`."""
        least, most = self.prompts.reach
        return least == most

    def able(self, plan: Sequence[Setting]) -> list[Setting]:
        """The settings of `plan` that this model can do. One that was asked for by name must be among them."""
        found = []
        for setting in plan:
            if setting.scaled is not None and self.fixed:
                if any(spec.startswith(DOWNSAMPLE) for spec in self.options.specs):
                    raise UnsupportedModelError(f"{DOWNSAMPLE}: {self.remarks([])[0]}")
                continue
            try:
                with setting.on(self.model):
                    found.append(setting)
            except UnsupportedModelError:
                if self.options.specs:
                    raise
        return found

    def remarks(self, plan: Sequence[Setting]) -> list[str]:
        """What is to be known of the run as a whole."""
        least, most = self.prompts.reach
        if self.fixed:
            family = adapters.find(self.model).family
            shown = f"no down-sampling baseline: {family} makes {most} visual tokens of such a prompt"
            return [f"{shown}, however small the pictures or frames in it are"]
        wanted = [downsample.budget(one.scaled, most, 1) for one in plan if one.scaled is not None]
        if wanted and least > min(wanted):
            return [f"downsample: of {most} visual tokens the processor leaves {least} at least, also of tiny pictures"]
        return []

    def try_out(self, plan: Sequence[Setting]) -> list[Sizes]:
        """Every setting on one prompt: a mistake in the last one shows before the first is measured."""
        adapter = adapters.find(self.model)
        full = count(adapter, self.prompts.one(Setting("none")))
        return [
            sizes(self.model, setting, self.prompts.one(setting), None if setting.scaled is None else full)
            for setting in plan
        ]

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
        reference, work = earlier.reference, earlier.work
        todo = [
            (setting, shape) for setting, shape in zip(plan, shapes, strict=True) if setting.spec not in earlier.specs
        ]
        items = self.prompts.items
        # Off a terminal, in a log file, a line every ten seconds is enough.
        pace = 0.1 if sys.stderr.isatty() else 10.0
        bar = tqdm(
            total=len(todo) * max(1, len(items)),
            unit=" answers" if items else " settings",
            disable=not (progress and todo),
            mininterval=pace,
        )
        with bar:
            usual = self.prompts.batches(Setting("none"))
            full = {
                row: sum(counts)
                for batch in usual
                for row, counts in zip(batch.rows, zip(*self._visual(batch).values(), strict=True), strict=True)
            }
            remarks = self.remarks(plan)
            for setting, shape in todo:
                bar.set_description(setting.spec, refresh=False)
                timing = self._time(setting) if self.options.latency else None
                if not items:
                    bar.update()
                    yield self._row(setting, shape, shapes[0], timing, remarks), []
                    continue
                other = setting.blind or setting.scaled is not None
                batches = self.prompts.batches(setting) if other else usual
                answers, seen = self._answer(setting, batches, bar)
                reference = answers if reference is None else reference
                if setting.scaled is not None:
                    seen = [{**one, "tokens_in": full[row]} for row, one in enumerate(seen)]
                means = self._means(seen, work)
                work = means["mean_prefill_flops"] if work is None else work
                row = self._row(setting, shape, shapes[0], timing, remarks) | means | self._scores(answers, reference)
                yield row, self._samples(setting, answers, reference, seen)

    def _time(self, setting: Setting) -> latency.Latency:
        whole = self.prompts.one(Setting("none"))
        other = setting.blind or setting.scaled is not None
        return latency.measure(
            self.model,
            self.prompts.one(setting) if other else whole,
            partial(setting.on, self.model),
            baseline=whole if other else None,
            repeats=self.options.repeats,
        )

    def _answer(
        self, setting: Setting, prepared: Sequence[accuracy.Batch], bar: tqdm
    ) -> tuple[list[str], list[Sample]]:
        """The answers, and what the language model saw of each question; both in the order of the questions."""
        tokens = accuracy.longest_answer(self.processor, self.prompts.items)
        seen: dict[int, Sample] = {}
        with setting.on(self.model) as session:

            def done(batch: accuracy.Batch) -> None:
                report = None if session is None else session.last
                visual = self._visual(batch)
                if report is None:
                    found = [
                        {"tokens_in": some, "tokens_out": some} for some in map(sum, zip(*visual.values(), strict=True))
                    ]
                else:
                    found = [survivors(report, numbers) for numbers in owners(report, visual)]
                text = adapters.find(self.model).text_config
                length = batch.inputs["input_ids"].shape[1]  # without padding, as all of a batch are equally long
                work = flops.prefill_flops(text, length if report is None else report.lengths)
                found = [{**one, "prefill_flops": work} for one in found]
                seen.update(zip(batch.rows, found, strict=True))
                bar.update(len(batch.rows))

            try:
                answers = accuracy.answer(self.model, self.processor, prepared, tokens, done)
            except RuntimeError as error:
                raise RuntimeError(f"{setting.spec}: {error}") from error
        return answers, [seen[row] for row in range(len(answers))]

    def _visual(self, batch: accuracy.Batch) -> dict[str, list[int]]:
        """Visual tokens of each prompt, by modality."""
        masks = adapters.find(self.model).placeholders(batch.inputs["input_ids"], None)  # (B, S) each
        return {kind: mask.sum(1).tolist() for kind, mask in masks.items()}

    def _samples(
        self, setting: Setting, answers: Sequence[str], reference: Sequence[str], seen: Sequence[Sample]
    ) -> list[Sample]:
        """One object per question. Which tokens survived is told only where the answer is not the full model's."""
        samples = []
        for item, answer, other, what in zip(self.prompts.items, answers, reference, seen, strict=True):
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
        self, setting: Setting, shape: Sizes, full: Sizes, timing: latency.Latency | None, remarks: list[str]
    ) -> Row:
        """Everything about a setting but its answers, which are empty."""
        empty = dict.fromkeys((item.name for item in fields(latency.Latency)), None)
        measured = {**empty, **asdict(shape)} if timing is None else {**asdict(shape), **asdict(timing)}
        return {
            "model": self.options.name,
            "task": None if self.options.made_up is not None else self.options.asked,
            "prompt": None if self.options.made_up is None else str(self.options.made_up),
            "spec": setting.spec,
            "strategy": setting.name,
            "keep": setting.keep,
            **measured,
            "prefill_flops_ratio": shape.prefill_flops / full.prefill_flops,
            **dict.fromkeys(("mean_tokens_in", "mean_tokens_out", "mean_prefill_flops")),
            **dict.fromkeys(("accuracy", "accuracy_ci", "agreement")),
            "by_type": {},
            "n": 0,
            "seed": getattr(setting.compressor, "seed", self.options.seed),
            "positions": getattr(setting.compressor, "positions", None),
            "remarks": remarks if setting.name == "none" else [],
            **environment(self.model),
        }

    def _means(self, seen: Sequence[Sample], full: float | None) -> Row:
        """Sizes over all questions, where the row of one prompt has those of that prompt; `full`: FLOPs of `none`."""
        found = {
            f"mean_{name}": mean(one[name] for one in seen) for name in ("tokens_in", "tokens_out", "prefill_flops")
        }
        work = found["mean_prefill_flops"]
        return {**found, "prefill_flops_ratio": work / (work if full is None else full)}

    def _scores(self, answers: list[str], reference: list[str]) -> Row:
        """What the answers say."""
        total, types = accuracy.score(answers, self.prompts.items)
        return {
            "accuracy": total.accuracy,
            "accuracy_ci": list(total.interval),
            "by_type": {name: score.to_dict() for name, score in types.items()},
            "agreement": accuracy.agreement(answers, reference),
            "n": total.n,
        }


def sample_id(item: Item) -> str:
    """The name of a question of a task, the same in every run: a scene is asked at most one question per type."""
    return f"{SPLIT}/{item.index}/{item.type}"


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
    model, processor = load_model(options)
    bench = Bench(options, model, processor, prompts_for(options, model, processor))
    plan = bench.able(plan)
    shapes = bench.try_out(plan)
    earlier = NOTHING
    if go_on and not overwrite:
        now = {
            "model": options.name,
            "task": None if options.made_up is not None else options.asked,
            "prompt": None if options.made_up is None else str(options.made_up),
            "n": len(bench.prompts.items),
            "timed": options.latency,
            **environment(bench.model),
        }
        earlier = resume.load(out, now, [sample_id(item) for item in bench.prompts.items])
    rows = list(earlier.rows)
    out.mkdir(parents=True, exist_ok=True)
    mode: Literal["a", "w"] = "a" if rows else "w"
    with path.open(mode, encoding="utf-8") as results, (out / "samples.jsonl").open(mode, encoding="utf-8") as answers:
        for row, samples in bench.rows(plan, shapes, progress=progress, earlier=earlier):
            lines.append(answers, samples)
            lines.append(results, [row])
            rows.append(row)
    return rows
