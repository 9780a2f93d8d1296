"""`vtc report`: tables that hold what was measured, a page that works offline, and comparisons that tell noise.

The page is also opened in a real browser where there is one: Debian's packages are chromium and chromium-driver.
Without them those tests are skipped, and what is left is that the page parses and asks for nothing.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from PIL import Image

import browser
from checkpoints import save_llava
from rows import KINDS, NASTY, row, sample, save
from vtc import cli
from vtc.errors import VtcError
from vtc.eval import accuracy, bench, lines, page, paired, report, scenes, table

ASKED = 20  # questions
COSTS = {"tokens": "tokens_out", "flops": "prefill_flops", "ttft": "ttft_ms"}


ROWS = [
    row("none", 64, 39, ttft=50.0),
    row("blind", 0, 10, ttft=5.0),
    row("fastervlm:keep=0.5", 32, 37, ttft=31.0),
    row("fastervlm:keep=16", 16, 30, ttft=20.5),
    row("divprune:keep=0.5+fastv:keep=0.5,layer=2", 16, 36, ttft=28.0),
    *(
        row(f"random:keep=0.5{seed}", 32, right, ttft=30.0)
        for seed, right in (("", 20), (",seed=1", 26), (",seed=2", 30))
    ),
    row("uniform:keep=0.5", 32, 38, ttft=29.0),
    row("pool:keep=16", 16, 25, ttft=22.0),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("runs") / "run", ROWS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, of the bundled model with so few tokens that it goes wrong often enough."""
    out = tmp_path_factory.mktemp("bench")
    bench.run(bench.Options(specs=("fastervlm",), keeps=(5,), limit=ASKED, latency=False), out)
    return out


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `vtc report`."""
    capsys.readouterr()
    code = cli.main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---------------------------------------------------------------------------------------------------------- samples


def test_bench_says_what_became_of_every_question(finished: Path) -> None:
    run = report.load(finished)
    items = {f"test/{item.index}/{item.type}": item for item in scenes.questions("test", ASKED)}
    assert len(items) == ASKED and list(run.samples) == [row["spec"] for row in run.rows]
    for one in run.rows:
        mine = run.samples[one["spec"]]
        assert list(mine) == list(items)
        for key, found in mine.items():
            assert (found["question"], found["expected"]) == (items[key].question, items[key].answer)
            assert found["type"] == items[key].type
            assert found["right"] is (accuracy.normalise(found["answer"]) == accuracy.normalise(items[key].answer))
            assert (found["tokens_in"], found["tokens_out"]) == (one["tokens_in"], one["tokens_out"])
        assert mean(found["right"] for found in mine.values()) == one["accuracy"]
        for kind, score in one["by_type"].items():
            assert mean(found["right"] for found in mine.values() if found["type"] == kind) == score["accuracy"]
        same = [found["answer"] == run.samples["none"][key]["answer"] for key, found in mine.items()]
        assert mean(same) == one["agreement"]


def test_survivors_are_told_where_the_answer_is_another_one(finished: Path) -> None:
    run = report.load(finished)
    others = 0
    for spec in ("fastervlm:keep=5", "pool:keep=5"):
        for key, found in run.samples[spec].items():
            other = found["answer"] != run.samples["none"][key]["answer"]
            others += other
            assert ("kept" in found) is ("sources" in found) is ("grid" in found) is other
            if other:
                assert found["grid"] == [16, 16]
                assert found["kept"] == sorted(set(found["kept"])) and len(found["kept"]) == found["tokens_out"]
                assert (found["sources"] is not None) is spec.startswith("pool")
    assert others > 3, "five tokens must be too few, or this test says nothing"


# ------------------------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> bench.Options:
    folder = save_llava(tmp_path_factory.mktemp("models") / "llava")
    return bench.Options(model=str(folder), specs=("uniform:keep=3",), limit=4, latency=False)


@pytest.fixture(scope="module")
def whole(options: bench.Options, tmp_path_factory: pytest.TempPathFactory) -> report.Run:
    out = tmp_path_factory.mktemp("whole")
    bench.run(options, out)
    return report.load(out)


def without_dates(run: report.Run) -> tuple[list[bench.Row], Any]:
    return [{**one, "date": None} for one in run.rows], run.samples


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 8, 13])
@pytest.mark.parametrize("cut", [False, True])
def test_a_stopped_run_goes_on_where_it_was(
    writes: int, cut: bool, options: bench.Options, whole: report.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before any of its writes, or in the middle of one."""
    real, calls = lines.append, iter(range(99))

    def dies(file: Any, objects: Any) -> None:
        if next(calls) == writes:
            if cut:
                file.write("".join(json.dumps(one) + "\n" for one in objects)[:-20])
                file.flush()
            raise KeyboardInterrupt
        real(file, objects)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lines, "append", dies)
        bench.run(options, tmp_path)
    asked: list[str] = []
    answer = accuracy.answer
    monkeypatch.setattr(accuracy, "answer", lambda *args: asked.append("") or answer(*args))
    rows = bench.run(options, tmp_path, go_on=True)
    assert len(asked) == 7 - writes // 2, "what has a row is not measured again"
    found = report.load(tmp_path)
    assert found.rows == json.loads(json.dumps(rows))
    assert without_dates(found) == without_dates(whole)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 7 * 4, "nothing twice"


def test_a_finished_run_takes_more_settings(options: bench.Options, tmp_path: Path) -> None:
    first = bench.run(options, tmp_path)
    rows = bench.run(replace(options, specs=("divprune:keep=3",)), tmp_path, go_on=True)
    assert rows[: len(first)] == json.loads(json.dumps(first))
    assert [one["spec"] for one in rows[len(first) :]] == ["divprune:keep=3"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"limit": 3}, "the number of questions was 4 and is 3"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        ({"attention": "eager"}, "attention was sdpa and is eager"),
        ({"latency": True}, "whether times are measured was False and is True"),
    ],
)
def test_runs_of_another_kind_do_not_mix(
    other: dict[str, Any], message: str, options: bench.Options, tmp_path: Path
) -> None:
    bench.run(options, tmp_path)
    before = (tmp_path / "rows.jsonl").read_text()
    with pytest.raises(VtcError, match=message):
        bench.run(replace(options, **other), tmp_path, go_on=True)
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(VtcError, match="does not have the answers to these 4 questions for none"):
        bench.run(options, tmp_path, go_on=True)
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_bench_resumes_on_the_command_line(
    options: bench.Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run(options, tmp_path)
    before = (tmp_path / "rows.jsonl").read_text()
    arguments = ["bench", "--model", options.model, "--spec", "uniform:keep=3", "--limit", "4", "--no-latency"]
    assert cli.main([*arguments, "--out", str(tmp_path), "--resume"]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--out", str(tmp_path), "--resume", "--overwrite"])


# ---------------------------------------------------------------------------------------------------------- bad input

WHOLE = json.dumps(ROWS[0]) + "\n"
BAD = {
    "cut off": (WHOLE + WHOLE[:70], r"line 2, the last one, is cut off: .*delete that line to use the 1 before it"),
    "cut in a character": ((WHOLE + '{"model": "ü').encode()[:-1], "line 2, the last one, is cut off"),
    "broken in the middle": (WHOLE[:50] + "\n" + WHOLE, "line 1 is not a JSON object"),
    "a list": ("[1, 2]\n" + WHOLE, r"line 1 is not a JSON object: '\[1, 2\]'"),
    "empty": ("\n\n", "is empty"),
    "another object": (
        '{"spec": "none"}\n',
        "line 1 is not a row of results, it lacks accuracy, .*vtc bench writes such",
    ),
    "samples": (json.dumps(sample("none", "a", True)) + "\n", "are these samples"),
    "twice": (WHOLE + WHOLE, "line 2 repeats none of line 1"),
    "two models": (WHOLE + json.dumps(row("blind", 0, 1, model="b")), "line 2 is about b .* one file per model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(VtcError, match=message) as caught:
        report.report([tmp_path], "md")
    assert str(path) in str(caught.value)


def test_a_last_line_without_newline_is_whole(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(WHOLE.rstrip())
    assert [one["spec"] for one in report.load(tmp_path).rows] == ["none"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([sample("none", "a", True)] * 2, "line 2 answers a a second time for none"),
        ([{"spec": "none", "id": "a"}], "line 1 is not a sample, it lacks answer, expected"),
    ],
)
def test_bad_samples_are_named(samples: list[Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, ROWS, samples)
    with pytest.raises(VtcError, match=message):
        report.load(tmp_path)


def test_cut_off_samples_are_named(tmp_path: Path) -> None:
    save(tmp_path, ROWS, [sample("none", "a", True)])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"spec": "none", "id"')
    with pytest.raises(VtcError, match=r"samples\.jsonl: line 2, the last one, is cut off"):
        report.load(tmp_path)


def test_samples_without_a_row_do_not_count(tmp_path: Path) -> None:
    """The run was stopped between a setting's answers and its row."""
    save(tmp_path, ROWS[:1], [sample("none", "a", True), sample("blind", "a", True)])
    assert list(report.load(tmp_path).samples) == ["none"]


def test_files_may_have_other_names(tmp_path: Path) -> None:
    save(tmp_path, ROWS, [sample("none", "a", True)])
    (tmp_path / "rows.jsonl").rename(tmp_path / "monday.jsonl")
    (tmp_path / "samples.jsonl").rename(tmp_path / "monday.samples.jsonl")
    assert list(report.load(tmp_path / "monday.jsonl").samples) == ["none"]


# ---------------------------------------------------------------------------------------------------------- one run


def test_markdown_cells_stay_cells(saved: Path) -> None:
    text = report.report([saved], "md")
    for section in text.split("## ")[1:]:
        grid = [line for line in section.splitlines() if line.startswith("|")]
        assert len(grid) == 2 + 8  # seeds share a line
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in grid}) == 1
    assert "random (3 seeds)" in text and "divprune+fastv:keep=0.5,layer=2" in text
    seeds = [100 * one["accuracy"] for one in ROWS if one["strategy"] == "random"]
    assert f"{mean(seeds):.1f} ± {stdev(seeds):.1f}" in text
    low, high = (100 * bound for bound in accuracy.wilson(37 + 20, 80))
    assert f"{100 * 57 / 80:.1f} [{low:.1f}, {high:.1f}]" in text


def test_markdown_escapes_what_would_end_a_cell() -> None:
    one = table.Table("t", ("a|b", "<i>"), (("x|y", "1\n2"),))
    (line,) = (line for line in one.markdown().splitlines() if "x" in line)
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", line)] == ["", r"x\|y", "1 2", ""]
    assert "&lt;i>" in one.markdown() and r"a\|b" in one.markdown()


def test_columns_without_a_measurement_are_left_out(tmp_path: Path) -> None:
    save(tmp_path, [{**one, **{key: None for key in one if key.endswith("_ms")}} for one in ROWS])
    text = report.report([tmp_path], "md")
    assert "TTFT ms" not in text and "accuracy %" in text and "Time to first token, in" not in text


def test_csv_has_every_number(saved: Path, tmp_path: Path) -> None:
    found = list(csv.DictReader(io.StringIO(report.report([saved], "csv"))))
    assert [one["spec"] for one in found] == [one["spec"] for one in ROWS]
    for text, true in zip(found, ROWS, strict=True):
        assert text["model"] == NASTY and text["versions.torch"] == "2.13.0"
        assert float(text["accuracy"]) == true["accuracy"] and int(text["tokens_out"]) == true["tokens_out"]
        assert [float(text["accuracy.low"]), float(text["accuracy.high"])] == true["accuracy_ci"]
        for kind in KINDS:
            assert float(text[f"by_type.{kind}.accuracy"]) == true["by_type"][kind]["accuracy"]
            assert float(text[f"by_type.{kind}.low"]) == true["by_type"][kind]["ci"][0]
    save(tmp_path, [row("none", 64, 3, device='a "b", c\nd')])
    (only,) = csv.DictReader(io.StringIO(report.report([tmp_path], "csv")))
    assert only["device"] == 'a "b", c\nd'


def test_latex_has_no_loose_commands(saved: Path) -> None:
    text = report.report([saved], "latex")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    for number, line in enumerate(body):
        assert not re.search(r"(?<!\\)[%#_~^]", line), line
        if line.strip() == r"\toprule":
            spec = re.search(r"\{(l?r+)\}$", body[number - 1].strip())
            assert spec is not None
            for inside in body[number + 1 :]:
                if inside.strip() == r"\bottomrule":
                    break
                if inside.strip() != r"\midrule":
                    assert inside.endswith(r" \\")
                    assert len(re.findall(r"(?<!\\)&", inside)) == len(spec[1]) - 1
    for word in ("begin", "end"):
        assert text.count(rf"\{word}{{table}}") == text.count(rf"\{word}{{tabular}}") == 3
    assert r"64 $\to$ 32" in text and r"$\pm$" in text and r"accuracy \%" in text


def test_latex_of_special_characters() -> None:
    assert table.latex(NASTY) == (
        r"a\textbar{}b\_c \& 100\% \textless{}i\textgreater{}\{x\}\textless{}/i\textgreater{} "
        r"\textbackslash{} \textasciitilde{}\textasciicircum{}\#\$"
    )


# ---------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What is in a page; complains of tags that do not close."""

    EMPTY = frozenset({"meta", "link", "img", "br", "wbr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, so_far = self.scripts[-1]
            self.scripts[-1] = attributes, so_far + data
        elif self.open and self.open[-1] != "style":
            self.text += data


def test_page_is_one_file_that_asks_for_nothing(saved: Path) -> None:
    text = report.report([saved], "html")
    assert not re.search(r"https?:|//\w+\.|@import|url\(", text.replace("http-equiv", ""))
    parsed = Page(text)
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")  # type: ignore[union-attr]
    policy = next(found["content"] for tag, found in parsed.tags if found.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none';")


def test_page_holds_the_data(saved: Path) -> None:
    parsed = Page(report.report([saved], "html"))
    assert len(parsed.scripts) == 2, "no text of a run becomes a script"
    data = json.loads(next(text for attributes, text in parsed.scripts if attributes.get("type") == "application/json"))
    assert data == {"points": page.points(ROWS), "kinds": list(KINDS)}
    assert NASTY in parsed.text and KINDS[1] in parsed.text
    points = {(point["name"], point["keep"]): point for point in data["points"]}
    one = points["fastervlm", "16"]
    assert one["costs"] == {"tokens": 16, "flops": 24000, "ttft": 20.5}
    low, high = accuracy.wilson(50, 80)
    assert one["scores"]["all"] == pytest.approx([62.5, 100 * low, 100 * high], abs=1e-3)
    seeds = [100 * right / 40 for right in (20, 26, 30)]
    spread = [mean(seeds), mean(seeds) - stdev(seeds), mean(seeds) + stdev(seeds)]
    assert points["random", "0.5"]["scores"]["digit"] == pytest.approx(spread, abs=1e-3)
    roles = {point["name"]: point["role"] for point in data["points"]}
    assert roles == {
        "none": "none",
        "blind": "blind",
        "fastervlm": "",
        "divprune+fastv:keep=0.5,layer=2": "",
        **dict.fromkeys(("random", "uniform", "pool"), "baseline"),
    }


def test_page_without_accuracy_has_no_plot(tmp_path: Path) -> None:
    save(tmp_path, [{**one, "accuracy": None, "accuracy_ci": None, "agreement": None, "by_type": {}} for one in ROWS])
    parsed = Page(report.report([tmp_path], "html"))
    assert "Accuracy against cost" not in parsed.text and "prefill FLOPs" in parsed.text


def test_disagreements_are_drawn(finished: Path) -> None:
    run = report.load(finished)
    found = page.cards(run, 5)
    assert len(found) == 5
    for card in found:
        spec, key = card["sample"]["spec"], card["sample"]["id"]
        assert card["sample"]["right"] is not card["full"]["right"]
        assert run.samples[spec][key] == card["sample"] and run.samples["none"][key] == card["full"]
        for name in ("before", "after"):
            head, _, data = card[name].partition(",")
            assert head == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data))) as drawn:
                assert drawn.width == drawn.height == (page.SIDE if name == "after" else 128)
        assert card["before"] != card["after"]
    text = report.report([finished], "html", drawings=5)
    images = [found["src"] for tag, found in Page(text).tags if tag == "img"]
    assert images == [card[name] for card in found for name in ("before", "after")]
    assert not [tag for tag, _ in Page(report.report([finished], "html", drawings=0)).tags if tag == "img"]


def test_disagreements_of_every_setting_take_turns() -> None:
    def answers(spec: str, right: str) -> dict[str, bench.Sample]:
        return {f"q{k}": sample(spec, f"q{k}", letter == "1") for k, letter in enumerate(right)}

    specs = ("uniform:keep=0.5", "fastervlm:keep=0.5")
    rows = [one for one in ROWS if one["spec"] in ("none", *specs)]
    samples = {
        "none": answers("none", "111100"),
        specs[0]: answers(specs[0], "000010"),
        specs[1]: answers(specs[1], "000111"),
    }
    found = [(card["sample"]["spec"], card["sample"]["id"]) for card in page.cards(report.Run("run", rows, samples), 5)]
    uniform = [key for spec, key in found if spec == specs[0]]
    faster = [key for spec, key in found if spec == specs[1]]
    assert (len(uniform), len(faster)) in ((2, 3), (3, 2))
    assert {"q4"} & set(uniform) and {"q4", "q5"} & set(faster), "what was gained is shown, too"
    assert len({key for _, key in found}) == 5, "no question twice as long as there are others"
    assert all(card["after"] is None for card in page.cards(report.Run("run", rows, samples), 5)), "no such picture"


# ------------------------------------------------------------------------------------------------------ two runs


@pytest.mark.parametrize("total", range(9))
def test_mcnemar_counts_every_way_in_which_chance_could_split(total: int) -> None:
    ways = [sum(coins) for coins in product((0, 1), repeat=total)]
    for lost in range(total + 1):
        as_uneven = sum(abs(2 * way - total) >= abs(2 * lost - total) for way in ways)
        assert paired.mcnemar(lost, total - lost) == pytest.approx(as_uneven / len(ways))


def test_holm_is_bonferroni_on_every_set_of_hypotheses() -> None:
    """The closed testing procedure: a hypothesis falls when every set that contains it does."""
    values = [0.02, 0.011, 0.4, 0.011, 0.9]
    for place, found in enumerate(paired.holm(values)):
        sets = [chosen for size in range(1, 6) for chosen in combinations(range(5), size) if place in chosen]
        assert found == pytest.approx(max(min(1, len(s) * min(values[k] for k in s)) for s in sets))


def test_interval_of_the_difference_is_newcombe_s() -> None:
    """The example of Newcombe (1998), 36 / 12 / 2 / 0: 0.0569 to 0.3404 by his tenth method."""
    assert paired.Pairs(36, 2, 12, 0).interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = paired.Pairs(36, 12, 2, 0).interval
    assert (-high, -low) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_interval_holds_the_difference_for_every_small_table() -> None:
    for counts in product(range(5), repeat=4):
        if sum(counts):
            pairs = paired.Pairs(*counts)
            low, high = pairs.interval
            assert -1 <= low <= pairs.difference <= high <= 1, counts


def results(spec: str, right: str, answer: Callable[[int], str] | None = None) -> list[bench.Sample]:
    """Samples of one spec, right where `right` has a 1; `answer` says which wrong answers."""
    made = [sample(spec, f"q{k}", letter == "1") for k, letter in enumerate(right)]
    for k, one in enumerate(made):
        if answer is not None and not one["right"]:
            one["answer"] = answer(k)
    return made


VERDICTS = {
    "same answers": ("1100", "1100", None),
    "other wrong answers": ("1100", "1100", lambda k: "5"),
    "noise": ("1100" * 5, "1010" * 5, None),
    "unclear": ("1" * 12 + "0" * 7, "1" * 12 + "1" * 6 + "0", None),
    "changed: better": ("1" * 12 + "0" * 9, "1" * 21, None),
    "changed: worse": ("1" * 21, "1" * 12 + "0" * 9, None),
}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_verdicts(verdict: str, tmp_path: Path) -> None:
    before, after, answer = VERDICTS[verdict]
    spec, still = "uniform:keep=0.5", "pool:keep=16"
    rows = [one for one in ROWS if one["spec"] in (spec, still)]
    one = save(tmp_path / "a", rows, [*results(spec, before), *results(still, "10")])
    two = save(tmp_path / "b", rows, [*results(spec, after, answer), *results(still, "10")])
    (found,) = (one for one in csv.DictReader(io.StringIO(report.report([one, two], "csv"))) if one["setting"] == spec)
    assert found["verdict"] == verdict
    lost, gained = (sum(pair == way for pair in zip(before, after, strict=True)) for way in (("1", "0"), ("0", "1")))
    assert (int(found["lost"]), int(found["gained"]), int(found["n"])) == (lost, gained, len(before))
    assert float(found["difference"]) == pytest.approx((gained - lost) / len(before))
    assert float(found["p_holm"]) == pytest.approx(min(1, 2 * paired.mcnemar(lost, gained)))
    for form in ("md", "latex", "html"):
        assert verdict in report.report([one, two], form, drawings=0)


def test_settings_of_one_run_only_are_listed(tmp_path: Path) -> None:
    one = save(tmp_path / "a", ROWS[:4], results("none", "10"))
    two = save(tmp_path / "b", [*ROWS[:2], *ROWS[4:5]], results("none", "10"))
    text = report.report([one, two], "md")
    assert f"Only in {one}: fastervlm:keep=0.5, fastervlm:keep=16\n" in text
    assert f"Only in {two}: {ROWS[4]['spec']}\n" in text
    assert "2 settings in both runs, 0 changed" in text
    assert "Not paired: 1 settings" in text, "blind has no samples"
    disjoint = save(tmp_path / "c", ROWS[4:5])
    assert "0 settings in both runs" in report.report([one, disjoint], "md")
    Page(report.report([one, disjoint], "html"))


def test_the_same_strategy_with_another_parameter_is_compared(tmp_path: Path) -> None:
    first, other = "fastervlm:keep=16", "fastervlm:keep=16,positions=original"
    one = save(tmp_path / "a", [row(first, 16, 30)], results(first, "1100"))
    two = save(tmp_path / "b", [row(other, 16, 31)], results(other, "1110"))
    (found,) = csv.DictReader(io.StringIO(report.report([one, two], "csv")))
    assert (found["setting"], found["gained"]) == (f"{first} → {other}", "1")
    # Two candidates: which of them is meant?
    more = row("fastervlm:keep=16,positions=contiguous", 16, 31)
    three = save(tmp_path / "c", [row(other, 16, 31), more], results(other, "1110"))
    assert "0 settings in both runs" in report.report([one, three], "md")


def test_costs_of_a_comparison_are_those_of_the_runs_own_tables(tmp_path: Path) -> None:
    """Where questions differ in size: means over them, not what the prompt was that was timed."""
    means = {"mean_tokens_out": 20.25, "mean_prefill_flops": 3.21e9}
    one = save(tmp_path / "a", [{**ROWS[3], **means}], results("fastervlm:keep=16", "11"))
    two = save(tmp_path / "b", [{**ROWS[3], **means, "mean_tokens_out": 21.0}], results("fastervlm:keep=16", "11"))
    (line,) = (line for line in report.report([one, two], "md").splitlines() if line.startswith("| fastervlm"))
    cells = [cell.strip() for cell in line.split("|")]
    assert {"20.2 → 21", "3.21 G"} <= set(cells)
    (found,) = csv.DictReader(io.StringIO(report.report([one, two], "csv")))
    assert (found["mean_tokens_out.first"], found["mean_tokens_out.second"]) == ("20.25", "21.0")
    assert found["mean_prefill_flops.first"] == "3210000000.0" and found["tokens_out.first"] == "16"


def test_other_conditions_are_named(tmp_path: Path) -> None:
    one = save(tmp_path / "a", ROWS[:1])
    two = save(tmp_path / "b", [{**ROWS[0], "dtype": "bfloat16", "versions": {"vtc": "0.1.0", "torch": "2.14.0"}}])
    text = report.report([one, two], "md")
    assert "Other conditions: dtype: float32 → bfloat16; torch: 2.13.0 → 2.14.0\n" in text
    assert "not paired" in text


def test_other_questions_under_the_same_name_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "a", ROWS[:1], [sample("none", "q", True)])
    two = save(tmp_path / "b", ROWS[:1], [sample("none", "q", True, expected="8")])
    with pytest.raises(VtcError, match="question q is not the same in the two runs: expected '7' and '8'"):
        report.report([one, two], "md")


# ------------------------------------------------------------------------------------------------------ the command


def test_command_prints_or_writes(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, saved) == (0, report.report([saved], "md"), "")
    assert command(capsys, saved / "rows.jsonl", "--format", "csv") == (0, report.report([saved], "csv"), "")
    for name, form in (("r.html", "html"), ("r.MD", "md"), ("r.tex", "latex"), ("deep/er/r.csv", "csv")):
        out = tmp_path / name
        assert command(capsys, saved, "--out", out) == (0, f"Written: {out}\n", "")
        assert out.read_text() == report.report([saved], form)
    assert command(capsys, saved, "--out", tmp_path / "r.txt", "--format", "latex")[0] == 0
    assert command(capsys, saved, saved)[1] == report.report([saved, saved], "md")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{run}", "{run}", "{run}"), "one run, or two to compare; got 3"),
        (("{run}", "--format", "pdf"), "use one of md, csv, latex, html"),
        (("{run}", "--out", "{run}/report.doc"), "end it in .html, .md, .csv or .tex"),
        (("{run}", "--out", "{run}"), "end it in .html"),
        (("{run}", "--out", "{run}", "--format", "md"), "give a file"),
        (("{run}", "--out", "{run}/rows.jsonl", "--format", "csv"), "is what the report is made from"),
        (("{run}", "--out", "{run}/rows.jsonl/x.md"), "give a file"),
        (("{run}", "--samples", "-1"), "--samples is -1"),
        (("{run}/..",), "has no rows.jsonl"),
        (("{run}/nothing.jsonl",), "cannot read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (saved / "rows.jsonl").read_text()
    code, out, err = command(capsys, *(argument.format(run=saved) for argument in arguments))
    assert (code, out) == (2, "") and err.startswith("vtc: error: ") and err.count("\n") == 1
    assert message in err
    assert (saved / "rows.jsonl").read_text() == before


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["report", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 90
    assert all(word in text for word in ("McNemar", *report.FORMATS, "example"))


# ------------------------------------------------------------------------------------------------ in a real browser


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.program() is None:
        pytest.skip("no Chromium with its driver on this machine")
    with browser.start(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(saved: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page with times, one with pictures, and one that compares."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, runs in {"times": [saved], "pictures": [finished], "two": [finished, finished]}.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(report.report(runs, "html"))
    return found


def name_of(point: dict[str, Any]) -> tuple[str, str]:
    """Name and budget of a point, as the page writes them."""
    return point["name"], "" if point["role"] in ("none", "blind") else point["keep"]


def front(points: list[dict[str, Any]], cost: str) -> set[tuple[str, str]]:
    """The points that none of equal or smaller cost equals or beats."""

    def beats(one: Any, other: Any) -> bool:
        return one["costs"][cost] <= other["costs"][cost] and one["scores"]["all"][0] >= other["scores"]["all"][0]

    return {name_of(one) for one in points if not any(beats(other, one) for other in points if other is not one)}


DRAWN = """return [...document.querySelectorAll('.point')].map(point => {
  const mark = point.querySelector('.mark').getBoundingClientRect();
  return [point.getAttribute('aria-label'), point.classList.contains('best'),
          mark.x + mark.width / 2, mark.y + mark.height / 2];
})"""


INSIDE = """return [...document.querySelectorAll('.plot')].every(plot => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text, .mark')].every(node => {
    const mine = node.getBoundingClientRect();
    return mine.left >= box.left - 1 && mine.right <= box.right + 1
      && mine.top >= box.top - 1 && mine.bottom <= box.bottom + 1;
  });
})"""


@pytest.mark.parametrize("name", ["times", "pictures", "two"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_browser_shows_the_page(
    name: str, width: int, dark: bool, window: browser.Browser, pages: dict[str, Path]
) -> None:
    window.open(pages[name], width, dark=dark)
    assert window.log() == [], "no error, no refused request"
    assert window.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []
    assert window.run("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert window.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert window.run("return document.images.length > 0") is (name != "times")
    for plot in window.run(
        "return [...document.querySelectorAll('.plot svg')].map(svg => svg.getBoundingClientRect().width)"
    ):
        assert 0.7 * width < plot <= width
    assert window.run(INSIDE), "no label or point is cut off"
    paper, ink = window.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert (sum(map(int, re.findall(r"\d+", paper))) < sum(map(int, re.findall(r"\d+", ink)))) is dark


@pytest.mark.parametrize("cost", COSTS)
def test_browser_switches_the_axis(cost: str, window: browser.Browser, pages: dict[str, Path]) -> None:
    window.open(pages["times"], 1280)
    window.click(f"input[value={cost}]")
    drawn = window.run(DRAWN)
    points = [point for point in page.points(ROWS) if point["role"] != "blind"]
    assert len(drawn) == len(points)
    title = {"tokens": "visual tokens kept", "flops": "prefill FLOPs", "ttft": "time to first token, ms"}[cost]
    assert title in window.run("return [...document.querySelectorAll('.plot text')].map(node => node.textContent)")
    found = {tuple(label.split(", accuracy")[0].partition(", keep ")[::2]): (best, x, y) for label, best, x, y in drawn}
    assert {name for name, (best, _, _) in found.items() if best} == front(points, cost)
    # Dearer is further right (curves that share a budget are moved apart), better is higher.
    places = [(point, found[name_of(point)]) for point in points]
    for (one, (_, x, y)), (other, (_, x2, y2)) in product(places, places):
        if one["costs"][cost] > 1.2 * other["costs"][cost]:
            assert x > x2
        if one["scores"]["all"][0] > other["scores"]["all"][0]:
            assert y < y2


def test_browser_tells_a_point_under_the_pointer(window: browser.Browser, pages: dict[str, Path]) -> None:
    window.open(pages["times"], 1280)
    tip = "const tip = document.querySelector('.tip'); return tip.hidden ? null : tip.innerText"
    assert window.run(tip) is None
    for label, _, x, y in window.run(DRAWN):
        window.move(x, y)
        assert window.run(tip).replace("\n", ", ") == label
    window.move(5, 5)
    assert window.run(tip) is None
    random = next(point for point in page.points(ROWS) if point["name"] == "random")
    value, low, _ = random["scores"]["all"]
    wanted = f"random, keep 0.5, accuracy {value:.1f} % ± {value - low:.1f} (3 seeds), visual tokens 64 → 32, "
    assert any(label.startswith(wanted) for label, *_ in window.run(DRAWN))


def test_browser_reaches_points_by_keyboard(window: browser.Browser, pages: dict[str, Path]) -> None:
    window.open(pages["times"], 390)
    window.run("document.querySelector('select').focus()")
    window.press("\ue004")  # tab
    label = window.run("return document.activeElement.getAttribute('aria-label')")
    assert "accuracy" in label
    assert window.run("return document.querySelector('.tip').innerText").replace("\n", ", ") == label
    sides = "const box = document.querySelector(arguments[0]).getBoundingClientRect(); return [box.left, box.right]"
    box, tip = window.run(sides, ".plot"), window.run(sides, ".tip")
    assert box[0] <= tip[0] < tip[1] <= box[1]


def test_browser_hides_curves_and_chooses_questions(window: browser.Browser, pages: dict[str, Path]) -> None:
    window.open(pages["times"], 1280)
    before = window.run(DRAWN)
    window.click(".keys input")  # the first curve: fastervlm, two points
    labels = [label for label, *_ in window.run(DRAWN)]
    assert len(labels) == len(before) - 2 and not any(label.startswith("fastervlm") for label in labels)
    window.click(".keys input")
    assert window.run(DRAWN) == before
    window.run("const s = document.querySelector('select'); s.value = 'digit'; s.dispatchEvent(new Event('change'))")
    uniform = next(label for label, *_ in window.run(DRAWN) if label.startswith("uniform"))
    assert f"accuracy {100 * 38 / 40:.1f} %" in uniform


def test_browser_names_times_that_were_not_measured(window: browser.Browser, pages: dict[str, Path]) -> None:
    window.open(pages["pictures"], 1280)
    assert window.run("return [...document.querySelectorAll('input[type=radio]')].map(radio => radio.disabled)") == [
        False,
        False,
        True,
    ]
