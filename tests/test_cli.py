"""The command line: what it prints, what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtc
from checkpoints import TOKENS, save_llava, save_text_only
from families import FAMILIES, ONE_CLIP, Family
from vtc import cli
from vtc.errors import VtcError
from vtc.eval import bench, scenes, show
from vtc.eval.lmms.clips import Clip
from vtc.eval.pictures import open_visual


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and pictures, good and bad."""
    root = tmp_path_factory.mktemp("root")
    save_llava(root / "clip")
    save_llava(root / "siglip", "siglip")
    save_text_only(root / "text-only")
    (root / "empty").mkdir()
    next(scenes.questions()).image.save(root / "scene.png")
    Image.new("RGB", (200, 90), (90, 140, 60)).save(root / "wide.jpg")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    (root / "notes.txt").write_text("not a picture")
    (root / "results").mkdir()
    (root / "results" / "rows.jsonl").write_text("{}\n")
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse leaves like this
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def python(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)


BENCH = ("bench", "--model", "{root}/clip", "--out", "{root}/new", "--limit", "2", "--no-latency")
SHOW = ("show", "{root}/scene.png", "--question", "What is red?", "--model", "{root}/clip", "--out", "{root}/k.png")
FLOPS = ("flops", "--config", "llava-1.5-7b", "--tokens", "576")
BAD_INPUT = {
    # what a compressor may be
    "unknown strategy": ((*BENCH, "--spec", "fastvlm"), "did you mean 'fastervlm'?"),
    "unknown key": ((*BENCH, "--spec", "fastervlm:kep=3"), "did you mean 'keep'?"),
    "key without value": ((*BENCH, "--spec", "fastervlm:keep"), "is not key=value"),
    "empty spec": ((*BENCH, "--spec", ""), "unknown strategy ''"),
    "value of a wrong kind": ((*BENCH, "--spec", "random:seed=red"), "a whole number"),
    "none with a budget": ((*BENCH, "--spec", "none:keep=0.5"), "leave keep out"),
    # how much it may keep
    "keep of zero": ((*BENCH, "--spec", "uniform:keep=0"), "at least 1 token"),
    "keep of zero as a fraction": ((*BENCH, "--spec", "uniform", "--keep", "0.0"), "0 < keep <= 1.0"),
    "negative keep": ((*BENCH, "--spec", "uniform", "--keep", "0.5,-3"), "at least 1 token"),
    "negative fraction": ((*BENCH, "--spec", "uniform:keep=-0.5"), "0 < keep <= 1.0"),
    "fraction above one": ((*BENCH, "--spec", "uniform", "--keep", "1.5"), "0 < keep <= 1.0"),
    "more than there is": ((*BENCH, "--spec", f"uniform:keep={TOKENS + 1}"), f"use at most {TOKENS}"),
    "more than there is, for all": ((*BENCH, "--spec", "uniform", "--keep", "999"), f"use at most {TOKENS}"),
    "keep is a word": ((*BENCH, "--keep", "half"), "neither a number of tokens (64) nor a fraction (0.25)"),
    "keep is not a number": ((*BENCH, "--keep", "nan"), "0 < keep <= 1.0"),
    "no keep at all": ((*BENCH, "--keep", ","), "for example 0.25"),
    # which model
    "unknown model": ((*BENCH, "--model", "tiny-lava"), "no bundled model and no checkpoint folder"),
    "folder without a model": ((*BENCH, "--model", "{root}/empty"), "no config.json"),
    "text-only model": ((*BENCH, "--model", "{root}/text-only"), "takes no images"),
    "need the tower cannot meet": ((*BENCH, "--model", "{root}/siglip", "--spec", "fastervlm"), "received"),
    "unknown attention": ((*BENCH, "--attn", "psychic"), "psychic"),
    "unknown dtype": ((*BENCH, "--dtype", "int7"), "float32, bfloat16, float16"),
    "unknown device": ((*BENCH, "--device", "abacus"), "use one of: cpu"),
    # what to ask
    "unknown task": ((*BENCH, "--task", "scene"), "did you mean 'scenes'?"),
    "clips for a model of pictures": ((*BENCH, "--task", "clips"), "choose another --task"),
    # how to run
    "limit of zero": ((*BENCH, "--limit", "0"), "use at least 1"),
    "limit is a word": ((*BENCH, "--limit", "few"), "--limit"),
    "batches of nothing": ((*BENCH, "--batch-size", "0"), "use at least 1"),
    "unknown numbering": ((*BENCH, "--positions", "sideways"), "contiguous"),
    "earlier results": ((*BENCH, "--out", "{root}/results"), "--overwrite"),
    "a file for a folder": ((*BENCH, "--out", "{root}/notes.txt"), "give a folder"),
    "a folder in a file": ((*BENCH, "--out", "{root}/notes.txt/results"), "give a folder"),
    "no folder": (("bench", "--spec", "uniform"), "--out"),
    "unknown option": (("bench", "--out", "x", "--fast"), "--fast (see 'vtc bench --help')"),
    "unknown option of no command": (("--fast",), "--fast (see 'vtc --help')"),
    "unknown command": (("bensh",), "'bench'"),
    # what to count
    "unknown config": (("flops", "--config", "lava-1.5-7b", "--tokens", "576"), "did you mean 'llava-1.5-7b'?"),
    "unknown convention": ((*FLOPS, "--convention", "exakt"), "did you mean 'exact'?"),
    "schedule of other depth": ((*FLOPS, "--schedule", "2:576,29:288"), "31 layers, but llava-1.5-7b has 32"),
    "schedule in words": ((*FLOPS, "--schedule", "half"), "'half' is not layers:tokens"),
    "grid in words": ((*FLOPS, "--grid", "24x24"), "'24x24' is not frames x rows x columns"),
    "views and a grid": ((*FLOPS, "--grid", "1x24x24"), "views or frames"),
    "no tokens": (("flops", "--config", "llava-1.5-7b"), "--tokens"),
    # what to show
    "no such picture": (("show", "{root}/nothing.png", *SHOW[2:], "--spec", "uniform"), "no file"),
    "not a picture": (("show", "{root}/notes.txt", *SHOW[2:], "--spec", "uniform"), "as a picture"),
    "a broken picture": (("show", "{root}/broken.png", *SHOW[2:], "--spec", "uniform"), "as a picture"),
    "a folder as a picture": (("show", "{root}", *SHOW[2:], "--spec", "uniform"), "as a picture"),
    "a folder without pictures": (("show", "{root}/empty", *SHOW[2:], "--spec", "uniform"), "holds no pictures"),
    "no such video": (("show", "{root}/nothing.mp4", *SHOW[2:], "--spec", "uniform"), "no file"),
    "frames of two sizes": (("show", "{root}/wide.jpg", *SHOW[1:], "--spec", "uniform"), "of one size"),
    "frames for a model of pictures": (("show", "{root}/scene.png", *SHOW[1:], "--spec", "uniform"), "not clips"),
    "no frames": ((*SHOW, "--spec", "pool", "--frames", "0"), "use at least 1"),
    "show an unknown strategy": ((*SHOW, "--spec", "pol"), "did you mean 'pool'?"),
    "show more than there is": ((*SHOW, "--spec", "uniform", "--keep", "17"), "use at most 16"),
    "show without a spec": (SHOW, "--spec"),
    "show without words": ((*SHOW, "--spec", "pool", "--max-new-tokens", "0"), "use at least 1"),
    "write no picture": ((*SHOW, "--spec", "pool", "--out", "{root}/kept.doc"), "kept.png"),
    "write into a file": ((*SHOW, "--spec", "pool", "--out", "{root}/notes.txt/kept.png"), "give a folder"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD_INPUT[name]
    code, out, err = run(capsys, *(argument.format(root=root) for argument in arguments))
    assert code == 2
    assert err.startswith("vtc: error: ") and err.count("\n") == 1, err
    assert expected in err
    assert "Traceback" not in err and not out
    assert not (root / "new").exists()


def test_bad_input_in_a_process_of_its_own(root: Path) -> None:
    """Nothing that libraries print at import or while loading gets in between."""
    found = python(
        "-m", "vtc", "bench", "--model", root / "clip", "--out", root / "new", "--spec", f"pool,uniform:keep={TOKENS}"
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("vtc: error: unknown strategy") and found.stderr.count("\n") == 1
    found = python("-m", "vtc", "bench", "--model", root / "siglip", "--out", root / "new", "--spec", "fastervlm")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("vtc: error: fastervlm") and found.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "describe", lambda cls: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [("tabulate", BENCH, "eval"), ("matplotlib", BENCH, "eval"), ("PIL", (*SHOW, "--spec", "pool"), "viz")],
)
def test_missing_package_names_the_extra(package: str, command: tuple[str, ...], extra: str, root: Path) -> None:
    """Before anything is measured, that is."""
    code = f"import sys; sys.modules['{package}'] = None; from vtc.cli import main; sys.exit(main(sys.argv[1:]))"
    found = python("-c", code, *(argument.format(root=root) for argument in command))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("vtc: error: ") and found.stderr.count("\n") == 1, found.stderr
    assert package in found.stderr and f'pip install "/path/to/vtc[{extra}]"' in found.stderr
    assert not (root / "new").exists()


@pytest.mark.parametrize(("command", "hint"), [(BENCH, "--resume"), ((*SHOW, "--spec", "pool"), "interrupted\n")])
def test_an_interruption_says_how_to_go_on(
    command: tuple[str, ...], hint: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **others: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupt)
    monkeypatch.setattr(show, "show", interrupt)
    code, _, err = run(capsys, *(argument.format(root=root) for argument in command))
    assert code == 130 and hint in err and err.count("\n") == 1, err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"vtc {vtc.__version__}\n", "")


@pytest.mark.parametrize("command", [[], ["list"], ["bench"], ["flops"], ["show"]])
def test_help_explains(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *command, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 90
    if command in (["bench"], ["show"]):
        assert "whole number counts" in " ".join(out.split()) and "example" in out


def test_without_arguments_comes_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert all(word in out for word in ("list", "bench", "flops", "show"))


def test_list_names_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list")
    head, *lines = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split() == ["name", "site", "needs", "positions", "paper", "summary"]
    assert [line.split()[0] for line in lines] == list(vtc.available())
    column = head.index("needs")
    fastervlm = next(line for line in lines if line.startswith("fastervlm"))
    assert fastervlm[column:].startswith("cls ") and "2412.01818" in fastervlm


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--json")
    entries = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0 and list(entries) == list(vtc.available())
    todre = entries["todre"]
    assert (todre["site"], todre["needs"], todre["paper"]) == ("input", ["cls", "features"], "2505.18757")
    assert todre["parameters"]["pivot"] == "cls"
    assert all(entry["summary"] for entry in entries.values())


def test_strategies_of_the_user_are_listed_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtc import compressor

    monkeypatch.setattr(compressor, "_registry", {**compressor._registry})

    @vtc.register("mine")
    class Mine(vtc.Compressor):
        """Keep what I like."""

    code, out, _ = run(capsys, "list")
    assert code == 0 and any(
        line.startswith("mine ") and line.endswith("Keep what I like.") for line in out.splitlines()
    )


def test_bench_writes_rows_table_and_plot(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "results"
    arguments = ("bench", "--model", root / "clip", "--spec", "fastervlm", "--spec", "pool:keep=4", "--keep", "0.5,3")
    code, printed, err = run(capsys, *arguments, "--limit", "6", "--no-latency", "--out", out)
    assert code == 0
    assert "answers/s" in err, "a progress bar"
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    wanted = {"model", "spec", "keep", "tokens_in", "tokens_out", "prefill_flops", "ttft_ms", "ideal_ttft_ms"}
    wanted |= {"decode_tokens_per_s", "accuracy", "accuracy_ci", "agreement", "n", "seed", "versions"}
    assert all(wanted <= set(row) for row in rows)
    assert {"none", "blind", "fastervlm:keep=0.5", "fastervlm:keep=3", "pool:keep=4"} <= {row["spec"] for row in rows}
    table = (out / "table.md").read_text()
    assert table in printed and "| fastervlm" in table
    assert (out / "pareto.png").stat().st_size > 5000
    names = ("rows.jsonl", "samples.jsonl", "table.md", "pareto.png")
    assert printed.splitlines()[-1] == f"Written: {', '.join(str(out / name) for name in names)}"
    assert set(names) == {path.name for path in out.iterdir()}
    assert {row["task"] for row in rows} == {"scenes"}


def test_bench_again_needs_overwrite(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "bench",
        "--model",
        root / "clip",
        "--spec",
        "uniform:keep=4",
        "--limit",
        "2",
        "--no-latency",
        "--out",
        tmp_path,
    )
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "rows.jsonl").read_text()
    assert run(capsys, *arguments)[0] == 2
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert run(capsys, *arguments, "--overwrite", "--attn", "eager", "--positions", "original")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["attention"] for row in rows} == {"eager"}
    assert {row["positions"] for row in rows if row["strategy"] == "uniform"} == {"original"}


def test_show_answers_and_draws(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "pictures" / "kept.png"
    arguments = ("show", root / "wide.jpg", "--question", "Which shape is red?", "--model", root / "clip")
    code, out, err = run(capsys, *arguments, "--spec", "uniform", "--spec", "pool:keep=4", "--keep", "5", "--out", kept)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["all tokens", "uniform:keep=5", "pool:keep=4"]
    assert str(kept) in lines[3]
    with Image.open(kept) as picture:
        assert picture.width > 3 * 600, "three panels"


@pytest.mark.parametrize(("tower", "fit"), [("clip", "crop"), ("siglip", "resize")])
def test_show_draws_what_the_processor_does(
    tower: str, fit: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtc import picture

    fits = []
    monkeypatch.setattr(picture, "draw", lambda image, layout, kept, sources, fit, scores: fits.append(fit) or image)
    command = ("show", root / "wide.jpg", "--question", "What is red?", "--spec", "uniform", "--keep", "5")
    assert cli.main([str(part) for part in (*command, "--model", root / tower, "--out", tmp_path / "kept.png")]) == 0
    assert fits == [fit]


def test_show_has_a_panel_for_each_stage(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc import picture

    sheets: list[Sequence[str]] = []
    monkeypatch.setattr(picture, "side_by_side", lambda panels, captions, columns: sheets.append(captions) or panels[0])
    answers = show.show(
        root / "wide.jpg",
        "What is red?",
        ["uniform:keep=8+fastv:keep=4,layer=1", "pool:keep=4"],
        bench.Options(model=str(root / "clip"), keeps=()),
        tmp_path / "kept.png",
    )
    whole, first, second, pool = (caption.splitlines() for caption in sheets[0])
    both, single = list(answers)[1:]
    assert whole == ["What is red?", f"all tokens: {answers['all tokens']}"]
    assert first == [both.partition("+")[0], f"8 of {TOKENS} tokens at the input"]
    assert second[0] == both and second[2] == f"answer: {answers[both]}"
    assert second[1].startswith(f"4 of {TOKENS} tokens from decoder layer 1 on, 0.") and "x prefill FLOPs" in second[1]
    assert pool[0] == single and pool[1].startswith(f"4 of {TOKENS} tokens, 0.")
    assert pool[2] == f"answer: {answers[single]}"


def test_show_gives_scores_of_what_arrived(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Sequence[show.Panel]] = []
    monkeypatch.setattr(show, "save", lambda visual, question, panels, fit, out: drawn.append(panels))
    specs = ["fastervlm:keep=8+fastv:keep=3,layer=1", "divprune:keep=4"]
    options = bench.Options(model=str(root / "clip"), keeps=())
    answers = [
        show.show(root / "scene.png", "What is red?", specs, options, tmp_path / "kept.png", scores=scores)
        for scores in (False, True)
    ]
    assert answers[0] == answers[1]
    plain, scored = drawn
    assert [panel.scores for panel in plain] == [None] * 3
    first, second, divprune = scored
    assert divprune.scores is None and "score" not in divprune.caption
    report = first.report
    arrived: Sequence[int] = range(TOKENS)
    for panel, stage in zip((first, second), report.stages, strict=True):
        scores = np.array(panel.scores)
        assert np.flatnonzero(~np.isnan(scores)).tolist() == list(arrived)
        arrived = stage.kept[0]
        best = np.argsort(-scores, kind="stable")[: len(arrived)]  # NaN comes last
        assert sorted(best.tolist()) == list(arrived)
        assert "lighter: higher score" in panel.caption


def test_panels_of_many_strategies_are_in_rows(root: Path, tmp_path: Path) -> None:
    specs = [f"uniform:keep={keep}" for keep in range(1, 8)]
    options = bench.Options(model=str(root / "clip"), keeps=())
    show.show(root / "scene.png", "What is red?", specs, options, tmp_path / "kept.png", max_new_tokens=1)
    with Image.open(tmp_path / "kept.png") as sheet:
        assert 1.2 < sheet.width / sheet.height < 2, "eight panels, four in a row"


@pytest.mark.parametrize(("panels", "width", "across"), [(8, 520, 4), (3, 1050, 3), (4, 2100, 1), (2, 4000, 1)])
def test_wide_panels_stand_below_each_other(panels: int, width: int, across: int) -> None:
    """A sheet of thirty frames beside another cannot be read on any screen."""
    assert show.in_a_row(panels, width) == across


class Clips:
    """Stands in for the processor of a tiny family that takes clips of three frames."""

    video_token = "<video>"
    video_processor = image_processor = SimpleNamespace(do_center_crop=False)

    def __init__(self, family: Family) -> None:
        self.family = family
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
        self.asked.append(given)
        return self.family.batch((ONE_CLIP,)).inputs()

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(str(number) for number in ids.tolist())


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> Clips:
    family = FAMILIES["llava-onevision"]
    clips = Clips(family)
    monkeypatch.setattr(show, "load_model", lambda options: (family.model(), clips))
    return clips


def frames_in(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    for number in (9, 10, 11):
        Image.new("RGB", (70, 50), (number * 20, 40, 40)).save(folder / f"frame-{number}.png")
    return [folder / f"frame-{number}.png" for number in (9, 10, 11)]


@pytest.mark.parametrize("form", ["folder", "files", "gif"])
def test_show_draws_clips(form: str, tmp_path: Path, clips: Clips, capsys: pytest.CaptureFixture[str]) -> None:
    files = frames_in(tmp_path / "frames")
    given: list[Path] = {"folder": [tmp_path / "frames"], "files": files, "gif": [tmp_path / "clip.gif"]}[form]
    pictures = [Image.open(file).quantize(4) for file in files]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:])
    out = tmp_path / "kept.png"
    command = ("show", *given, "--question", "What moves?", "--spec", "uniform", "--keep", "0.3", "--out", out)
    code, printed, err = run(capsys, *command, "--max-new-tokens", "2")
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in printed.splitlines()[:2]] == ["all tokens", "uniform:keep=0.3"]
    (asked,) = clips.asked
    assert "What moves?" in asked["text"][0] and "<video>" in asked["text"][0]
    assert asked["videos"][0].shape == (3, 50, 70, 3)
    assert asked["videos"][0][:, 25, 35, 0].tolist() == [180, 200, 220], "in the order of their numbers"
    with Image.open(out) as sheet:
        colours = {colour for _, colour in sheet.getcolors(2**24)}
        assert {(180, 40, 40), (200, 40, 40), (220, 40, 40)} <= colours


def test_show_moves(tmp_path: Path, clips: Clips, capsys: pytest.CaptureFixture[str]) -> None:
    files, out = frames_in(tmp_path / "frames"), tmp_path / "deep" / "kept.gif"
    command = ("show", *files, "--question", "What moves?", "--spec", "holitom:keep=0.4", "--spec", "uniform:keep=4")
    assert run(capsys, *command, "--out", out, "--max-new-tokens", "1")[0] == 0
    with Image.open(out) as moving:
        assert moving.n_frames == 3  # type: ignore[attr-defined]
        assert moving.width > 3 * 500


def test_of_an_animated_picture_some_frames_are_shown(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), (10 * number, 0, 0)) for number in range(10)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    clip = open_visual([tmp_path / "clip.webp"], 4)
    assert isinstance(clip, Clip) and clip.frames[:, 0, 0, 0].tolist() == [0, 30, 60, 90]


def test_a_video_without_a_reader(tmp_path: Path, clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.eval.lmms.clips._installed", lambda reader: False)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(VtcError, match="pip install av"):
        open_visual([tmp_path / "clip.mp4"], 8)


def test_flops_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *FLOPS, "--text", "40", "--convention", "llm_viewer", "--decode", "5")
    assert (code, err) == (0, "")
    lines = {line[:20].strip(): line[20:].split() for line in out.splitlines()}
    assert lines["part"] == ["MACs", "FLOPs"]
    assert lines["prefill"][2:4] == ["8.18", "T"]
    assert {"encoder", "projector", "selection", "decode, step 1", "decode, steps 1-5"} <= set(lines)
    assert "llava-1.5-7b: 576 visual and 40 text tokens" in out and "convention llm_viewer" in out


def test_flops_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    from vtc.eval.estimate import estimate

    options = ("--text", "64", "--schedule", "2:576,30:288", "--convention", "fastv", "--strategy", "fastv", "--json")
    code, out, err = run(capsys, *FLOPS, *options)
    assert (code, err) == (0, "")
    found = estimate("llava-1.5-7b", 576, text=64, schedule=((2, 576), (30, 288)), convention="fastv", strategy="fastv")
    assert json.loads(out) == found.to_dict()
    code, out, err = run(capsys, *FLOPS[:2], "qwen2.5-vl-7b", "--tokens", "64", "--grid", "2x8x4", "--causal", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == estimate("qwen2.5-vl-7b", 64, grid=(2, 8, 4), causal=True).to_dict()
