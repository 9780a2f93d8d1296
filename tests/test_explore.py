"""`vtc explore`: what it answers, what it refuses, and the page itself in a real browser where there is one.

The page needs gradio, and Chromium with its driver (Debian's packages are chromium and chromium-driver); without them
its tests are skipped.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import browser
import vtc
from checkpoints import TOKENS, save_llava
from vtc import cli
from vtc.errors import VtcError
from vtc.eval import accuracy, explore, explore_files, explore_html, scenes
from vtc.eval.bench import Options
from vtc.eval.lmms.clips import Clip

QUESTION = "Which shape is red?"
NASTY = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> explore.Explorer:
    return explore.Explorer(Options(model=str(save_llava(tmp_path_factory.mktemp("models") / "clip"))))


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return next(scenes.questions()).image


# ------------------------------------------------------------------------------------------------------------- the work


def test_answers_are_those_of_the_model(explorer: explore.Explorer, scene: Image.Image) -> None:
    """With all tokens, and under each spec: the same words as by hand, the report's counts, and the model undone."""
    inputs = accuracy.process(explorer.processor, [QUESTION], [[scene]])

    def by_hand() -> str:
        output: Any = explorer.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return explorer.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def hooks() -> list[int]:
        return [len(one._forward_pre_hooks) + len(one._forward_hooks) for one in explorer.model.modules()]

    plain, before = by_hand(), hooks()  # the first call leaves hooks of transformers' own
    full, kept, inner = explorer.compare(scene, f"  {QUESTION}\n", ["uniform", "fastv:layer=1,keep=3"], 0.5)
    assert (full.spec, full.text, full.tokens, full.layer) == (explore.ALL, plain, TOKENS, 0)
    for found in (kept, inner):
        with vtc.compress(explorer.model, found.spec) as session:
            assert found.text == by_hand()
        report = session.last
        assert report is not None
        assert (found.tokens, found.flops) == (report.tokens_out, report.prefill_flops)
        assert full.flops == report.prefill_flops_full > found.flops
        (drawn,) = found.pictures
        assert np.array_equal(drawn, report.show(scene, caption=""))
    assert (kept.spec, kept.tokens, kept.layer) == ("uniform:keep=0.5", TOKENS // 2, 0)
    assert (inner.spec, inner.tokens, inner.layer) == ("fastv:keep=3,layer=1", 3, 1)
    for times in (full.times, kept.times, inner.times):
        assert all(0 < part < times.ttft for part in (times.encoder, times.selection, times.prefill))
    assert hooks() == before


def test_one_strategy_or_the_same_one_twice(explorer: explore.Explorer, scene: Image.Image) -> None:
    for specs in (["uniform", ""], ["uniform:keep=0.25", "uniform"]):
        assert [one.spec for one in explorer.compare(scene, QUESTION, specs, 0.25)] == [
            "all tokens",
            "uniform:keep=0.25",
        ]


@pytest.mark.parametrize(
    ("question", "specs", "expected"),
    [
        (" \n", ["uniform"], "there is no question"),
        ("why? " * 101, ["uniform"], "504 characters"),
        ("<image> and <image>?", ["uniform"], "'<image>' in the question stands for one more picture"),
        (QUESTION, [], "not none"),
        (QUESTION, ["uniform", "pool", "random"], "not 3"),
        (QUESTION, ["unifrom"], "did you mean 'uniform'?"),
        (QUESTION, ["uniform:keep=17"], "use at most 16"),
        (QUESTION, ["pyramiddrop"], "at least 4 decoder layers"),
        (QUESTION, ["uniform+pool"], "one compressor can act at"),
    ],
)
def test_what_cannot_be_asked(
    question: str, specs: list[str], expected: str, explorer: explore.Explorer, scene: Image.Image
) -> None:
    with pytest.raises(VtcError, match=re.escape(expected)):
        explorer.compare(scene, question, specs, 0.25)


def test_one_caller_at_a_time(explorer: explore.Explorer, scene: Image.Image) -> None:
    """Compressing is done in place: without waiting for each other, callers would undo each other's sessions."""
    specs = ["uniform:keep=4", "pool:keep=2", "random:keep=9", "divprune:keep=6"]

    def tokens(spec: str) -> tuple[int, ...]:
        return tuple(one.tokens for one in explorer.compare(scene, QUESTION, [spec], 0.5))

    with ThreadPoolExecutor(len(specs)) as pool:
        assert list(pool.map(tokens, specs)) == [tokens(spec) for spec in specs]


def test_strategies_are_those_the_model_can_do(tmp_path: Path, explorer: explore.Explorer) -> None:
    offered = dict.fromkeys(spec.partition(":")[0] for spec in explorer.offers)
    assert {*offered, *explorer.missing, "none"} == set(vtc.available()) and not set(offered) & set(explorer.missing)
    assert "at least 4 decoder layers" in explorer.missing["pyramiddrop"]
    assert "fastervlm" in explorer.offers
    siglip = explore.Explorer(Options(model=str(save_llava(tmp_path / "siglip", "siglip"))))
    assert {"divprune", "fastervlm:saliency=received"} < set(siglip.offers) and "fastervlm" not in siglip.missing
    for spec in siglip.offers:
        vtc.compress(siglip.model, spec).remove()


def test_examples_are_of_different_kinds(explorer: explore.Explorer) -> None:
    """The bundled model answers them rightly, so a visitor sees first what it can do."""
    shelf = explore.Shelf(Options())
    bundled = shelf["tiny-llava"]
    assert 4 <= len(bundled.examples) == len({one.question for one in bundled.examples})
    first, *_ = bundled.examples
    full, _ = bundled.compare(first.visual, first.question, ["uniform"], 0.5)
    assert full.text == first.answer
    assert bundled.tokens(first.visual) == full.tokens
    with pytest.raises(VtcError, match="choose one of tiny-llava"):
        shelf["/etc"]


# ---------------------------------------------------------------------------------------------------------------- files


def save_video(path: Path, frames: int, rate: int = 8, side: int = 32) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((side, side, 3), 2 * number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def save_animation(path: Path, frames: int, side: int = 8) -> None:
    first, *others = (Image.new("RGB", (side, side), (9 * number, 0, 0)) for number in range(frames))
    first.save(path, save_all=True, append_images=others)


def test_pictures_and_clips_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.webp")
    save_animation(tmp_path / "b.gif", 6)
    picture = explore_files.open_file(tmp_path / "a.webp", 4)
    clip = explore_files.open_file(tmp_path / "b.gif", 4)
    assert isinstance(picture, Image.Image) and picture.size == (30, 20)
    assert isinstance(clip, Clip) and clip.frames.shape == (4, 8, 8, 3)
    save_video(tmp_path / "c.mp4", 12)
    clip = explore_files.open_file(tmp_path / "c.mp4", 4)
    assert isinstance(clip, Clip) and clip.frames.shape == (4, 32, 32, 3)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
PLAYLIST = b"ffconcat version 1.0\nfile clip.avi\n"
BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "text": ("a.png", lambda path: path.write_text("hello"), "cannot be read as a picture"),
    "a broken picture": ("a.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nno"), "cannot be read as a picture"),
    "a program": ("a.png", lambda path: path.write_bytes(EPS), "cannot be read as a picture"),
    "too many pixels": ("a.png", lambda path: Image.new("L", (200, 60)).save(path), "more than 10,000 pixels"),
    "too many frames": ("a.gif", lambda path: save_animation(path, 20, 25), "more than 10,000 pixels"),
    "a bomb": ("a.png", lambda path: Image.new("1", (20000, 20000)).save(path), "more than 10,000 pixels"),
    "too many bytes": ("a.png", lambda path: path.write_bytes(bytes(200_000)), "MB; use at most"),
    "text as a video": ("a.mp4", lambda path: path.write_text("hello"), "cannot be read as a video"),
    "a list of files": ("a.mp4", lambda path: path.write_bytes(PLAYLIST), "cannot be read as a video"),
    "too many seconds": ("a.avi", lambda path: save_video(path, 70, rate=1), "too long; use at most 60 seconds"),
    "too fast": ("a.avi", lambda path: save_video(path, 50, rate=60), "too long; use at most 60 seconds and 40 frames"),
    "too wide": ("a.avi", lambda path: save_video(path, 3, side=160), "have 25,600 pixels"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and without the folder of the server in which they lie."""
    file, write, expected = BAD_FILES[name]
    limits = {"MAX_PIXELS": 10_000, "MAX_FRAME": 10_000, "MAX_BYTES": 150_000}
    limits |= {"MAX_FRAMES": 40} if name == "too fast" else {}
    for limit, value in limits.items():
        monkeypatch.setattr(explore_files, limit, value)
    if Path(file).suffix != ".png" and Path(file).suffix != ".gif":
        pytest.importorskip("av")
    save_animation(tmp_path / "clip.gif", 2)
    write(tmp_path / file)
    with pytest.raises(VtcError, match=re.escape(expected)) as raised:
        explore_files.open_file(tmp_path / file, 4)
    assert file in str(raised.value) and str(tmp_path) not in str(raised.value)


def test_truncated_picture(tmp_path: Path) -> None:
    """Its header is fine, so that decoding it is what fails."""
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(VtcError, match="cannot read cut.jpg as a picture"):
        explore_files.open_file(path, 4)


def test_clip_for_a_model_of_pictures(tmp_path: Path, explorer: explore.Explorer) -> None:
    save_animation(tmp_path / "a.gif", 3)
    with pytest.raises(VtcError, match="takes pictures, not clips"):
        explorer.open(tmp_path / "a.gif")


@pytest.mark.parametrize("name", ["onevision", "qwen"])
def test_clips(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    import video_checkpoints

    model = explore.Explorer(Options(model=str(getattr(video_checkpoints, f"save_{name}")(tmp_path / name))), frames=4)
    save_animation(tmp_path / "a.gif", 8, 56)
    clip = model.open(tmp_path / "a.gif")
    full, kept = model.compare(clip, QUESTION, ["divprune"], 0.5)
    assert isinstance(clip, Clip) and len(full.pictures) == len(clip.frames) == 4
    assert len(kept.pictures) == (2 if name == "qwen" else 4), "Qwen sees frames in pairs"
    assert full.tokens == model.tokens(clip) and kept.tokens == max(1, int(full.tokens * 0.5 + 0.5))
    assert full.pictures[0].size == kept.pictures[0].size


def test_picture_that_the_processor_refuses(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    import video_checkpoints

    model = explore.Explorer(Options(model=str(video_checkpoints.save_qwen(tmp_path / "qwen"))))
    with pytest.raises(VtcError, match="refuses this: absolute aspect ratio must be smaller than 200"):
        model.tokens(Image.new("RGB", (2, 900)))


# ----------------------------------------------------------------------------------------------------------------- html


def test_words_of_others_are_escaped(explorer: explore.Explorer, scene: Image.Image) -> None:
    answers = [replace(one, text=NASTY, spec=NASTY) for one in explorer.compare(scene, QUESTION, ["pool"], 0.25)]
    labelled = replace(answers[1], pictures=answers[1].pictures * 2, labels=(NASTY, "crops"))
    for text in (
        explore_html.alert(NASTY),
        explore_html.preview(scene, f"{NASTY}.png"),
        explore_html.cards([*answers, labelled, replace(answers[1], text="", pictures=())]),
    ):
        assert "<script" not in text and "&lt;script&gt;" in text
        assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)', text))


def test_numbers_are_legible() -> None:
    assert [explore_html.flops(count) for count in (12, 1234, 56_700_000, 10**13)] == ["12", "1.23 k", "56.7 M", "10 T"]
    assert "11 % of 1,024 visual tokens: <b>113</b>" in explore_html.budget(1024, 11)
    assert "<b>1</b>" in explore_html.budget(16, 1)


# ------------------------------------------------------------------------------------------------------------- the page


def explore_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vtc", "explore", *arguments]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "tiny-lava"], "no bundled model and no checkpoint folder"),
        (["--frames", "0"], "--frames is 0; use at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; use at least 1"),
        (["--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
    ],
)
def test_bad_commands_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert cli.main(["explore", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vtc: error: ") and captured.err.count("\n") == 1 and expected in captured.err
    assert not captured.out


def test_without_gradio(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vtc.eval.explore_page", raising=False)
    assert cli.main(["explore"]) == 2
    said = capsys.readouterr().err
    assert 'this command needs gradio, which is not installed: pip install "/path/to/vtc[explore]"' in said


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page as a user starts it, with a random model; afterwards Ctrl+C ends it without a complaint."""
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    model = save_llava(tmp_path_factory.mktemp("models") / "random")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        explore_command("--model", str(model)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + server.stderr.read()
        yield found.group()
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert "Traceback" not in server.stderr.read()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.program() is None:
        pytest.skip("no Chromium with its driver on this machine")
    # Addresses outside of this machine are not found, and asking for one is logged as an error.
    with browser.start(
        tmp_path_factory.mktemp("profile"), ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    ) as window:
        yield window


def go(window: browser.Browser, address: str, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    window.chrome("Emulation.setDeviceMetricsOverride", **metrics)
    window.call("POST", "/url", url=address)
    until(window, "return document.querySelector('#preview img')?.naturalWidth > 0")


def until(window: browser.Browser, script: str) -> Any:
    """What a script returns, as soon as that is something."""
    deadline = time.monotonic() + 20
    while not (found := window.run(script)):
        assert time.monotonic() < deadline, f"{script}: {window.run('return document.body.innerText')}"
        time.sleep(0.05)
    return found


def element(window: browser.Browser, selector: str) -> str:
    return next(iter(window.call("POST", "/element", using="css selector", value=selector).values()))


def type_in(window: browser.Browser, selector: str, text: str) -> None:
    """Instead of what is there; files go to their input in the same way."""
    if "file" not in selector:
        window.run("document.querySelector(arguments[0]).select()", selector)
    window.call("POST", f"/element/{element(window, selector)}/value", text=text)


CARDS = """
const texts = selector => [...document.querySelectorAll('.card ' + selector)].map(node => node.innerText);
const drawn = [...document.querySelectorAll('.card img')].every(image => image.naturalWidth > 0);
return drawn && texts('h3').length ? [texts('h3'), texts('.said'), texts('tr:nth-child(2) td:nth-child(2)')] : null"""
ALERT = "return document.querySelector('#results [role=alert]')?.innerText"


def test_browser_answers_an_example(address: str, window: browser.Browser) -> None:
    """One click; nothing is fetched from elsewhere, and nothing sticks out, on a screen or on a phone."""
    for width in (1280, 390):
        go(window, address, width)
        window.click("#examples .gallery-item:nth-child(2) button")
        names, said, tokens = until(window, CARDS)
        assert names == ["all tokens", "divprune:keep=0.11", "random:keep=0.11"]
        assert tokens == ["16", "2", "2"] and all(said)
        assert window.run("return document.documentElement.scrollWidth") <= width
        until(window, "return document.querySelector('#results').getBoundingClientRect().top < 900")  # it scrolls there
        elsewhere = (
            "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.match(arguments[0]))"
        )
        assert window.run(elsewhere, f"^({re.escape(address)}|data:)") == []
        assert window.log() == []


def test_browser_takes_a_picture_a_question_and_a_slide(address: str, window: browser.Browser, tmp_path: Path) -> None:
    next(scenes.questions()).image.resize((200, 150)).save(tmp_path / "mine.jpg")
    go(window, address, 1280)
    type_in(window, "#drop input[type=file]", str(tmp_path / "mine.jpg"))
    until(window, "return document.querySelector('#preview').innerText.includes('mine.jpg, 200 x 150')")
    type_in(window, "#question textarea", QUESTION)
    type_in(window, "#one input", "fastervlm:keep=5\ue007")
    window.click("#go")
    assert until(window, CARDS)[0] == ["all tokens", "fastervlm:keep=5", "random:keep=0.11"]
    left, top, width = window.run(
        "const box = document.querySelector('#keep input[type=range]').getBoundingClientRect();"
        "return [box.left, box.top + box.height / 2, box.width]"
    )
    down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
    moves = [{"type": "pointerMove", "x": round(left + share * width), "y": round(top)} for share in (0.1, 0.5)]
    steps = [moves[0], down, moves[1], up]
    window.call("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": steps}])
    # The answers follow the slider, but not where a spec has a budget of its own.
    until(window, "return document.querySelector('.card:nth-child(3) h3')?.innerText == 'random:keep=0.5'")
    names, _, tokens = until(window, CARDS)
    assert names[1] == "fastervlm:keep=5" and tokens == ["16", "5", "8"]
    assert "50 % of 16 visual tokens: 8" in window.run("return document.querySelector('#budget').innerText")


def test_browser_says_what_is_wrong(address: str, window: browser.Browser, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    go(window, address, 1280)
    type_in(window, "#two input", "randm\ue007")
    window.click("#go")
    assert "did you mean 'random'?" in until(window, ALERT)
    type_in(window, "#drop input[type=file]", str(tmp_path / "broken.png"))
    until(window, "return document.querySelector('#preview').innerText.includes('broken.png cannot be read')")
    window.click("#go")
    until(window, "return document.querySelector('#results').innerText.includes('there is nothing to ask about')")
    assert "Traceback" not in window.run("return document.body.innerText")
    window.click("#examples .gallery-item:nth-child(1) button")  # and all is well again
    type_in(window, "#two input", "random\ue007")
    window.click("#go")
    assert until(window, CARDS)[2] == ["16", "2", "2"]
    assert window.run(ALERT) is None


def test_browser_changes_the_model(address: str, window: browser.Browser) -> None:
    go(window, address, 1280)
    window.click("#model input")
    option = (
        "const option = [...document.querySelectorAll('[role=option]')].find(o => o.innerText.includes('tiny-llava'));"
    )
    until(window, f"{option} if (option) option.id = 'wanted'; return option")
    window.click("#wanted")
    until(window, "return document.querySelector('#budget').innerText.includes('11 % of 256 visual tokens: 28')")
    window.click("#examples .gallery-item:nth-child(1) button")
    assert until(window, CARDS)[2] == ["256", "28", "28"]


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path("setup.cfg").resolve()), "../../../../etc/passwd"])
def test_server_hands_out_no_files(path: str, address: str) -> None:
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as refused:
        local.open(f"{address}gradio_api/file={path}", timeout=10)
    assert refused.value.code in (403, 404)
