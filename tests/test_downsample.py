"""The baseline `downsample`: pictures scaled down until the model makes few enough visual tokens of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchvision", reason="the processors of these models need it")

from checkpoints import TOKENS, save_llava
from video_checkpoints import save_internvl, save_onevision, save_qwen
from vtc import cli, zoo
from vtc.errors import SpecError, UnsupportedModelError, VtcError
from vtc.eval import bench, downsample, prompts, report, scenes, tasks
from vtc.eval.items import Item, shape


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {"llava": save_llava, "qwen": save_qwen, "onevision": save_onevision, "internvl": save_internvl}
    return {name: str(save(root / name)) for name, save in made.items()}


@pytest.fixture(scope="module")
def finished(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of a model that reads pictures at their own size."""
    out = tmp_path_factory.mktemp("run")
    bench.run(bench.Options(model=models["qwen"], specs=("divprune",), keeps=(0.5, 2), limit=12, repeats=2), out)
    return out


def asked(model: str, items: list[Item]) -> prompts.Asked:
    return prompts.Asked(*zoo.load(model), items, 4)


def pictures(*sizes: tuple[int, int]) -> list[Item]:
    """A question about each of some pictures."""
    first = next(scenes.questions("test"))
    return [replace(first, index=k, media=(first.image.resize(size),)) for k, size in enumerate(sizes)]


# ------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("most", [1, 2, 5, 16, 40, 64, 99])
@pytest.mark.parametrize("tokens", [64, 3, 1])
def test_the_largest_scale_within_the_budget_is_found(most: int, tokens: int) -> None:
    def count(scale: float) -> int:
        return max(2, int(tokens * scale**2))  # a floor, as processors have one

    found = downsample.search(count, most)
    bound = max(most, 2)
    assert count(found) <= bound
    assert found == 1 or count(found + 1 / downsample.STEPS) > bound


def test_budgets_are_those_of_compressors() -> None:
    cases = {(0.25, 64, 1): 16, (0.11, 256, 1): 28, (0.001, 64, 1): 1, (5, 64, 1): 5, (5, 64, 2): 10, (99, 64, 1): 64}
    assert {case: downsample.budget(*case) for case in cases} == cases


def test_pictures_and_clips_keep_their_shape() -> None:
    picture = Image.new("RGB", (200, 100))
    assert downsample.shrink(picture, 0.3).size == (60, 30)  # type: ignore[union-attr]
    clip = np.zeros((3, 100, 200, 3), np.uint8)
    assert shape(downsample.shrink(clip, 0.3)) == (3, 30, 60)
    assert downsample.shrink(clip, 1.0) is clip
    assert shape(downsample.shrink(picture, 0.001)) == (1, 1)


# ------------------------------------------------------------------------------------------------------ the prompts


def test_every_picture_has_its_own_scale(models: dict[str, str]) -> None:
    source = asked(models["qwen"], pictures((84, 84), (84, 28), (84, 84)))
    setting = bench.Setting("downsample", scaled=0.5)
    found = [source._as(setting, item) for item in source.items]
    assert [source.count(item) for item in source.items] == [9, 3, 9]
    assert [source.count(item) for item in found] == [4, 2, 4], "at most half, rounded"
    assert found[0].image.size == found[2].image.size < (84, 84)
    assert found[1].image.width == pytest.approx(3 * found[1].image.height, rel=0.1)
    rows = sorted(row for batch in source.batches(setting) for row in batch.rows)
    assert rows == [0, 1, 2]


def test_the_prompt_that_is_timed_is_of_the_usual_size(models: dict[str, str]) -> None:
    source = asked(models["qwen"], pictures((28, 28), (84, 84), (56, 56), (56, 56), (28, 56)))
    assert source._typical is source.items[2]
    assert source.one(bench.Setting("none"))["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert "image_grid_thw" not in source.one(bench.Setting("blind"))


def test_clips_need_a_model_that_takes_them(models: dict[str, str]) -> None:
    item = replace(next(scenes.questions("test")), media=(np.zeros((2, 56, 56, 3), np.uint8),))
    with pytest.raises(VtcError, match="takes pictures only: choose another --task"):
        asked(models["llava"], [item])
    assert asked(models["qwen"], [item]).one(bench.Setting("none"))["video_grid_thw"].tolist() == [[1, 4, 4]]


# ----------------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize(
    ("name", "media", "tokens"),
    [
        ("qwen", "clip", 2 * 4),
        ("onevision", "clip", 3 * 4 + 1),
        ("internvl", "clip", 3 * 4),
        ("qwen", "pictures", 4 + 2),
    ],
)
def test_questions_about_clips_and_several_pictures(
    name: str, media: str, tokens: int, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames may be visual inputs of their own, as in InternVL: tokens are those of the whole prompt."""
    first, second = (item.image for item in pictures((56, 56), (56, 28)))
    clip = np.stack([np.asarray(first), np.asarray(first)[::-1], np.asarray(first)])
    shown = (clip,) if media == "clip" else (first, second)
    asked = [replace(item, media=shown, index=0) for item in scenes.questions("test", 3)]
    monkeypatch.setattr(tasks, "questions", lambda task, split, limit: iter(asked))
    options = bench.Options(model=models[name], specs=("uniform:keep=2", "fastv:layer=1,keep=0.5"), latency=False)
    bench.run(options, tmp_path)
    run = report.load(tmp_path)
    rows = {row["spec"]: row for row in run.rows}
    inputs = {"clip": 3 if name == "internvl" else 1, "pictures": 2}[media]
    assert (rows["none"]["mean_tokens_out"], rows["uniform:keep=2"]["mean_tokens_out"]) == (tokens, 2 * inputs)
    assert {one["tokens_in"] for one in run.samples["uniform:keep=2"].values()} == {tokens}
    assert ("downsample:keep=2" in rows) is (name == "qwen")
    assert not any("grid" in one for samples in run.samples.values() for one in samples.values())
    assert "visual tokens" in report.report([tmp_path], "html")


def test_rows_have_measured_tokens(finished: Path) -> None:
    run = report.load(finished)
    rows = {row["spec"]: row for row in run.rows}
    full, half, two = rows["none"], rows["downsample:keep=0.5"], rows["downsample:keep=2"]
    assert (full["mean_tokens_in"], full["mean_tokens_out"]) == (9, 9)
    assert (half["mean_tokens_in"], half["mean_tokens_out"], half["tokens_out"]) == (9, 4, 4)
    assert two["mean_tokens_out"] <= 2
    assert half["sequence_in"] == full["sequence_in"] == half["sequence_out"] + 5
    assert full["encoder_flops"] > half["encoder_flops"] > two["encoder_flops"] > 0
    assert full["prefill_flops"] > half["prefill_flops"] and full["kv_cache_bytes"] > half["kv_cache_bytes"]
    assert min(row["ttft_ms"] for row in run.rows) > 0 and not full["remarks"]
    for row in run.rows:
        work = mean(sample["prefill_flops"] for sample in run.samples[row["spec"]].values())
        assert row["mean_prefill_flops"] == work
        assert row["prefill_flops_ratio"] == work / full["mean_prefill_flops"]
    for spec in ("downsample:keep=0.5", "divprune:keep=0.5", "blind"):
        for sample in run.samples[spec].values():
            assert sample["tokens_in"] == rows[spec]["mean_tokens_in"]
            assert sample["tokens_out"] == rows[spec]["mean_tokens_out"]


def test_scaling_changes_answers(finished: Path) -> None:
    rows = {row["spec"]: row for row in report.load(finished).rows}
    assert rows["downsample:keep=2"]["agreement"] < 1, "the model must notice, or this test says nothing"


def test_it_divides_the_questions(finished: Path) -> None:
    text = report.report([finished], "md")
    assert "Difficulty groups at keep 0.5, by downsample" in text and "9 → 4" in text


def test_what_a_processor_cannot_reach_is_told(models: dict[str, str], tmp_path: Path) -> None:
    """Crops: the smallest canvas has one, besides the thumbnail."""
    options = bench.Options(model=models["onevision"], specs=("uniform",), keeps=(0.9, 3), limit=3, latency=False)
    rows = {row["spec"]: row for row in bench.run(options, tmp_path)}
    least = rows["downsample:keep=3"]["mean_tokens_out"]
    assert 3 < least < rows["none"]["mean_tokens_out"]
    assert rows["none"]["remarks"] == [
        f"downsample: of {rows['none']['tokens_in']} visual tokens the processor leaves {least} at least, also of tiny "
        "pictures"
    ]


def test_towers_of_one_size_say_why_there_is_none(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--model", models["llava"], "--spec", "uniform", "--keep", "3", "--limit", "3", "--no-latency"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    why = f"no down-sampling baseline: llava makes {TOKENS} visual tokens of such a prompt, however small"
    assert sum(why in line for line in out.splitlines()) == 1
    assert "Difficulty groups at keep 3, by pool" in out
    assert not [row for row in report.load(tmp_path / "run").rows if row["strategy"] == "downsample"]
    for form in ("latex", "html"):
        assert why.replace("_", r"\_") in report.report([tmp_path / "run"], form)
    options = bench.Options(model=models["llava"], specs=("downsample",), limit=3)
    with pytest.raises(UnsupportedModelError, match="downsample: no down-sampling baseline: llava"):
        bench.run(options, tmp_path / "asked")


@pytest.mark.parametrize("name", zoo.names())
def test_bundled_models_run_their_own_task_end_to_end(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--model", name, "--spec", "divprune", "--keep", "0.25", "--limit", "24", "--no-latency"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    run = report.load(tmp_path)
    rows = {row["strategy"]: row for row in run.rows}
    assert tasks.TRAINED[rows["none"]["task"]] == name
    assert {"none", "blind", "divprune", "random", "uniform", "pool"} <= rows.keys()
    assert rows["none"]["accuracy"] > rows["blind"]["accuracy"]
    fixed = "downsample" not in rows
    assert ("no down-sampling baseline" in text) is fixed
    assert f"Difficulty groups at keep 0.25, by {'pool' if fixed else 'downsample'}" in text
    if not fixed:
        assert rows["downsample"]["mean_tokens_out"] < rows["none"]["mean_tokens_out"]


def plan(*specs: str, **options: Any) -> list[str]:
    return [setting.spec for setting in bench.settings(bench.Options(specs=specs, **options))]


def test_it_may_be_asked_for_by_name() -> None:
    found = plan("downsample", keeps=(0.5, 9))
    assert found[-2:] == ["downsample:keep=0.5", "downsample:keep=9"] and "pool:keep=9" in found
    found = plan("downsample:keep=7", "uniform:keep=3", keeps=(0.5,))
    assert {spec.partition(":")[2] for spec in found if spec.startswith(("downsample", "pool"))} == {"keep=7", "keep=3"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("downsample:keep=0", "at least 1 token"),
        ("downsample:seed=3", "all that can be set is keep"),
        ("downsample:keep=half", "keep"),
        ("downsample:keep=0.5+fastv", "downsample is no compressor"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        plan(spec)
