"""`vtc eval`: batches, costs, resuming, failures, videos; and with lmms-eval installed, the plug-in.

lmms-eval is no part of the development environment: it brings some eighty packages. Tests that need it are skipped
without it; `pip install torch==2.13.0 "vtc[lmms]"` installs it.
"""
# ruff: noqa: E402

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtc.zoo import torchvision

torchvision.mend()  # before transformers is imported, which imports it: lmms-eval brings one

import vtc
from checkpoints import TOKENS, save_llava
from vtc import cli, zoo
from vtc.errors import VtcError
from vtc.eval import accuracy, flops, scenes, tasks
from vtc.eval.bench import Options
from vtc.eval.items import Item
from vtc.eval.lmms import answering, clips, export, record, run
from vtc.eval.lmms.answering import Answerer, Prompt, Question, make_answerer
from vtc.eval.lmms.record import Failed, Record

HAS_LMMS = importlib.util.find_spec("lmms_eval") is not None
needs_lmms = pytest.mark.skipif(not HAS_LMMS, reason='lmms-eval is not installed: pip install "vtc[lmms]"')
SPECS = ("none", "fastervlm:keep=5", "pool:keep=4", "fastv:keep=3,layer=1", "uniform:keep=8+fastv:keep=3,layer=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(scenes.questions("test", 7))


def ask(number: int, pictures: list[Any], text: str, **generation: Any) -> Question:
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    prompt = Prompt([{"role": "user", "content": content}], pictures)
    return Question(("task", "test", number, 0), lambda: prompt, {"max_new_tokens": 6, **generation}, text)


@pytest.fixture(scope="module")
def mixed(items: list[Item]) -> list[Question]:
    """Prompts of several lengths with no picture, one and two, of which some ask for shorter answers."""
    images = [item.image for item in items]
    return [
        ask(0, images[:1], "What digit is red?"),
        ask(1, [], "Is there a blue star?"),
        ask(2, images[1:3], "What colour is the ring in the first picture, and what in the second?"),
        ask(3, images[3:4], "Which shape is left of the star?"),
        ask(4, images[4:5], "Where?", max_new_tokens=2),
        ask(5, images[5:7], "What word is it?"),
        ask(6, [], "How many?", max_new_tokens=2),
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_batches_answer_like_single_questions(spec: str, folder: Path, mixed: list[Question]) -> None:
    alone = make_answerer(Options(model=str(folder), batch_size=1), spec).answer(mixed, Record(None))
    together = make_answerer(Options(model=str(folder), batch_size=4), spec).answer(mixed, Record(None))
    assert {row["batch"] for row in alone} == {1} and {row["batch"] for row in together} == {1, 2}
    for one, other in zip(alone, together, strict=True):
        assert {name for name in one if one[name] != other[name]} <= {"batch", "prepare_ms", "ttft_ms", "generate_ms"}
    assert [row["doc_id"] for row in together] == list(range(7))
    assert len({row["answer"] for row in alone}) > 3, "answers depend on the questions"


@pytest.mark.parametrize(("spec", "left"), list(zip(SPECS, ((16, 16), (5, 5), (4, 4), (16, 3), (8, 3)), strict=True)))
def test_costs_are_those_of_the_row(spec: str, left: tuple[int, int], folder: Path, mixed: list[Question]) -> None:
    """Counted here from the number of pictures, the tokenizer and the budget; `left` is per picture and layer."""
    answerer = make_answerer(Options(model=str(folder), batch_size=4), spec)
    config = answerer.model.config.text_config
    for question, row in zip(mixed, answerer.answer(mixed, Record(None)), strict=True):
        prompt = question.load()
        text = answering.render(answerer.processor, prompt.messages).replace("<image>", "")
        words, pictures = len(answerer.processor.tokenizer(text)["input_ids"]), len(prompt.images)
        lengths = [words + pictures * tokens for tokens in left]
        assert (row["visual_tokens_in"], row["visual_tokens_out"]) == (pictures * TOKENS, pictures * left[1])
        assert (row["input_tokens_in"], row["input_tokens"]) == (words + pictures * TOKENS, lengths[1])
        assert row["prefill_flops"] == flops.prefill_flops(config, lengths)
        assert row["prefill_flops_in"] == flops.prefill_flops(config, words + pictures * TOKENS)
        assert 0 < row["ttft_ms"] <= row["generate_ms"]


@pytest.mark.parametrize("spec", ["none", "uniform:keep=4", "pool:keep=4,positions=contiguous"])
def test_likelihoods_of_given_answers(spec: str, folder: Path, items: list[Item]) -> None:
    rows = judged(folder, spec, items)
    assert {row["visual_tokens_out"] for row in rows} == {16 if spec == "none" else 4}


def judged(folder: Path, spec: str, items: list[Item]) -> list[dict[str, Any]]:
    """Rows of given answers, compared with one forward pass over prompt and answer, without a cache."""
    answerer = make_answerer(Options(model=str(folder), batch_size=4), spec)
    model, tokenizer = answerer.model, answerer.processor.tokenizer
    choices = ("red", "top-left", "red square above", "how many circles")
    asked = [
        replace(ask(0, [items[0].image], "What digit is red?"), key=("task", "test", 0, number), choice=choice)
        for number, choice in enumerate(choices)
    ]
    rows = answerer.answer(asked, Record(None))
    losses = []
    for question, row in zip(asked, rows, strict=True):
        words = tokenizer(question.choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
        inputs = answerer.inputs([answerer.load(question)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], words], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, words.shape[1]))
        with torch.no_grad(), vtc.compress(model, spec):
            logits = model(**inputs, use_cache=False).logits[0, -words.shape[1] - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, words[0][:, None])
        losses.append(-chosen.mean().item())
        assert row["loss"] == pytest.approx(losses[-1], rel=1e-5)
        assert row["greedy"] == bool((logits.argmax(-1) == words[0]).all())
        assert row["output_tokens"] == words.shape[1] and row["answer"] == question.choice
    assert len({round(loss, 3) for loss in losses}) == len(choices)
    return rows


def test_what_the_model_would_say_is_greedy(folder: Path, mixed: list[Question]) -> None:
    answerer = make_answerer(Options(model=str(folder)), "fastv:keep=3,layer=1")
    said = answerer.answer(mixed[:1], Record(None))[0]["answer"]
    (same,) = answerer.answer([replace(mixed[0], choice=said)], Record(None))
    (other,) = answerer.answer([replace(mixed[0], choice=f"cat {said}")], Record(None))
    assert said and same["greedy"] and not other["greedy"]
    with pytest.raises(Failed, match="has no tokens"):
        answerer.answer([replace(mixed[0], choice="")], Record(None))


def test_tokens_of_answers_count_up_to_the_end(folder: Path) -> None:
    answerer = make_answerer(Options(model=str(folder)), "none")
    end = answerer.model.generation_config.eos_token_id
    assert answerer._lengths(torch.tensor([[9, 8, end, 0], [9, 8, 7, 6], [end, end, 0, 0]])) == [3, 4, 1]


def test_the_model_is_as_it_was(folder: Path, mixed: list[Question]) -> None:
    plain = make_answerer(Options(model=str(folder)), "none")
    compressed = Answerer(plain.model, plain.processor, answering.parse("uniform:keep=1"))
    before, between, after = (one.answer(mixed, Record(None)) for one in (plain, compressed, plain))
    assert [one["answer"] for one in before] == [one["answer"] for one in after]
    assert [one["answer"] for one in before] != [one["answer"] for one in between]


def test_what_tasks_ask_of_generate() -> None:
    greedy = answering.generation({"max_new_tokens": 3, "temperature": 0, "do_sample": True, "top_p": 0.5})
    assert greedy == {"max_new_tokens": 3, "num_beams": 1, "do_sample": False}
    sampled = answering.generation({"temperature": 0.7, "top_p": 0.5, "image_aspect_ratio": "pad", "until": ["x"]})
    assert sampled == {"max_new_tokens": 1024, "num_beams": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.5}
    assert answering.generation({"temperature": 0.7, "do_sample": False})["do_sample"] is False
    assert answering.cut("red\n\nand more. Yes", ["", ".", "\n\n"]) == "red"
    assert answering.cut("red", []) == "red"


def test_prompts_without_a_template_are_those_of_the_bench(items: list[Item]) -> None:
    class Processor:
        chat_template = None
        image_token = "<image>"

    question = ask(0, [items[0].image], "Where?").load()
    assert answering.render(Processor(), question.messages) == accuracy.prompt(Processor(), "Where?")
    with pytest.raises(VtcError, match="no placeholder for videos"):
        answering.render(Processor(), [{"content": [{"type": "video"}]}])


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_question_that_raises_has_no_answer_and_the_others_do(
    folder: Path, mixed: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Prompt:
        sys.exit("video is missing")  # as some tasks of lmms-eval do

    answerer = make_answerer(Options(model=str(folder), batch_size=4), "uniform:keep=4")
    broken = [*mixed, Question(("task", "test", 7, 0), missing, {"max_new_tokens": 6})]
    generate, calls = answerer.model.generate, []

    def fragile(**inputs: Any) -> Any:
        """Has memory for one prompt with one picture."""
        calls.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 1 or len(inputs.get("pixel_values", ())) > 1:
            raise torch.OutOfMemoryError("too much")
        return generate(**inputs)

    monkeypatch.setattr(answerer.model, "generate", fragile)
    with Record(tmp_path) as kept, pytest.raises(Failed) as caught:
        answerer.answer(broken, kept)
    failed = {failure.key[2]: failure.error for failure in caught.value.failures}
    assert failed == {
        2: "OutOfMemoryError: too much",
        5: "OutOfMemoryError: too much",
        7: "SystemExit: video is missing",
    }
    assert sorted(row["doc_id"] for row in record.read_answers(tmp_path).values()) == [0, 1, 3, 4, 6]
    assert max(calls) > 1, "a batch failed, and its questions were asked one by one"


@pytest.mark.parametrize("batch_size", [1, 20])
def test_when_nothing_works_it_gives_up(batch_size: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = make_answerer(Options(model=str(folder), batch_size=batch_size), "none")
    asked = []
    monkeypatch.setattr(answerer.model, "generate", lambda **inputs: asked.append(1) or 1 / 0)
    with pytest.raises(Failed, match="ZeroDivisionError"):
        answerer.answer([ask(number, [], "Where?") for number in range(50)], Record(None))
    assert len(asked) == record.MAX_FAILURES + (batch_size > 1)


# ---------------------------------------------------------------------------------------------------------- resuming


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"task": "task", "split": "test", "doc_id": number, "repeat": 0, "answer": "red", "digest": "d", **more}


def test_a_killed_run_goes_on_without_counting_twice(folder: Path, mixed: list[Question], tmp_path: Path) -> None:
    whole = make_answerer(Options(model=str(folder)), "pool:keep=4").answer(mixed, Record(None))
    answerer = make_answerer(Options(model=str(folder)), "pool:keep=4")
    with Record(tmp_path) as kept:
        answerer.answer(mixed[:3], kept)
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"task": "task", "split": "te')  # killed while writing
    generated = []
    generate = answerer.model.generate
    answerer.model.generate = lambda **inputs: generated.append(1) or generate(**inputs)
    with Record(tmp_path) as kept:
        rows = answerer.answer(mixed, kept)
    assert len(generated) == len(mixed) - 3
    assert [one["answer"] for one in rows] == [one["answer"] for one in whole]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["doc_id"] for line in lines) == list(range(len(mixed)))


def test_answers_of_all_processes_are_read(tmp_path: Path) -> None:
    for rank, numbers in enumerate(((0, 2), (1, 2))):
        with Record(tmp_path, rank) as kept:
            kept.add([row(number) for number in numbers])
    (tmp_path / "answers-2.jsonl").write_text('{"task"')
    assert sorted(key[2] for key in record.read_answers(tmp_path)) == [0, 1, 2]


@pytest.mark.parametrize("line", ["{}", "[1]", "not JSON", '{"task": "task"', "1"])
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "answers-0.jsonl").write_text(f"{json.dumps(row(0))}\n{line}\n{json.dumps(row(1))}\n")
    with pytest.raises(VtcError, match=r"answers-0.jsonl, line 2 is not an answer.*--overwrite"):
        Record(tmp_path)


def test_another_question_under_the_same_number_is_refused(tmp_path: Path, items: list[Item]) -> None:
    first, second = ask(0, [], "What digit is red?"), ask(0, [], "What digit is blue?")
    kept = Record(tmp_path)
    kept.add([row(0, digest=first.digest)])
    assert kept.known(first.key, first.digest) is not None
    with pytest.raises(VtcError, match="asks something else"):
        kept.known(second.key, second.digest)
    assert ask(0, [], "What digit is red?", temperature=1).digest != first.digest


# ------------------------------------------------------------------------------------------------------------ videos


def test_frames_are_spread_evenly() -> None:
    assert clips.spread(10, 4) == (0, 3, 6, 9)
    assert clips.spread(3, 8) == (0, 1, 2)
    assert clips.spread(300, 1) == (0,)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Twenty frames, each of one grey: frame n is 12 n."""
    av = pytest.importorskip("av", reason="PyAV, which writes the video, is not installed")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 12 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("reader", clips.READERS)
def test_readers_give_the_frames_that_were_asked_for(reader: str, video: Path) -> None:
    if not clips._installed(reader):
        pytest.skip(f"{reader} is not installed")
    clip = clips.read(str(video), 4, reader)
    assert clip.frames.shape == (4, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.indices == (0, 6, 12, 19) and clip.total == 20 and clip.fps == 10
    assert np.allclose(clip.frames.mean((1, 2, 3)), [12 * n for n in clip.indices], atol=4)


@pytest.fixture(scope="module", params=["onevision", "qwen", "internvl"])
def film_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torchvision", reason="torchvision, which processors of clips need, is not installed")
    import video_checkpoints

    return getattr(video_checkpoints, f"save_{request.param}")(tmp_path_factory.mktemp("films") / request.param)


@pytest.mark.parametrize("spec", ["none", "uniform:keep=4", "uniform:keep=6+fastv:keep=3,layer=1"])
def test_batches_with_clips_answer_like_single_questions(spec: str, film_model: Path, items: list[Item]) -> None:
    images = [item.image for item in items]
    noise = np.random.default_rng(0)
    asked = []
    shown: list[tuple[list[Any], list[int]]] = [
        *((images[:1], []), (images[1:2], []), ([], []), (images[2:4], []), (images[4:6], [])),
        *(([], [4]), ([], [4]), ([], [6]), (images[:1], [4]), (images[1:2], [4])),
    ]
    for number, (pictures, lengths) in enumerate(shown):
        films = [noise.integers(0, 255, (length, 56, 84, 3), dtype=np.uint8) for length in lengths]
        content = [*({"type": "image"} for _ in pictures), *({"type": "video"} for _ in films)]
        text = items[number % len(items)].question
        prompt = Prompt([{"role": "user", "content": [*content, {"type": "text", "text": text}]}], pictures, films)
        asked.append(Question(("task", "test", number, 0), partial(copy, prompt), {"max_new_tokens": 5}, text))
    alone = make_answerer(Options(model=str(film_model), batch_size=1), spec).answer(asked, Record(None))
    together = make_answerer(Options(model=str(film_model), batch_size=10), spec).answer(asked, Record(None))
    assert [one["batch"] for one in together] == [2, 2, 1, 2, 2, 2, 2, 1, 2, 2]
    for one, other in zip(alone, together, strict=True):
        assert {name for name in one if one[name] != other[name]} <= {"batch", "prepare_ms", "ttft_ms", "generate_ms"}
    if spec != "none":
        keep = 3 if "+" in spec else 4
        # Frames are images to an InternVL.
        more = [sum(lengths) if film_model.name == "internvl" else len(lengths) for _, lengths in shown]
        left = [keep * (len(pictures) + count) for (pictures, _), count in zip(shown, more, strict=True)]
        assert [one["visual_tokens_out"] for one in together] == left


def test_arrays_are_clips_too() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    clip = clips.read(frames, 2)
    assert clip.frames is frames and clip.indices == (0, 1, 2) and clip.fps is None
    with pytest.raises(VtcError, match=r"\(T, H, W, 3\)"):
        clips.read(np.zeros((8, 8, 3)), 2)


def test_what_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VtcError, match="did you mean 'decord'"):
        clips.read("clip.mp4", 4, "decort")
    monkeypatch.setattr(clips, "_installed", lambda reader: reader == "pyav")
    with pytest.raises(VtcError, match="decord is not installed"):
        clips.read("clip.mp4", 4, "decord")
    with pytest.raises(VtcError, match="there is no video file"):
        clips.read(str(tmp_path / "clip.mp4"), 4)
    monkeypatch.setattr(clips, "_installed", lambda reader: False)
    with pytest.raises(VtcError, match="no video reader is installed"):
        clips.read("clip.mp4", 4)


def test_a_file_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("not a video")
    try:
        reader = clips.choose()
    except VtcError:
        pytest.skip("no video reader is installed")
    with pytest.raises(VtcError, match=f"{reader} cannot read"):
        clips.read(str(tmp_path / "clip.mp4"), 4)


# ------------------------------------------------------------------------------------------------------ command line


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `vtc eval`."""
    capsys.readouterr()
    try:
        code = cli.main(["eval", *map(str, arguments)])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("spec", ["none", "fastervlm:keep=64"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scenes_score_as_in_the_bench(
    spec: str, batch_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list(scenes.questions("test", 12))
    arguments = ("--tasks", "scenes", "--limit", len(asked), "--spec", spec, "--batch-size", batch_size)
    code, out, _ = command(capsys, *arguments, "--out", tmp_path)
    assert code == 0 and "exact_match" in out
    given, expected = bench_accuracy(spec, asked)
    rows = lines_of(tmp_path / "documents.jsonl")
    assert [accuracy.normalise(one["answer"]) for one in rows] == given
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tasks"]["scenes"]["exact_match"] == expected
    assert {one["visual_tokens_out"] for one in rows} == {256 if spec == "none" else 64}
    assert {"device", "dtype", "attention", "versions", "settings"} <= set(results)


def bench_accuracy(spec: str, asked: list[Item], model_name: str = "tiny-llava") -> tuple[list[str], float]:
    """Answers and accuracy of a bundled model by the way of `vtc bench`."""
    model, processor = zoo.load(model_name)
    with vtc.compress(model, spec):
        prepared = accuracy.batches(processor, asked, 50)
        given = accuracy.answer(model, processor, prepared, accuracy.longest_answer(processor, asked))
    return given, accuracy.score(given, asked)[0].accuracy


def test_eval_goes_on_and_refuses_another_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "results"
    base = ("--model", folder, "--tasks", "scenes", "--out", out)
    assert command(capsys, *base, "--limit", 3, "--spec", "uniform:keep=4")[0] == 0
    before = lines_of(out / "documents.jsonl")
    assert command(capsys, *base, "--limit", 6, "--spec", "uniform:keep=4", "--batch-size", 2)[0] == 0
    after = lines_of(out / "documents.jsonl")
    assert after[:3] == before, "times included: they were not asked again"
    assert [one["doc_id"] for one in after] == list(range(6))
    code, _, err = command(capsys, *base, "--limit", 6, "--spec", "uniform:keep=5")
    assert code == 2 and "spec was uniform:keep=4 and is uniform:keep=5" in err and "--overwrite" in err
    assert command(capsys, *base, "--limit", 2, "--spec", "uniform:keep=5", "--overwrite")[0] == 0
    assert [one["visual_tokens_out"] for one in lines_of(out / "documents.jsonl")] == [5, 5]


def test_failures_are_listed_and_the_exit_code_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("--model", folder, "--tasks", "scenes", "--limit", 4, "--out", tmp_path)
    generate = Answerer._generate

    def broken(self: Any, batch: Any, session: Any) -> Any:
        if batch[0].question.key[2] == 2:
            raise RuntimeError("no\nmemory")
        return generate(self, batch, session)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "_generate", broken)
        code, out, err = command(capsys, *base)
    assert code == 1 and not out
    assert "scenes, document 2: RuntimeError: no memory" in err and "1 questions have no answer" in err
    assert [one["doc_id"] for one in lines_of(tmp_path / "failures.jsonl")] == [2]
    assert not (tmp_path / "results.json").exists(), "three of four answers make no accuracy"
    assert command(capsys, *base)[0] == 0
    assert len(lines_of(tmp_path / "documents.jsonl")) == 4 and not (tmp_path / "failures.jsonl").exists()


BASE = ("--tasks", "scenes", "--out", "{root}/new")
BAD_INPUT = {
    "no task": (("--out", "{root}/new"), "--tasks names no task"),
    "no folder": (("--tasks", "scenes"), "--out DIR is missing"),
    "limit of zero": ((*BASE, "--limit", "0"), "use at least 1"),
    "batches of nothing": ((*BASE, "--batch-size", "0"), "use at least 1"),
    "clips of nothing": ((*BASE, "--frames", "0"), "use at least 1"),
    "unknown reader": ((*BASE, "--reader", "decort"), "did you mean 'decord'?"),
    "unknown strategy": ((*BASE, "--spec", "fastvlm"), "did you mean 'fastervlm'?"),
    "unknown model": ((*BASE, "--model", "tiny-lava"), "no bundled model and no checkpoint folder"),
    "more than there is": ((*BASE, "--spec", "uniform:keep=999"), "use at most 256"),
    "need the tower cannot meet": ((*BASE, "--model", "{root}/siglip", "--spec", "fastervlm"), "received"),
    "unknown device": ((*BASE, "--device", "abacus"), "use one of: cpu"),
    "clips for a model of pictures": (("--tasks", "clips", *BASE[2:], "--limit", "2"), "takes pictures only"),
    "a file for a folder": ((*BASE, "--out", "{root}/notes.txt"), "give a folder"),
    "no such tasks": ((*BASE, "--include-path", "{root}/nothing"), "there is no such folder"),
    "answers of nobody": ((*BASE, "--out", "{root}/stray"), "no run.json"),
    "a truncated note": ((*BASE, "--out", "{root}/truncated"), "run.json is not readable"),
    "export to a file": (("--export", "{root}/notes.txt"), "give a folder"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    save_llava(root / "siglip", "siglip")
    (root / "notes.txt").write_text("no folder")
    for name in ("stray", "truncated"):
        (root / name).mkdir()
        (root / name / "answers-0.jsonl").write_text(json.dumps(row(0)) + "\n")
    (root / "truncated" / "run.json").write_text('{"spec": "no')
    return root


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD_INPUT[name]
    code, out, err = command(capsys, *(argument.format(root=root) for argument in arguments))
    assert code == 2 and not out
    assert err.startswith("vtc: error: ") and err.count("\n") == 1, err
    assert expected in err
    assert not (root / "new").exists()


@pytest.mark.skipif(HAS_LMMS, reason="lmms-eval is installed")
def test_without_lmms_eval_the_extra_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "--tasks", "mme", "--out", tmp_path / "new")
    assert code == 2 and 'pip install "/path/to/vtc[lmms]"' in err and not (tmp_path / "new").exists()
    assert "'mme' is not bundled (scenes, posters, clips, sizes)" in err


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 90
    assert "example" in out and "accelerate launch" in out


def test_scores_of_filters_and_of_dictionaries() -> None:
    scores = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc,strict": 0.25, "f1,none": "N/A"}
    assert run.plain(scores) == {"acc": 0.5, "acc_stderr": 0.1, "acc (strict)": 0.25}
    assert run.scores_of({**run.plain(scores), "n": 3, "ttft_ms": 1.0}) == {"acc": 0.5, "acc (strict)": 0.25}
    assert run.numbers({"doc_id": 3, "target": 1, "acc": 1.0, "mme": {"score": 0.5, "id": "x"}, "resps": [1]}) == {
        "acc": 1.0,
        "mme": 0.5,
    }


# ------------------------------------------------------------------------------------------------------ torchvision

TORCHVISION = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
"""
MEND = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import torchvision
except RuntimeError as error:
    print(error)
from vtc.zoo.torchvision import mend
print(mend(), mend())
import torch, torchvision
print(torchvision.nms.__name__, torch.ops.torchvision.nms)
"""


def test_a_torchvision_for_another_torch_is_mended(tmp_path: Path) -> None:
    """Such a one declares what it knows about operators that its compiled part, which does not load, would define."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(TORCHVISION)
    done = subprocess.run([sys.executable, "-c", MEND, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "operator torchvision::nms does not exist",
        "True False",
        "nms torchvision.nms",
    ]


@pytest.mark.parametrize("content", ["", "raise RuntimeError('something else')"])
def test_any_other_torchvision_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(content)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from vtc.zoo.torchvision import mend; print(mend())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert (done.stdout == "False\n") if not content else ("something else" in done.stderr)


# -------------------------------------------------------------------------------------------------- with lmms-eval


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Python in a process of its own: importing lmms-eval changes settings of many libraries."""
    caches = {"HF_HOME": str(tmp_path_factory.mktemp("caches")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def call(*arguments: Any, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **caches, **more},
        )

    return call


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield export.export(tmp_path_factory.mktemp("task"), 16)


@needs_lmms
@pytest.mark.parametrize("spec", ["none", "fastervlm:keep=64"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("form", [(), ("--simple",)])
def test_both_ways_give_the_same_accuracy(
    spec: str, batch_size: int, form: tuple[str, ...], task: Path, tmp_path: Path, outside: Any
) -> None:
    asked = list(scenes.questions("test", 16))
    arguments = ("--tasks", "vtc_scenes", "--include-path", task, "--spec", spec, "--batch-size", batch_size, *form)
    done = outside("-m", "vtc", "eval", *arguments, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    given, expected = bench_accuracy(spec, asked)
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]["vtc_scenes"]
    rows = lines_of(tmp_path / "documents.jsonl")
    assert [accuracy.normalise(one["answer"]) for one in rows] == given
    assert (found["exact_match"], found["n"]) == (expected, len(asked))
    assert sum(one["exact_match"] for one in rows) / len(rows) == expected
    assert {(one["visual_tokens_in"], one["visual_tokens_out"]) for one in rows} == {
        (256, 256 if spec == "none" else 64)
    }


@needs_lmms
@pytest.mark.parametrize("name", [name for name in tasks.names() if name != "scenes"])
def test_both_ways_agree_on_every_bundled_task(name: str, tmp_path: Path, outside: Any) -> None:
    asked, model, spec = list(tasks.questions(name, "test", 12)), tasks.TRAINED[name], "divprune:keep=0.25"
    folder = export.export(tmp_path / "task", len(asked), [name])
    arguments = ("--model", model, "--tasks", f"vtc_{name}", "--include-path", folder, "--spec", spec, "--frames", 32)
    done = outside("-m", "vtc", "eval", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    given, expected = bench_accuracy(spec, asked, model)
    assert [accuracy.normalise(one["answer"]) for one in lines_of(tmp_path / "out" / "documents.jsonl")] == given
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"][f"vtc_{name}"]
    assert (found["exact_match"], found["n"]) == (expected, len(asked))


@needs_lmms
def test_lmms_eval_finds_the_plug_in(task: Path, tmp_path: Path, outside: Any) -> None:
    """Its own command line, through the entry point. It imports torchvision, which has to be whole, or mended."""
    mended = "from vtc.zoo import torchvision; torchvision.mend(); from lmms_eval.__main__ import cli_evaluate as run"
    arguments = ["--model", "vtc_hf", "--tasks", "vtc_scenes", "--include_path", task, "--batch_size", "2"]
    arguments += ["--device", "cpu", "--limit", "4", "--output_path", tmp_path, "--log_samples", "--model_args"]
    given = f'pretrained=tiny-llava,spec="uniform:keep=9,positions=original",out={tmp_path / "answers"}'
    done = outside("-c", f"{mended}; run()", *arguments, given)
    (path,) = tmp_path.rglob("*_samples_vtc_scenes.jsonl")
    samples = lines_of(path)
    assert len(samples) == 4, done.stderr
    with_words = [accuracy.prompt(zoo.load("tiny-llava")[1], item.question) for item in scenes.questions("test", 4)]
    tokenizer = zoo.load("tiny-llava")[1].tokenizer
    lengths = [len(tokenizer(text.replace("<image>", ""))["input_ids"]) + 9 for text in with_words]
    assert [sample["token_counts"][0]["input_tokens"] for sample in samples] == lengths
    kept = record.read_answers(tmp_path / "answers").values()
    assert sorted(one["input_tokens"] for one in kept) == sorted(lengths)
    again = outside("-c", f"{mended}; run()", *arguments, given.replace("keep=9", "keep=8"))
    assert "spec was uniform:keep=9" in again.stdout + again.stderr, "answers of another spec are not taken"


@needs_lmms
@pytest.mark.parametrize(
    ("task_file", "name", "message"),
    [
        ("", "vtc_scene", "did you mean 'vtc_scenes'?"),
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: nothing.jsonl}}\n", "mine", "nothing.jsonl"),
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: short.jsonl}}\n", "mine", "cannot prepare mine"),
    ],
    ids=["unknown task", "missing data", "truncated data"],
)
def test_bad_tasks_are_one_line(
    task_file: str, name: str, message: str, task: Path, tmp_path: Path, outside: Any
) -> None:
    (tmp_path / "short.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "ans')
    if task_file:
        (tmp_path / "utils.py").write_text(export.UTILS)
        body = (task / "vtc_scenes.yaml").read_text().partition("test_split")[2]
        (tmp_path / "mine.yaml").write_text(f"task: mine\n{task_file}test_split{body}")
    arguments = ("--tasks", name, "--include-path", task, "--include-path", tmp_path, "--out", tmp_path / "new")
    done = outside("-m", "vtc", "eval", *arguments)
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vtc: error: ") and message in last, done.stderr
    assert "Traceback" not in done.stderr


BREAK = """
import sys
from vtc.zoo import torchvision
torchvision.mend()
from vtc.eval.lmms.answering import Answerer
generate = Answerer._generate
def broken(self, batch, session):
    if batch[0].question.key[2] == 5:
        {action}
    return generate(self, batch, session)
Answerer._generate = broken
from vtc.cli import main
sys.exit(main())
"""


@needs_lmms
@pytest.mark.parametrize(("action", "code"), [("raise RuntimeError('no memory')", 1), ("import os; os._exit(9)", 9)])
def test_lmms_eval_scores_nothing_until_all_is_answered(
    action: str, code: int, task: Path, tmp_path: Path, outside: Any
) -> None:
    arguments = ("eval", "--tasks", "vtc_scenes", "--include-path", task, "--limit", 8, "--out", tmp_path)
    done = outside("-c", BREAK.format(action=action), *arguments)
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "results.json").exists()
    before = record.read_answers(tmp_path)
    assert len(before) == (7 if code == 1 else 5)
    if code == 1:
        assert "vtc_scenes, document 5: RuntimeError: no memory" in done.stderr
    done = outside("-m", "vtc", *arguments)
    assert done.returncode == 0, done.stderr
    after = record.read_answers(tmp_path)
    assert {key: after[key] for key in before} == before, "answers that were there were not asked for again"
    assert [one["doc_id"] for one in lines_of(tmp_path / "documents.jsonl")] == list(range(8))
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["vtc_scenes"]["n"] == 8


@needs_lmms
@pytest.mark.parametrize("name", ["scenes", "vtc_scenes"])
def test_two_processes_answer_like_one(name: str, task: Path, tmp_path: Path, outside: Any) -> None:
    arguments = ("eval", "--tasks", name, "--include-path", task, "--limit", 7, "--spec", "uniform:keep=16")
    single = outside("-m", "vtc", *arguments, "--out", tmp_path / "one")
    assert single.returncode == 0, single.stderr
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "vtc")
    double = outside(*launch, *arguments, "--out", tmp_path / "two", ACCELERATE_USE_CPU="true")
    assert double.returncode == 0, double.stderr
    timed = {"prepare_ms", "ttft_ms", "generate_ms"}
    one, two = (
        [
            {key: value for key, value in line.items() if key not in timed}
            for line in lines_of(tmp_path / part / "documents.jsonl")
        ]
        for part in ("one", "two")
    )
    assert one == two and len(one) == 7
    assert [len(record.read_lines(tmp_path / "two" / f"answers-{rank}.jsonl")) for rank in (0, 1)] == [4, 3]
    scores = [json.loads((tmp_path / part / "results.json").read_text())["tasks"][name] for part in ("one", "two")]
    assert scores[0]["exact_match"] == scores[1]["exact_match"] and scores[1]["n"] == 7


@pytest.mark.parametrize("spec", ["none", "uniform:keep=4"])
def test_likelihoods_on_other_families(spec: str, film_model: Path, items: list[Item]) -> None:
    judged(film_model, spec, items)


FILMS = """\
from vtc.eval.lmms.export import doc_to_text, mean, process_results

def doc_to_visual(doc):
    return [doc["video"]]
"""


@needs_lmms
@pytest.mark.parametrize("form", [(), ("--simple",)])
def test_videos_through_lmms_eval(
    form: tuple[str, ...], film_model: Path, video: Path, task: Path, tmp_path: Path, outside: Any
) -> None:
    documents = [{"question": question, "answer": "red", "video": str(video)} for question in ("Where?", "What digit?")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (tmp_path / "utils.py").write_text(FILMS)
    body = (task / "vtc_scenes.yaml").read_text().replace(str(task / "scenes-test.jsonl"), str(tmp_path / "test.jsonl"))
    (tmp_path / "films.yaml").write_text(body.replace("vtc_scenes", "films"))
    arguments = ("--model", film_model, "--tasks", "films", "--include-path", tmp_path, "--batch-size", 2, *form)
    done = outside(
        "-m", "vtc", "eval", *arguments, "--frames", 6, "--spec", "uniform:keep=4", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    answerer = make_answerer(Options(model=str(film_model)), "uniform:keep=4", frames=6)
    content = [{"type": "video"}, {"type": "text", "text": "Where?"}]
    prompt = Prompt([{"role": "user", "content": content}], [], [str(video)])
    (mine,) = answerer.answer([Question(("films", "test", 0, 0), lambda: prompt, export.GENERATION)], Record(None))
    rows = lines_of(tmp_path / "out" / "documents.jsonl")
    left = 4 * (6 if film_model.name == "internvl" else 1)
    assert [one["batch"] for one in rows] == [2, 2] and [one["visual_tokens_out"] for one in rows] == [left, left]
    same = ("answer", "visual_tokens_in", "input_tokens_in", "input_tokens", "prefill_flops", "output_tokens")
    assert [rows[0][name] for name in same] == [mine[name] for name in same]


CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: test.jsonl
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
doc_to_choice: ["red", "green", "yes", "no", "circle", "3"]
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@needs_lmms
def test_multiple_choice_through_lmms_eval(task: Path, tmp_path: Path, outside: Any) -> None:
    choices = ("red", "green", "yes", "no", "circle", "3")
    documents = [one for one in lines_of(task / "scenes-test.jsonl") if one["answer"] in choices]
    assert len(documents) >= 3
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (tmp_path / "utils.py").write_text(export.UTILS)
    (tmp_path / "choice.yaml").write_text(CHOICE.replace("test.jsonl", str(tmp_path / "test.jsonl")))
    arguments = ("--tasks", "choice", "--include-path", tmp_path, "--spec", "fastervlm:keep=64", "--simple")
    done = outside("-m", "vtc", "eval", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = lines_of(tmp_path / "out" / "documents.jsonl")
    right = []
    for number, document in enumerate(documents):
        mine = {one["answer"]: one["loss"] for one in rows if one["doc_id"] == number}
        assert set(mine) == set(choices)
        right.append(min(mine, key=mine.__getitem__) == document["answer"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["choice"]
    assert (found["acc"], found["n"]) == (sum(right) / len(right), len(documents)) and found["acc"] > 0.5
    chat = outside("-m", "vtc", "eval", *arguments[:-1], "--out", tmp_path / "chat")
    assert chat.returncode == 2 and "cannot prepare choice" in chat.stderr.splitlines()[-1]
