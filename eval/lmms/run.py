"""What `vtc eval` does: tasks in, accuracy and cost per task and per document out.

The bundled tasks are answered directly; any other task through lmms-eval. A folder holds the run:

    run.json            what was asked of which model; a run in the same folder must ask the same
    answers-RANK.jsonl  one line per answer, written as it is given; what a later run goes on from
    documents.jsonl          per document: answer, scores, tokens, FLOPs, times
    results.json        per task: scores, means of the rest, versions
    failures.jsonl      questions without an answer; then there are no results

With several processes (`accelerate launch -m vtc eval ...`) each answers its share; the first one writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vtc import zoo
from vtc.errors import VtcError, did_you_mean
from vtc.eval import tasks
from vtc.eval.items import Item
from vtc.eval.lmms.record import Failed, Failure, Record, Row, begin, identity, key_of, read_answers
from vtc.zoo import torchvision

BUNDLED = tasks.names()
OUTPUTS = ("run.json", "documents.jsonl", "results.json", "failures.jsonl")


@dataclass(frozen=True)
class Settings:
    """The command line's options."""

    out: Path
    tasks: tuple[str, ...]
    model: str = "tiny-llava"
    spec: str = "none"
    include: tuple[Path, ...] = ()  # folders with tasks for lmms-eval
    simple: bool = False  # the simple form of tasks
    limit: int | None = None  # documents per task
    batch_size: int = 1
    device: str = "cpu"
    dtype: str | None = None
    attention: str | None = None
    frames: int = 8
    reader: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise VtcError(f"--tasks names no task: give at least one, for example {BUNDLED[0]}")
        for folder in self.include:
            if not folder.is_dir():
                raise VtcError(f"--include-path {folder}: there is no such folder")

    @property
    def bundled(self) -> tuple[str, ...]:
        return tuple(task for task in self.tasks if task in BUNDLED)

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(task for task in self.tasks if task not in BUNDLED)


@dataclass(frozen=True)
class Team:
    """The processes of a run."""

    accelerator: Any = None

    @property
    def rank(self) -> int:
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def size(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes."""
        if self.size == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)


@dataclass
class Outcome:
    """Results of all tasks so far."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> scores
    documents: list[Row] = field(default_factory=list)  # task, doc_id and scores of one document


def run(settings: Settings) -> dict[str, Any] | None:
    """Evaluate; the content of `results.json`, or `None` on every process but the first.

    Raises:
        VtcError: something in `settings` cannot be; said before the first question is asked.
        Failed: some questions have no answer. They are in `failures.jsonl`, all other answers are kept.
    """
    torchvision.mend()  # before transformers, which imports it
    from vtc.eval.lmms.answering import make_answerer, parse

    compressors = parse(settings.spec)
    zoo.find(settings.model)
    manager = task_manager(settings) if settings.others else None
    team = assemble()
    answerer = make_answerer(options_of(settings, team), settings.spec, frames=settings.frames, reader=settings.reader)
    bundled = {task: list(tasks.questions(task, "test", settings.limit)) for task in settings.bundled}
    for task, items in bundled.items():
        if any(item.clips for item in items) and not answerer.takes_clips:
            raise VtcError(f"'{task}' is about clips, and '{settings.model}' takes pictures only: choose other --tasks")
    if team.rank == 0:
        open_folder(settings, [str(one) for one in compressors])
    team.wait()
    outcome = Outcome()
    try:
        for task, items in bundled.items():
            ask_bundled(task, items, settings, answerer, team, outcome)
        if settings.others:
            ask_lmms(settings, answerer, manager, outcome)
    except Failed as error:
        if team.rank == 0:
            write_lines(settings.out / "failures.jsonl", [one.to_dict() for one in error.failures])
        raise
    return finish(settings, answerer, outcome) if team.rank == 0 else None


# ------------------------------------------------------------------------------------------------------ preparations


def task_manager(settings: Settings) -> Any:
    """lmms-eval's index of tasks; refuses names that are not in it."""
    try:
        import lmms_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lmms_eval":
            raise
        raise VtcError(
            f"'{settings.others[0]}' is not bundled ({', '.join(BUNDLED)}){did_you_mean(settings.others[0], BUNDLED)}; "
            'all other tasks come from lmms-eval, which is not installed: pip install "/path/to/vtc[lmms]"'
        ) from None
    from loguru import logger

    logger.disable("lmms_eval")  # its progress; errors are raised
    from lmms_eval.tasks import TaskManager

    folders = [str(folder) for folder in settings.include]
    # Looking through lmms-eval's own two thousand tasks takes seconds, and is not needed for one's own.
    for defaults in [False, True] if folders else [True]:
        manager = TaskManager("ERROR", include_path=folders or None, include_defaults=defaults, model_name="vtc_hf")
        unknown = [task for task in settings.others if task not in manager.task_index]
        if not unknown:
            return manager
    known = (*BUNDLED, *manager.task_index)
    raise VtcError(
        f"unknown task '{unknown[0]}'{did_you_mean(unknown[0], known)}; bundled: {', '.join(BUNDLED)}; "
        "lmms-eval lists its own with `python -m lmms_eval --tasks list`, and --include-path adds a folder of yours"
    )


def assemble() -> Team:
    """The processes that were launched together."""
    from torch.distributed import is_torchelastic_launched

    if not is_torchelastic_launched():
        return Team()
    from accelerate import Accelerator

    return Team(Accelerator())


def options_of(settings: Settings, team: Team) -> Any:
    """How to load the model in this process."""
    from vtc.eval.bench import Options

    device = settings.device
    if team.size > 1 and device == "cuda":
        device = f"cuda:{team.accelerator.local_process_index}"
    return Options(
        model=settings.model,
        limit=settings.limit,
        batch_size=settings.batch_size,
        attention=settings.attention,
        dtype=settings.dtype,
        device=device,
    )


def open_folder(settings: Settings, compressors: Sequence[str]) -> None:
    """Begin a run in the folder, or go on with the one that is there if it asked the same."""
    from vtc.eval.bench import check_folder

    check_folder(settings.out, overwrite=True)  # refuses what cannot be a folder
    if settings.overwrite:
        for path in [settings.out / name for name in OUTPUTS] + list(settings.out.glob("answers-*.jsonl")):
            path.unlink(missing_ok=True)
    asked = identity(
        settings.model,
        compressors,
        dtype=settings.dtype,
        attention=settings.attention,
        simple=settings.simple,
        frames=settings.frames,
    )
    begin(settings.out, asked)
    (settings.out / "failures.jsonl").unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- answers


def ask_bundled(
    task: str, items: Sequence[Item], settings: Settings, answerer: Any, team: Team, outcome: Outcome
) -> None:
    """The bundled questions, without lmms-eval."""
    from tqdm import tqdm

    from vtc.eval import accuracy
    from vtc.eval.lmms.answering import Prompt, Question
    from vtc.eval.lmms.export import GENERATION

    def question(number: int) -> Question:
        item = items[number]
        kinds = [{"type": accuracy.kind_of(medium)} for medium in item.media]
        content = [*kinds, {"type": "text", "text": item.question}]
        prompt = Prompt([{"role": "user", "content": content}], list(item.images), list(item.clips))
        return Question((task, "test", number, 0), lambda: prompt, GENERATION, item.question)

    mine = [question(number) for number in range(team.rank, len(items), team.size)]
    failures: list[Failure] = []
    with (
        Record(settings.out, team.rank) as record,
        tqdm(total=len(mine), unit=" answers", disable=team.rank > 0) as bar,
    ):
        try:
            answerer.answer(mine, record, bar.update)
        except Failed as error:
            failures = error.failures
    failures = team.gather(failures)
    if failures:
        raise Failed(failures)
    if team.rank > 0:
        return
    answers = read_answers(settings.out)
    given = [answers[task, "test", number, 0]["answer"] for number in range(len(items))]
    total, types = accuracy.score(given, items)
    by_type = {name: score.to_dict() for name, score in types.items()}
    outcome.tasks[task] = {
        "exact_match": total.accuracy,
        "exact_match_ci": list(total.interval),
        "n": total.n,
        "by_type": by_type,
    }
    for number, (text, item) in enumerate(zip(given, items, strict=True)):
        right = float(accuracy.normalise(text) == accuracy.normalise(item.answer))
        outcome.documents.append(
            {
                "task": task,
                "doc_id": number,
                "type": item.type,
                "target": item.answer,
                "exact_match": right,
            }
        )


def ask_lmms(settings: Settings, answerer: Any, manager: Any, outcome: Outcome) -> None:
    """All other tasks, through lmms-eval."""
    from lmms_eval.evaluator import simple_evaluate

    from vtc.eval.lmms.answering import describe
    from vtc.eval.lmms.plugin import VtcHf, VtcHfSimple

    wrapper = (VtcHfSimple if settings.simple else VtcHf)(answerer=answerer, out=settings.out)
    try:
        found = simple_evaluate(
            model=wrapper,
            tasks=list(settings.others),
            task_manager=manager,
            batch_size=settings.batch_size,
            device=settings.device,
            limit=settings.limit,
            log_samples=True,
            verbosity="ERROR",
        )
    except (Exception, SystemExit) as error:
        if wrapper.asked and isinstance(error, SystemExit):  # whatever its code: there are no scores
            raise RuntimeError(f"scoring {', '.join(settings.others)} left Python: {error}") from error
        if wrapper.asked:
            raise
        raise VtcError(f"cannot prepare {', '.join(settings.others)}: {describe(root_of(error))}") from error
    if found is None:
        return
    for task, scores in found["results"].items():
        samples = found["samples"].get(task)
        if samples is None:  # a group of tasks
            continue
        documents: dict[int, Row] = {}
        for sample in samples:  # a document comes once per filter of the task
            known = documents.setdefault(sample["doc_id"], {"task": task, "doc_id": sample["doc_id"]})
            known |= {"target": sample["target"], **numbers(sample)}
        outcome.tasks[task] = {**plain(scores), "n": len(documents)}
        outcome.documents += [documents[number] for number in sorted(documents)]


def root_of(error: BaseException) -> BaseException:
    """The error that others were raised from: lmms-eval tries again, and reports that trying failed."""
    last = getattr(error, "last_attempt", None)  # tenacity's
    if last is not None and last.exception() is not None:
        return root_of(last.exception())
    return error.__cause__ or error


def plain(scores: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's scores without the name of the filter where there is only the usual one."""
    kept = {}
    for name, value in scores.items():
        metric, _, filter_ = name.partition(",")
        if filter_ and isinstance(value, int | float):
            kept[metric if filter_ == "none" else f"{metric} ({filter_})"] = value
    return kept


def numbers(sample: dict[str, Any]) -> dict[str, Any]:
    """The scores of one document; some tasks keep theirs in a dictionary under `score`."""
    scores = {name: value.get("score") if isinstance(value, dict) else value for name, value in sample.items()}
    return {
        name: value
        for name, value in scores.items()
        if isinstance(value, int | float) and name not in ("doc_id", "target")
    }


# ----------------------------------------------------------------------------------------------------------- results


def finish(settings: Settings, answerer: Any, outcome: Outcome) -> dict[str, Any]:
    """Put scores and costs of each document side by side, and write both files."""
    from vtc.eval import bench
    from vtc.eval.lmms.answering import summary

    answers = read_answers(settings.out)
    by_document: dict[tuple[str, int], list[Row]] = {}
    for key, row in answers.items():
        by_document.setdefault((key[0], key[2]), []).append(row)
    rows = []
    for document in outcome.documents:
        for row in sorted(by_document.get((document["task"], document["doc_id"]), []), key=key_of):
            rows.append({**document, **{name: value for name, value in row.items() if name != "digest"}})
    results: dict[str, Any] = {"model": settings.model, "spec": settings.spec, "tasks": {}}
    for task, scores in outcome.tasks.items():
        results["tasks"][task] = {**scores, **summary([row for row in rows if row["task"] == task])}
    results |= bench.environment(answerer.model)
    if settings.others:
        results["versions"]["lmms-eval"] = version("lmms-eval")
    results["settings"] = json.loads(json.dumps(asdict(settings), default=str))
    write_lines(settings.out / "documents.jsonl", rows)
    with replacing(settings.out / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """A file of JSON lines, whole or not at all."""
    with replacing(path) as new:
        new.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` afterwards."""
    new = path.with_name(path.name + ".new")
    yield new
    new.replace(path)


def table(results: dict[str, Any]) -> str:
    """The results for a terminal: a line per score."""
    head = ("task", "score", "", "n", "visual tokens", "prefill FLOPs", "first token, ms")
    lines = [head]
    for task, found in results["tasks"].items():
        tokens = f"{found['visual_tokens_in']:.0f} -> {found['visual_tokens_out']:.0f}" if "ttft_ms" in found else "-"
        work = "-"
        if found.get("prefill_flops"):
            work = f"{found['prefill_flops'] / found['prefill_flops_in']:.2f}x"
        for name, value in scores_of(found).items():
            lines.append((task, name, f"{value:.4f}", str(found["n"]), tokens, work, f"{found['ttft_ms']:.1f}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def scores_of(found: dict[str, Any]) -> dict[str, float]:
    """The scores among a task's results: all before the number of documents, without their errors."""
    names = list(found)[: list(found).index("n")]
    return {name: found[name] for name in names if isinstance(found[name], int | float) and "_stderr" not in name}
