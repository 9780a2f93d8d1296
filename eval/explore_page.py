"""The page of `vtc explore`: what a visitor clicks, and where it is served.

`vtc.eval.explore` does the work, `vtc.eval.explore_html` writes down what came of it.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
from PIL import Image

from vtc.errors import VtcError
from vtc.eval import explore_html as html
from vtc.eval.explore import MAX_QUESTION, Explorer, Shelf, Visual, name_of
from vtc.eval.explore_files import MAX_BYTES
from vtc.eval.lmms.clips import Clip

KEEP = 11  # per cent, to begin with
FIRST = ("divprune", "random")  # strategies, to begin with
NO_OTHER = "(no other)"
VISITORS, WAITING = 16, 16  # whose pictures are remembered; who may wait for the model
FORGET = 3600  # seconds until a visitor's files and pictures are deleted
ABOUT = """# vtc explore
Ask a vision-language model about a picture: once with all of its visual tokens, and once with the few that a strategy
keeps. Click on an example to begin.
"""

FONT, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # those of the visitor: nothing is fetched
# Go to the answers if they are out of sight, as on a phone.
LOOK = """() => {
  const results = document.querySelector("#results");
  if (results.getBoundingClientRect().top > innerHeight - 100) results.scrollIntoView({behavior: "smooth"});
}"""

Updates = dict[Any, Any]


@dataclass(frozen=True)
class Given:
    """What is asked about, and how many visual tokens the model makes of it."""

    visual: Visual
    tokens: int


class Page:
    """The page for some models. `blocks` is what gradio serves."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        files = (FORGET, FORGET)
        with gr.Blocks(title="vtc explore", analytics_enabled=False, delete_cache=files) as self.blocks:
            gr.Markdown(ABOUT)
            self._components()
            self._events()

    def _components(self) -> None:
        names = self.shelf.names
        self.given = gr.State(None, time_to_live=FORGET)
        self.gallery = gr.Gallery(
            label="Examples", show_label=False, allow_preview=False, columns=8, height="auto", buttons=[],
            elem_id="examples",
        )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=2):
                self.drop = gr.File(
                    label="Your picture or clip", file_types=["image", "video"], height=130, elem_id="drop"
                )
                self.preview = gr.HTML(elem_id="preview")
            with gr.Column(scale=3):
                self.model = gr.Dropdown(
                    names, value=names[0], label="Model", visible=len(names) > 1, filterable=False, elem_id="model"
                )
                self.question = gr.Textbox(label="Question", max_lines=3, max_length=MAX_QUESTION, elem_id="question")
                with gr.Row():
                    self.one = gr.Dropdown(label="Strategy", allow_custom_value=True, elem_id="one")
                    self.two = gr.Dropdown(label="Another one", allow_custom_value=True, elem_id="two")
                with gr.Group():
                    self.keep = gr.Slider(1, 100, KEEP, step=1, label="keep", buttons=[], elem_id="keep")
                    self.budget = gr.HTML(elem_id="budget")
                self.go = gr.Button("Compare", variant="primary", elem_id="go")
        self.results = gr.HTML(html.NO_ANSWERS, elem_id="results")
        with gr.Accordion("What the strategies do", open=False):
            self.table = gr.Markdown()

    def _events(self) -> None:
        asked = [self.model, self.given, self.question, self.one, self.two, self.keep]
        private: dict[str, Any] = {"api_visibility": "private"}
        quick: dict[str, Any] = {**private, "show_progress": "hidden"}
        begun = [
            self.given, self.preview, self.question, self.one, self.two, self.budget, self.results,
            self.gallery, self.table,
        ]  # fmt: skip
        chosen = [self.given, self.preview, self.question, self.budget, self.results]
        answers: dict[str, Any] = {
            **private, "inputs": asked, "outputs": self.results, "concurrency_id": "model",
            "concurrency_limit": 1, "show_progress_on": self.results,
        }  # fmt: skip
        look: dict[str, Any] = {"fn": None, "js": LOOK}
        self.blocks.load(self._begin, [self.model, self.keep], begun, **quick)
        self.model.change(self._begin, [self.model, self.keep], begun, **private)
        self.drop.upload(self._upload, [self.model, self.drop, self.keep], [*chosen, self.drop], **private)
        example = self.gallery.select(self._choose, [self.model, self.keep], chosen, **quick)
        self.keep.change(self._slide, [self.given, self.keep], self.budget, queue=False, **quick)
        self.keep.release(self._compare, **answers, trigger_mode="always_last").then(**look)
        for event in (example.then, self.question.submit, self.go.click):
            event(self._compare, **answers).then(**look)

    # ----------------------------------------------------------------------------------------------------- handlers

    def _begin(self, model: str, keep: float) -> Updates:
        """A model's strategies and examples, with the first example chosen."""
        try:
            explorer = self.shelf[model]
        except VtcError as error:  # it cannot be loaded
            return {self.results: html.alert(str(error))}
        wanted = [next((spec for spec in explorer.offers if name_of(spec) == name), "") for name in FIRST]
        pictures = [(_still(one.visual), one.question) for one in explorer.examples]
        return {
            self.one: gr.update(choices=list(explorer.offers), value=wanted[0]),
            self.two: gr.update(choices=[NO_OTHER, *explorer.offers], value=wanted[1] or NO_OTHER),
            self.gallery: gr.update(value=pictures, selected_index=None),
            self.table: html.strategies(explorer),
            **self._example(explorer, 0, keep),
        }

    def _choose(self, model: str, keep: float, event: gr.SelectData) -> Updates:
        return self._example(self.shelf[model], event.index, keep)

    def _example(self, explorer: Explorer, number: int, keep: float) -> Updates:
        example = explorer.examples[number]
        return {
            **self._show(explorer, example.visual, f"example {number + 1}", keep),
            self.question: example.question,
        }

    def _upload(self, model: str, path: str, keep: float) -> Updates:
        emptied = {self.drop: None}  # ready for the next file
        try:
            explorer = self.shelf[model]
            return {**emptied, **self._show(explorer, explorer.open(Path(path)), Path(path).name, keep)}
        except VtcError as error:
            nothing = {self.given: None, self.budget: html.NO_BUDGET, self.results: html.NO_ANSWERS}
            return {**emptied, **nothing, self.preview: html.alert(str(error))}

    def _show(self, explorer: Explorer, visual: Visual, name: str, keep: float) -> Updates:
        given = Given(visual, explorer.tokens(visual))
        return {
            self.given: given,
            self.preview: html.preview(visual, name),
            self.budget: self._slide(given, keep),
            self.results: html.NO_ANSWERS,
        }

    def _slide(self, given: Given | None, keep: float) -> str:
        return html.NO_BUDGET if given is None else html.budget(given.tokens, keep)

    def _compare(self, model: str, given: Given | None, question: str, one: str, two: str, keep: float) -> str:
        specs = [spec for spec in (one, two) if spec and spec != NO_OTHER]
        try:
            if given is None:
                raise VtcError("there is nothing to ask about: drop a picture, or click on an example")
            return html.cards(self.shelf[model].compare(given.visual, question, specs, keep / 100))
        except VtcError as error:
            return html.alert(str(error))


def launch(page: Page, host: str, port: int | None) -> str:
    """Serve the page in the background until `page.blocks.close()`; its address.

    Raises:
        VtcError: the address or the port cannot be had.
    """
    _check_address(host, port)
    try:
        _, address, _ = page.blocks.queue(max_size=WAITING).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            allowed_paths=[],
            max_file_size=MAX_BYTES,
            state_session_capacity=VISITORS,
            enable_monitoring=False,
            ssr_mode=False,
            theme=gr.themes.Base(font=FONT, font_mono=MONO),
            css_paths=[Path(str(resources.files("vtc.eval"))) / "assets" / "explore.css"],
        )
    except (OSError, ValueError) as error:  # every port is taken, or a proxy stands before this machine itself
        raise VtcError(f"cannot serve the page on {host}: {error}") from error
    return address


def _check_address(host: str, port: int | None) -> None:
    """Refuse what cannot be listened on; gradio would try for minutes."""
    try:
        family, kind, protocol, _, (name, *_) = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((name, port or 0))
    except (OSError, OverflowError) as error:
        raise VtcError(f"cannot listen on {host}, port {port or 'any'}: {error}") from error


def serve(shelf: Shelf, host: str, port: int | None) -> None:
    """Serve the page until Ctrl+C."""
    page = Page(shelf)
    address = launch(page, host, port)
    print(f"Open {address} in a browser. Ctrl+C ends.", flush=True)
    try:
        Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        page.blocks.close(verbose=False)


def _still(visual: Visual) -> Image.Image:
    return Image.fromarray(visual.frames[len(visual.frames) // 2]) if isinstance(visual, Clip) else visual
