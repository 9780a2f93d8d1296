"""What pages of the site take from elsewhere, so that nothing is written twice.

MkDocs calls the two functions that begin with `on_`. A line of a page that is one of these stands for something else:

    {{ README.md: Measured }}   the section with that heading of a file of the repository
    {{ strategies }}            the catalogue, from the registry and the docstrings
    {{ commands }}              the help of every command

Some files of the repository are pages themselves. Links between files of the repository become links between pages; a
link to a file that is on no page is an error.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import vtc
from vtc import zoo
from vtc.cli import describe
from vtc.compressor import strategy

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^\{\{ (.+?) \}\}$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]*)(#[^)\s]+)?")
KINDS = {
    "input": ("In front of the language model", "They decide once, before the language model sees anything."),
    "decoder": ("Inside the language model", "They decide where the prompt has been read already, by its last token."),
    "baseline": ("Baselines", "They look at nothing. A method that does not beat them has not earned its name."),
}


def pages() -> dict[str, str]:
    """Files of the repository that are pages of the site, and where."""
    found = {
        "README.md": "index.md",
        "CONTRIBUTING.md": "contributing.md",
        "eval/assets/LICENSES.md": "licences.md",
        "notebooks": "notebooks/1_quick_start.md",
        "training/README.md": "training.md",
    }
    found.update({f"benchmarks/{file.name}": f"benchmarks/{file.name}" for file in ROOT.glob("benchmarks/*.md")})
    return {**found, **{f"vtc/zoo/{name}/README.md": f"models/{name}.md" for name in zoo.names()}}


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that are pages of their own."""
    written = set(files.src_uris)
    for source, page in pages().items():
        if page not in written and (ROOT / source).is_file():
            files.append(File.generated(config, page, content=relink(without_header(source), source, page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the lines that stand for something else."""
    made = {"strategies": catalogue, "commands": commands}

    def replacement(match: re.Match[str]) -> str:
        what = match[1]
        if what in made:
            return made[what]()
        source, _, heading = what.partition(": ")
        return relink(section(source, heading), source, page.file.src_uri)

    return DIRECTIVE.sub(replacement, markdown)


# ---------------------------------------------------------------------------------------- files of the repository


def without_header(source: str) -> str:
    """A file without the metadata in front of it, if there are any."""
    return re.sub(r"\A---\n.*?\n---\n", "", (ROOT / source).read_text(encoding="utf-8"), flags=re.DOTALL)


def section(source: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    parts = re.split(r"^## (.+)\n", without_header(source), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading not in found:
        raise PluginError(f"{source} has no section '{heading}'; there is: {', '.join(found)}")
    return found[heading].strip()


def relink(text: str, source: str, page: str) -> str:
    """Make links that were written for `source`, a file of the repository, right on `page` of the site."""
    known, moved = pages(), anchors()

    def target(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if not path:
            if known.get(source) == page and not (ROOT / "docs" / page).exists():  # the whole file is the page
                return anchor
            there = moved.get(source, {}).get(anchor)
        else:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
            there = path.removeprefix("docs/") if path.startswith("docs/") else known.get(path)
            there = there + anchor if there and (ROOT / path).exists() else None
        if there is None:
            raise PluginError(f"{source} links to {match[0]}, which is not on the site: see `pages` in docs/hooks.py")
        return posixpath.relpath(there, posixpath.dirname(page) or ".")

    return LINK.sub(target, text)


def anchors() -> dict[str, dict[str, str]]:
    """Where the headings went of files that are on the site in sections: per file, from `#heading` to a page."""
    found: dict[str, dict[str, str]] = {}
    for file in (ROOT / "docs").glob("*.md"):
        for what in DIRECTIVE.findall(file.read_text(encoding="utf-8")):
            source, colon, heading = what.partition(": ")
            if not colon:
                continue
            inside = re.findall(r"^###+ (.+)$", section(source, heading), flags=re.MULTILINE)
            there = found.setdefault(source, {})
            there[f"#{slug(heading)}"] = file.name
            there.update({f"#{slug(name)}": f"{file.name}#{slug(name)}" for name in inside})
    return found


def slug(heading: str) -> str:
    return slugify(heading, "-")


# ------------------------------------------------------------------------------------------------ made on the spot


def catalogue() -> str:
    """Every registered strategy, by kind: a table of all, then each with its docstring."""
    groups: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for name in vtc.available():
        entry = describe(strategy(name))
        groups[entry["site"] if entry["paper"] else "baseline"].append(entry)
    table = ["| name | in one line | reads | positions | paper |", "|---|---|---|---|---|"]
    text = []
    for kind, (title, line) in KINDS.items():
        text.append(f"## {title}\n\n{line}\n")
        for entry in groups[kind]:
            needs = ", ".join(f"`{need}`" for need in entry["needs"]) or "nothing"
            cells = (f"[`{entry['name']}`](#{entry['name']})", entry["summary"], needs, entry["positions"])
            table.append(f"| {' | '.join(cells)} | {paper(entry)} |")
            text.append(article(entry))
    return "\n".join(['<div class="catalogue" markdown>\n', *table, "\n</div>\n", *text])


def paper(entry: dict[str, Any]) -> str:
    return f"[{entry['paper']}](https://arxiv.org/abs/{entry['paper']})" if entry["paper"] else ""


def article(entry: dict[str, Any]) -> str:
    """One strategy of the catalogue."""
    cls = strategy(entry["name"])
    facts = ["Defaults: " + ", ".join(f"`{key}={value}`" for key, value in entry["parameters"].items())]
    if entry["paper"]:
        code = f"[{entry['code']}](https://github.com/{entry['code']})" if entry["code"] else "none found"
        facts.append(f"Paper: {paper(entry)}. Official code: {code}")
    return "\n".join(
        [
            f"### `{entry['name']}` {{ #{entry['name']} }}\n",
            *(f"{fact}  " for fact in facts),
            f"\n::: {cls.__module__}.{cls.__qualname__}",
            "    options: {show_root_heading: false, show_root_toc_entry: false, show_bases: false, members: false}\n",
        ]
    )


def commands() -> str:
    """The help of `vtc` and of each of its commands."""
    overview = help_of()
    names = re.findall(r"^    (\w+)  ", overview.partition("commands:")[2], flags=re.MULTILINE)
    parts = [f"```text\n{overview}\n```\n"]
    parts += [f"## vtc {name}\n\n```text\n{help_of(name)}\n```\n" for name in names]
    return "\n".join(parts)


def help_of(*command: str) -> str:
    line = [sys.executable, "-m", "vtc", *command, "--help"]
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1"}
    return subprocess.run(line, check=True, capture_output=True, text=True, env=environment).stdout.strip()
