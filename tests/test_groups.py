"""Difficulty groups and transitions: counted by hand, and the same in every format of a report."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from rows import row, sample, save
from vtc.eval import groups, report
from vtc.eval.accuracy import wilson
from vtc.eval.table import Table

# Right (1) or wrong (0), question by question: of the five that the full model gets right, the reference loses two.
ANSWERS = {
    "none": "11111000",
    "blind": "00010000",
    "downsample:keep=0.5": "11100100",
    "fastervlm:keep=0.5": "10110110",
    "random:keep=0.5": "11111100",
    "random:keep=0.5,seed=1": "00111000",
    "downsample:keep=4": "10000001",
    "fastervlm:keep=4": "11000001",
}


def made(answers: dict[str, str] = ANSWERS) -> tuple[list[Any], list[Any]]:
    rows = [row(spec, 16, 20, tokens_in=64, mean_tokens_in=64, mean_tokens_out=16.5) for spec in answers]
    samples = [
        sample(spec, f"test/{number}/digit", right == "1")
        for spec, line in answers.items()
        for number, right in enumerate(line)
    ]
    return rows, samples


@pytest.fixture
def run(tmp_path: Path) -> report.Run:
    return report.load(save(tmp_path, *made()))


def cells(table: Table) -> dict[str, dict[str, str]]:
    return {line[0]: dict(zip(table.headings[1:], line[1:], strict=True)) for line in table.cells}


def test_the_reference_divides_what_the_full_model_gets_right(run: report.Run) -> None:
    half, four = groups.divide(run.rows, run.samples)
    assert (half.reference["spec"], four.reference["spec"]) == ("downsample:keep=0.5", "downsample:keep=4")
    ids = {name: [int(key.split("/")[1]) for key in keys] for name, keys in half.ids.items()}
    assert ids == {"difficult": [3, 4], "easy": [0, 1, 2], "gained": [5], "neither": [6, 7]}
    assert [len(keys) for keys in four.ids.values()] == [4, 1, 1, 2], "another budget, other groups"
    scores = {name: (score.right, score.n) for name, score in half.scores(run.samples["fastervlm:keep=0.5"]).items()}
    assert scores == {"difficult": (1, 2), "easy": (2, 3), "gained": (1, 1), "neither": (1, 2)}


def test_the_reference_itself_scores_nothing_and_everything(run: report.Run) -> None:
    for division in groups.divide(run.rows, run.samples):
        scores = division.scores(run.samples[division.reference["spec"]])
        assert (scores["difficult"].accuracy, scores["easy"].accuracy) == (0, 1)


def test_tables_tell_sizes_intervals_and_measured_tokens(run: report.Run) -> None:
    _, half, four = groups.tables(run.rows, run.samples)
    assert "keep 0.5, by downsample" in half.title and "keep 4, by downsample" in four.title
    assert half.headings[2:] == ("difficult (2)", "easy (3)", "only downsample right (1)", "both wrong (2)")
    found = cells(half)
    assert set(found) == {"blind", "downsample", "fastervlm", "random (2 seeds)"}, "only what has this budget"
    low, high = (100 * bound for bound in wilson(2, 3))
    assert found["fastervlm"]["easy (3)"] == f"67 [{low:.0f}, {high:.0f}]"
    assert found["fastervlm"]["visual tokens"] == "64 → 16.5"
    seeds = [100 * 3 / 3, 100 * 1 / 3]
    assert found["random (2 seeds)"]["easy (3)"] == f"{mean(seeds):.0f} ± {stdev(seeds):.0f}"
    assert found["blind"]["difficult (2)"].startswith("50 ")


def test_transitions_add_up(run: report.Run) -> None:
    found = {(name, line["keep"]): line for name, line in cells_by_budget(groups.tables(run.rows, run.samples)[0])}
    line = found["fastervlm", "0.5"]
    assert [line[name] for name in line if "→" in name] == ["3", "2", "2", "1"]
    low, high = (100 * bound for bound in wilson(2, 5))
    assert line["of the right ones lost, %"] == f"40 [{low:.0f}, {high:.0f}]"
    assert found["random (2 seeds)", "0.5"]["right → right"] == "4", "the mean over seeds"
    assert ("none", "") not in found


def cells_by_budget(table: Table) -> list[tuple[str, dict[str, str]]]:
    return [(line[0], dict(zip(table.headings[1:], line[1:], strict=True))) for line in table.cells]


@pytest.mark.parametrize(
    ("names", "reference"),
    [(("downsample", "pool", "uniform"), "downsample"), (("uniform", "pool"), "pool"), (("uniform",), "uniform")],
)
def test_without_down_sampling_a_named_baseline_divides(names: tuple[str, ...], reference: str, tmp_path: Path) -> None:
    lines = {"none": "1110", **{f"{name}:keep=4": "1000" for name in (*names, "divprune")}}
    run = report.load(save(tmp_path, *made(lines)))
    table = groups.tables(run.rows, run.samples)[1]
    assert f"by {reference}:" in table.title and f"`{reference}`" in table.notes
    assert table.headings[-2:] == ("easy (1)", "both wrong (1)"), "an empty group has no column"


def test_nothing_is_told_without_answers_or_reference(tmp_path: Path) -> None:
    rows, samples = made({"none": "11", "divprune:keep=4": "10"})
    alone = report.load(save(tmp_path / "a", rows, samples))
    assert [table.title for table in groups.tables(alone.rows, alone.samples)] == [
        "Right and wrong answers, full model → compressed"
    ]
    silent = report.load(save(tmp_path / "b", made()[0]))
    assert groups.tables(silent.rows, silent.samples) == [] and groups.columns(silent.rows, silent.samples) == {}


@pytest.mark.parametrize("form", ["md", "latex", "html"])
def test_every_format_has_them(form: str, tmp_path: Path) -> None:
    text = report.report([save(tmp_path, *made())], form)
    for part in ("Difficulty groups at keep 0.5", "Difficulty groups at keep 4", "difficult (2)", "both wrong (2)"):
        assert part in text
    assert "Right and wrong answers" in text


def test_lines_of_a_csv_have_the_same_numbers(tmp_path: Path) -> None:
    found = {
        line["spec"]: line for line in csv.DictReader(io.StringIO(report.report([save(tmp_path, *made())], "csv")))
    }
    line = found["fastervlm:keep=0.5"]
    names = ("both", "lost", "gained", "neither")
    assert [line[f"transition.{name}"] for name in names] == ["3", "2", "2", "1"]
    assert line["groups.reference"] == "downsample:keep=0.5" and found["fastervlm:keep=4"]["groups.reference"] == (
        "downsample:keep=4"
    )
    assert (line["groups.difficult.n"], line["groups.difficult.accuracy"]) == ("2", "0.5")
    assert [float(line["groups.easy.low"]), float(line["groups.easy.high"])] == pytest.approx(wilson(2, 3))
    assert found["blind"]["groups.reference"] == found["none"]["groups.reference"] == ""
