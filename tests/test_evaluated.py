"""`vtc report` of what `vtc eval` wrote: scores as they are there, and two runs compared document by document."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from checkpoints import save_llava
from rows import ROW, save
from vtc import cli
from vtc.errors import VtcError
from vtc.eval import evaluated, report
from vtc.eval.accuracy import wilson
from vtc.eval.paired import Pairs, mcnemar

RIGHT = {"none": [1, 1, 1, 1, 0, 0], "pool": [1, 0, 0, 1, 1, 0]}
RATED = {"none": [0.9, 0.5, 0.4], "pool": [0.7, 0.5, 0.1]}


def made(folder: Path, spec: str, **other: Any) -> Path:
    """A folder as `vtc eval` leaves it, of one task with right and wrong and one with marks."""
    cost = {
        **{"visual_tokens_in": 64.0, "visual_tokens_out": 64.0 if spec == "none" else 16.5, "output_tokens": 2.0},
        **{"prefill_flops": 500.0, "prefill_flops_in": 1000.0, "kv_cache_bytes": 4096.0, "ttft_ms": 12.25},
    }
    right, rated = RIGHT[spec], RATED[spec]
    kinds = {"digit": {"accuracy": mean(right[:3]), "ci": list(wilson(sum(right[:3]), 3)), "n": 3}}
    error = stdev(rated) / 3**0.5
    results = {
        "model": "m|odel",
        "spec": spec,
        "tasks": {
            "scenes": {"exact_match": mean(right), "exact_match_ci": [0, 1], "n": 6, "by_type": kinds, **cost},
            "essays": {"mark": mean(rated), "mark_stderr": error, "whole": 7.5, "n": 3, **cost},
        },
        **{"device": "AMD", "dtype": "float32", "attention": "sdpa", "threads": 1, "date": "2026-11-22T10:00:00"},
        "versions": {"vtc": "0.1.0"},
        **other,
    }
    documents = [{"task": "scenes", "doc_id": k, "target": "7", "exact_match": float(v)} for k, v in enumerate(right)]
    documents += [{"task": "essays", "doc_id": k, "target": "x", "mark": value} for k, value in enumerate(rated)]
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [made(tmp_path / spec, spec) for spec in RIGHT]


def test_scores_have_their_intervals_and_costs(runs: list[Path]) -> None:
    run = evaluated.load(runs[0])
    assert run.scores() == [("scenes", "exact_match"), ("essays", "mark"), ("essays", "whole")]
    low, high = wilson(4, 6)
    half = 1.959964 * stdev(RATED["none"]) / 3**0.5
    table, kinds = evaluated.tables(run)
    lines = {line[:2]: dict(zip(table.headings[2:], line[2:], strict=True)) for line in table.cells}
    assert lines["scenes", "exact_match"]["value"] == "0.6667"
    assert lines["scenes", "exact_match"]["95 % interval"] == f"[{low:.4f}, {high:.4f}]"
    assert lines["essays", "mark"]["95 % interval"] == f"[{0.6 - half:.4f}, {0.6 + half:.4f}]"
    assert lines["essays", "whole"] == {**lines["essays", "whole"], "value": "7.5000", "95 % interval": ""}
    assert lines["scenes", "exact_match"]["prefill FLOPs"] == "500 (0.50×)"
    assert lines["scenes", "exact_match"]["visual tokens"] == "64 → 64"
    assert kinds.cells == (("digit", "3", "100.0 [43.9, 100.0]"),)


def test_two_runs_are_compared_document_by_document(runs: list[Path]) -> None:
    right, rated, whole = evaluated.compare(*map(evaluated.load, runs))
    assert (right.fell, right.rose, right.documents, right.p) == (2, 1, 6, mcnemar(2, 1))
    assert right.difference == pytest.approx(3 / 6 - 4 / 6)
    assert right.interval == Pairs(2, 2, 1, 1).interval
    steps = [-0.2, 0.0, -0.3]
    assert (rated.fell, rated.rose) == (2, 0) and rated.difference == pytest.approx(mean(steps))
    half = 1.959964 * stdev(steps) / 3**0.5
    assert rated.interval == pytest.approx((mean(steps) - half, mean(steps) + half))
    assert (whole.p, whole.verdict(None)) == (None, "not paired")


@pytest.mark.parametrize(
    ("fell", "rose", "adjusted", "verdict"),
    [
        (0, 0, 1.0, "same scores"),
        (5, 4, 1.0, "noise"),
        (8, 0, 0.2, "unclear"),
        (20, 1, 0.01, "changed: lower"),
        (1, 20, 0.01, "changed: higher"),
    ],
)
def test_verdicts(fell: int, rose: int, adjusted: float, verdict: str) -> None:
    change = evaluated.Change("t", "s", 0.5, 0.4, fell, rose, 50, 0.1, (0, 1), mcnemar(fell, rose))
    assert change.verdict(adjusted) == verdict


@pytest.mark.parametrize("form", report.FORMATS)
def test_every_format(form: str, runs: list[Path]) -> None:
    one, two = report.report(runs[:1], form), report.report(runs, form)
    for text in (one, two):
        assert "essays" in text and "mark" in text
    if form == "csv":
        lines = list(csv.DictReader(io.StringIO(two)))
        assert [line["p"] for line in lines][:2] == [str(mcnemar(2, 1)), str(mcnemar(2, 0))]
        assert {line["visual_tokens_in"] for line in csv.DictReader(io.StringIO(one))} == {"64.0"}
    else:
        assert "64 → 16.5" in two.replace(r"$\to$", "→")
        assert "spec: none → pool" in two or form == "latex"


def test_any_file_of_the_folder_names_it(runs: list[Path]) -> None:
    texts = {report.report([runs[0] / name], "csv") for name in ("", "results.json", "documents.jsonl")}
    assert len(texts) == 1


def test_what_does_not_go_together_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(VtcError, match=r"from vtc eval and the other from vtc bench: give two of a kind"):
        report.report([save(tmp_path / "bench", [ROW]), runs[0]], "md")
    other = made(tmp_path / "other", "pool", tasks={"mme": {"score": 1.0, "n": 1}})
    with pytest.raises(VtcError, match="no score in common"):
        report.report([runs[0], other], "md")
    documents = runs[1] / "documents.jsonl"
    documents.write_text(documents.read_text().replace('"target": "7"', '"target": "8"'))
    with pytest.raises(
        VtcError, match="document 0 of scenes is not the same in the two runs: its answer is '7' and '8'"
    ):
        report.report(runs, "md")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{", r"cannot read .*results\.json: .* goes on from its answers"),
        ("results.json", '{"model": "m"}', "is not what vtc eval writes, it lacks attention, date"),
        ("documents.jsonl", '{"task": "scenes"}\n', "line 1 is not a document of vtc eval"),
    ],
)
def test_broken_files_are_named(name: str, content: str, message: str, runs: list[Path]) -> None:
    (runs[0] / name).write_text(content)
    with pytest.raises(VtcError, match=message):
        report.report(runs[:1], "md")


def test_a_report_is_not_written_over_results(runs: list[Path]) -> None:
    with pytest.raises(VtcError, match="is what the report is made from"):
        report.write("x", runs[0] / "results.json", runs)


def test_real_runs_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_llava(tmp_path / "model")
    for spec in ("none", "uniform:keep=3"):
        out = tmp_path / spec.partition(":")[0]
        command = [
            "eval",
            "--model",
            str(model),
            "--tasks",
            "scenes",
            "--limit",
            "6",
            "--spec",
            spec,
            "--out",
            str(out),
        ]
        assert cli.main(command) == 0
    scored = json.loads((tmp_path / "none" / "results.json").read_text())["tasks"]["scenes"]
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "none")]) == 0
    text = capsys.readouterr().out
    assert f"{scored['exact_match']:.4f}" in text and "16 → 16" in text and "per type of question" in text
    assert cli.main(["report", str(tmp_path / "none"), str(tmp_path / "uniform")]) == 0
    text = capsys.readouterr().out
    assert "spec: none → uniform:keep=3" in text and "16 → 3" in text and "scenes" in text
