"""The documentation: it builds without a warning, nothing is missing from it, and it fetches nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import vtc
from vtc import cli, zoo

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "training/README.md")),
    *ROOT.glob("vtc/zoo/*/README.md"),
)


class Tags(HTMLParser):
    """What a page loads, what it links to, and what can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        if tag in ("script", "img", "iframe", "source"):
            self.loads.append(found.get("src", ""))
        if tag == "link" and found.get("rel") != "canonical":
            self.loads.append(found.get("href", ""))
        if tag == "a":
            self.links.append(found.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return out


def pages(site: Path) -> Iterator[tuple[Path, Tags]]:
    for page in site.rglob("*.html"):
        if page.name != "404.html":  # its links begin with a slash
            yield page, Tags(page.read_text(encoding="utf-8"))


def test_every_strategy_command_and_model_is_on_the_site(site: Path) -> None:
    assert set(vtc.available()) <= Tags((site / "strategies.html").read_text()).ids
    commands = {f"vtc-{name.removeprefix('run_')}" for name in vars(cli) if name.startswith("run_")}
    assert commands and commands <= Tags((site / "commands.html").read_text()).ids
    assert {f"{name}.html" for name in zoo.names()} == {page.name for page in (site / "models").iterdir()}


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = Tags((site / "api.html").read_text()).ids
    wanted = {f"vtc.{name}" for name in vtc.__all__} - {"vtc.__version__", "vtc.zoo"}
    assert wanted <= ids


def test_every_link_leads_somewhere(site: Path) -> None:
    """MkDocs checks links that were written in Markdown; this checks what became of all of them."""
    found = dict(pages(site))
    assert len(found) > 15
    for page, tags in found.items():
        for link in tags.links:
            if re.match(r"[a-z]+:", link) or not link:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target in found:
                assert anchor in found[target].ids, f"{page.name}: {link}"


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    for page, tags in pages(site):
        for load in tags.loads:
            assert not re.match(r"(?!data:)([a-z]+:|//)", load), f"{page.name}: {load}"
            assert load.startswith("data:") or (page.parent / load.partition("?")[0]).resolve().exists()


def test_the_code_of_getting_started_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert (tmp_path / "kept.png").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_files_in_the_repository_lead_somewhere(document: Path) -> None:
    """Paths and headings; whatever is on the network is not asked for."""
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, link
