"""`vtc bench --random-weights`: architectures without checkpoints, measured on a made-up prompt."""

from __future__ import annotations

import csv
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import vtc
from families import FAMILIES
from rows import ROW, row
from vtc import adapters, cli, compressor
from vtc.errors import VtcError
from vtc.eval import bench, checkpoints, flops, latency, plot, report, resume
from vtc.eval.estimate import frame_tokens, view_tokens
from vtc.eval.made_up import MadeUp, _tiles, count

SMALL: dict[str, Any] = {"width": 64, "height": 48, "text": 9}  # pixels as tiny models see them
TAKE_CLIPS = [name for name, family in FAMILIES.items() if family.frames]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An architecture in a folder: a config and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    FAMILIES["qwen2vl"].model().config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    options = bench.Options(model=config, made_up=MadeUp(**SMALL), specs=("divprune",), keeps=(0.5,), repeats=2)
    bench.run(options, out)
    return out


# --------------------------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("frames", [None, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_take_the_prompt(name: str, frames: int | None) -> None:
    model, prompt = FAMILIES[name].model(), MadeUp(frames=frames, **SMALL)
    if frames is not None and name not in TAKE_CLIPS:
        with pytest.raises(VtcError, match="takes pictures, not clips: leave --frames out"):
            prompt.inputs(model)
        return
    inputs = prompt.inputs(model)
    visual = count(adapters.find(model), inputs)
    assert visual == prompt.tokens(model) > 0
    with vtc.compress(model, "uniform:keep=0.5") as session:
        run = latency.run(model, inputs, 3)
    assert session.last is not None and session.last.tokens_in == visual
    assert run.length == inputs["input_ids"].shape[1] - visual + session.last.tokens_out
    assert session.last.modalities[0] == ("video" if frames and name != "internvl" else "image")
    blind = prompt.inputs(model, blind=True)
    assert blind["input_ids"].shape == (1, SMALL["text"]) and not any(key.startswith("pixel") for key in blind)
    assert latency.run(model, blind).images == 0


@pytest.mark.parametrize(
    ("name", "frames", "tokens"),
    [
        ("llava-1.5-7b", None, 576),
        ("llava-next-7b", None, 576 + 36 * (48 + 1)),  # a canvas of 672 x 672, cut to 4:3
        ("llava-onevision-0.5b", 16, 16 * 14 * 14 + 1),
        ("qwen2.5-vl-3b", None, 17 * 23),
        ("qwen3-vl-2b", 8, 4 * 15 * 20),
        ("internvl3-1b", None, (4 * 3 + 1) * 256),
        ("internvl3-1b", 8, 8 * 256),
    ],
)
def test_tokens_of_usual_models(name: str, frames: int | None, tokens: int) -> None:
    """As their processors would make of a picture of 640 x 480."""
    config = checkpoints.config(name)
    if name.startswith("qwen"):
        edge = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        assert tokens == (frames or 2) // 2 * round(480 / edge) * round(640 / edge)
    elif frames:
        assert tokens in (frames * (frame_tokens(config) or 0) + 1, frames * view_tokens(config))
    assert MadeUp(frames=frames).tokens(checkpoints.random_weights(name, device="meta")) == tokens


@pytest.mark.parametrize(
    ("width", "height", "tiles"), [(640, 480, 13), (448, 448, 1), (896, 896, 5), (4480, 448, 11), (100, 300, 4)]
)
def test_tiles_are_those_of_the_processor(width: int, height: int, tiles: int) -> None:
    assert _tiles(width, height, 448) == tiles
    if find_spec("torchvision") is not None:
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        across, down = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        assert tiles == across * down + (across * down > 1)


# ------------------------------------------------------------------------------------------------------------ the run


def test_everything_but_answers_is_measured(finished: Path, config: str) -> None:
    run = report.load(finished)
    rows = {one["spec"]: one for one in run.rows}
    assert list(rows) == [
        *("none", "blind", "divprune:keep=0.5", "random:keep=0.5", "uniform:keep=0.5", "pool:keep=0.5"),
        "downsample:keep=0.5",
    ]
    assert run.samples == {}
    for one in run.rows:
        assert (one["model"], one["task"], one["n"]) == (f"{config}, random weights", None, 0)
        assert one["accuracy"] is one["accuracy_ci"] is one["agreement"] is None and one["by_type"] == {}
        assert min(one[key] for key in ("ttft_ms", "ideal_ttft_ms", "decode_tokens_per_s", "kv_cache_bytes")) > 0
        assert one["prompt"] == "one made-up picture of 64 x 48 pixels, 9 tokens of text"
        assert one["versions"]["torch"] and one["attention"] == "sdpa" and one["seed"] == 0
    full, half, scaled = rows["none"], rows["divprune:keep=0.5"], rows["downsample:keep=0.5"]
    assert (full["tokens_in"], half["tokens_out"], full["sequence_in"]) == (48, 24, 59)
    assert scaled["tokens_in"] == 48 and 12 <= scaled["tokens_out"] <= 24
    assert half["encoder_flops"] == full["encoder_flops"] > scaled["encoder_flops"] > 0


def test_tables_pages_and_plots_do_without_accuracy(finished: Path) -> None:
    for form in report.FORMATS:
        text = report.report([finished], form)
        assert "accuracy %" not in text and "divprune" in text
    text = report.report([finished], "md")
    assert "one made-up picture of 64 x 48 pixels" in text and "Time to first token" in text
    lines = list(csv.DictReader(io.StringIO(report.report([finished], "csv"))))
    assert {line["accuracy"] for line in lines} == {""}
    compared = report.report([finished, finished], "md")
    assert "not paired" in compared and "7 settings in both runs, 0 changed" in compared


def test_without_accuracy_times_are_drawn(finished: Path, tmp_path: Path) -> None:
    rows = report.load(finished).rows
    scale, drawn = plot.scale_of(rows) or (None, None)
    assert scale is plot.TIME and drawn == rows
    assert plot.pareto(rows, tmp_path / "plot.png") and (tmp_path / "plot.png").stat().st_size > 1000
    untimed = [{**one, "ttft_ms": None} for one in rows]
    assert not plot.pareto(untimed, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_rows_with_and_without_accuracy_are_drawn_together(tmp_path: Path) -> None:
    unknown = row("pool:keep=16", 16, 20, accuracy=None, accuracy_ci=None)
    rows = [ROW, unknown, row("uniform:keep=16", 16, 20)]
    scale, drawn = plot.scale_of(rows) or (None, [])
    assert scale is plot.ACCURACY and unknown not in drawn and len(drawn) == 2
    assert plot.pareto(rows, tmp_path / "plot.png")


def test_a_run_goes_on(config: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench.Options(model=config, made_up=MadeUp(**SMALL), specs=("uniform",), keeps=(0.5,), repeats=2)
    first = bench.run(options, tmp_path)
    monkeypatch.setattr(bench.Bench, "_time", lambda *args: pytest.fail("measured again"))
    assert bench.run(options, tmp_path, go_on=True) == json.loads(json.dumps(first))
    other = bench.Options(model=config, made_up=MadeUp(**{**SMALL, "text": 5}), specs=("uniform",), keeps=(0.5,))
    with pytest.raises(VtcError, match="prompt was one made-up picture .* 9 tokens of text and is"):
        bench.run(other, tmp_path, go_on=True)
    assert "prompt" in resume.SAME


def test_every_strategy_that_the_model_can_do(config: str, tmp_path: Path) -> None:
    options = bench.Options(model=config, made_up=MadeUp(**SMALL), keeps=(0.5,), latency=False)
    names = {one["strategy"] for one in bench.run(options, tmp_path)}
    assert {"none", "blind", "downsample", "divprune", "holitom", "fastv"} <= names
    assert names - {"blind", "downsample"} <= set(compressor.available())


def test_flops_are_those_of_the_closed_form(finished: Path, config: str) -> None:
    text = checkpoints.config(config).get_text_config()
    for one in report.load(finished).rows:
        assert one["prefill_flops"] == flops.prefill_flops(text, one["sequence_out"])


# --------------------------------------------------------------------------------------------------- the command line


def test_on_the_command_line(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--random-weights", config, "--size", "64x48", "--text", "9", "--frames", "4", "--repeats", "2"]
    out = tmp_path / "run"
    assert cli.main([*command, "--spec", "holitom", "--keep", "0.5", "--attn", "eager", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    names = ("rows.jsonl", "table.md", "pareto.png")
    assert f"Written: {', '.join(str(out / name) for name in names)}\n" in text
    assert all((out / name).stat().st_size for name in names)
    (first, *_) = report.load(out).rows
    assert first["attention"] == "eager" and "clip of 4 frames" in first["prompt"] and first["tokens_in"] == 96
    assert cli.main(["report", str(out)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--random-weights", "lava-1.5-7b"], "did you mean 'llava-1.5-7b'?"),
        (["--random-weights", "{config}", "--task", "scenes"], "asked nothing: leave --task and --limit out"),
        (["--random-weights", "{config}", "--limit", "3"], "asked nothing"),
        (["--random-weights", "{config}", "--size", "big"], "'big' is not width x height"),
        (["--random-weights", "{config}", "--size", "0x5"], "use at least 1x1"),
        (["--random-weights", "{config}", "--text", "0"], "--text is 0"),
        (["--random-weights", "{config}", "--frames", "0"], "--frames is 0"),
        (["--random-weights", "{config}", "--attn", "psychic"], "psychic"),
        (["--random-weights", "{config}", "--repeats", "1"], "--repeats is 1; use at least 2"),
        (["--random-weights", "{config}", "--model", "tiny-llava"], "not allowed with argument"),
        (["--frames", "4"], "--frames describes the prompt for --random-weights"),
        (["--task", "scene"], "did you mean 'scenes'?"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", *(option.format(config=config) for option in options), "--out", str(tmp_path / "out")]
    try:
        code = cli.main(command)
    except SystemExit as end:
        code = int(end.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
