"""The command line: `vtc list`, `vtc bench`, `vtc eval`, `vtc flops`, `vtc show`, `vtc explore`, `vtc report`.

Thin on purpose: it reads arguments, calls the library and prints. What a user got wrong is one line on stderr and exit
code 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vtc import __version__
from vtc.errors import SpecError, VtcError

if TYPE_CHECKING:
    from vtc.compressor import Compressor

OPTIONAL = frozenset(
    {"PIL", "gradio", "jinja2", "lmms_eval", "matplotlib", "tabulate"}
)  # packages that come with an extra
SPEC_HELP = """
A SPEC names a strategy and, after a colon, its parameters:
  fastervlm    fastervlm:keep=64    todre:keep=0.25,pivot=mean
`keep` says how many visual tokens survive per image. A whole number counts
tokens (64), a fraction is a share of them (0.25). `vtc list` names the
strategies.
"""
LIST_HELP = """
Name the strategies: where each acts (site), what it reads of the model
(needs), how it numbers the survivors (positions), and the paper it is from.
"""
BENCH_HELP = (
    """
Compare strategies on one model, with questions about pictures and clips that
come with the library.

For each strategy and each budget it measures tokens in and out, prefill FLOPs,
time to first token and its parts, decoding speed, the size of the key-value
cache, accuracy per type of question, and agreement with the uncompressed model.
Always there for comparison: no compression, no picture at all (blind), random
tokens (three seeds), uniform, pool and, where the number of visual tokens depends
on the size of a picture, a picture scaled down (downsample). The baselines also
say which questions are difficult: those that a trivial compressor loses.

With --random-weights there is no checkpoint: an architecture of ordinary size is
measured on one made-up prompt, for time, memory and FLOPs, and asked nothing.
"""
    + SPEC_HELP
)
BENCH_EXAMPLE = """
examples:
  vtc bench --limit 100 --out first-look
  vtc bench --spec fastervlm --spec random --keep 0.5,0.25,28 --out results
  vtc bench --model tiny-qwen2vl --limit 200 --out native-resolution
  vtc bench --random-weights llava-onevision-0.5b --frames 16 --repeats 3 \\
      --spec uniform --spec holitom --keep 0.15 --out times

DIR then holds rows.jsonl (one object per setting), samples.jsonl (what became of
each question), table.md and pareto.png. `vtc report DIR` makes a page of them.
"""
EVAL_HELP = (
    """
Answer the questions of tasks with one model and one strategy: accuracy per task,
and per document what the answer cost the language model (visual tokens, FLOPs,
time to first token).

The tasks `scenes`, `posters`, `clips` and `sizes` are bundled. All others come from
lmms-eval: its own, and those in a folder of yours. A run that was interrupted goes
on when it is started again with the same --out. Questions that raise are listed and
get no answer; then there are no scores, and the exit code is 1.
"""
    + SPEC_HELP
)
EVAL_EXAMPLE = """
examples:
  vtc eval --tasks scenes --limit 100 --spec fastervlm:keep=64 --out results
  vtc eval --model PATH --spec divprune:keep=0.11 --tasks mme,pope --out results
  accelerate launch -m vtc eval --model PATH --tasks videomme --device cuda --out results

DIR then holds results.json (per task), documents.jsonl (per document) and the answers.
"""
FLOPS_HELP = """
Count what one prompt costs, in closed form and without a model: encoder,
projector, selection, prefill and steps of generation, in multiply-adds (MACs)
and FLOPs (two per multiply-add).

Conventions for the language model:
  exact         what the model runs, with one row of logits
  fastv         4 n d^2 + 2 n^2 d + 2 n d m per layer
  three_matrix  4 n d^2 + 2 n^2 d + 3 n d m per layer
  llm_viewer    as exact, with softmax, norms and sums
with n tokens, width d and feed-forward width m. Papers that count by fastv or
three_matrix often print MACs and call them FLOPs, and leave text out (--text 0).
"""
FLOPS_EXAMPLE = """
examples:
  vtc flops --config llava-1.5-7b --tokens 576 --text 64
  vtc flops --config llava-1.5-7b --tokens 576 --text 64 \\
      --schedule 2:576,30:288 --convention fastv --json
  vtc flops --config qwen2.5-vl-7b --tokens 1296 --grid 1x36x36
"""
SHOW_HELP = (
    """
Draw which parts of an image or a clip survive compression, and print what the
model answers with and without it. What was dropped is dark; tokens that were
merged share an outline, in all frames. A SPEC that acts at several places has a
picture for each.
"""
    + SPEC_HELP
)
SHOW_EXAMPLE = """
examples:
  vtc show photo.jpg --question "What colour is the square?" --spec fastervlm --keep 28
  vtc show talk.mp4 --model PATH --question "Who speaks?" --spec holitom --out kept.gif
"""
EXPLORE_HELP = """
A page to play with, on this machine: drop a picture or a clip, type a question,
choose one or two strategies and how much they keep, and see the answers, the
tokens that were kept, FLOPs and time side by side with those of the uncompressed
model. Whoever can reach the address can use it; by default that is this machine.
"""
EXPLORE_EXAMPLE = """
examples:
  vtc explore
  vtc explore --model PATH --device cuda --dtype bfloat16
"""
REPORT_HELP = """
Turn what `vtc bench` or `vtc eval` wrote into tables or a page, or compare two runs.

RUN is the folder of a run, or its rows.jsonl or results.json. Of one run of
`vtc bench`: all settings with their costs, accuracy per type of question, answers
lost and gained, difficulty groups and, as html, plots to look into and questions
on which a compressed model and the full one disagree, drawn. Of one run of
`vtc eval`: scores and cost per task. Of two runs of a kind: what changed from the
first to the second, and whether that is more than noise (McNemar's exact test on
the questions that both answered).

Formats:
  md       Markdown
  csv      one line per setting, all numbers
  latex    tables for a paper, with booktabs
  html     one page that needs no network
"""
REPORT_EXAMPLE = """
examples:
  vtc report results --out report.html
  vtc report results --format latex
  vtc report before after
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vtc: error: {message} (see '{self.prog} --help')\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return options.command(options)
    except VtcError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        return fail(
            f'this command needs {package}, which is not installed: pip install "/path/to/vtc[{options.extra}]"'
        )
    except BrokenPipeError:  # `vtc list | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return fail(options.interrupted, code=130)


def fail(message: str, code: int = 2) -> int:
    """Say what was wrong on one line."""
    print(f"vtc: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def make_parser() -> Parser:
    """All commands and options."""
    parser = Parser(
        prog="vtc",
        description="Make vision-language models faster by carrying fewer visual tokens.",
        epilog="`vtc COMMAND --help` explains a command. To begin with: vtc bench --limit 100 --out first-look",
    )
    parser.add_argument("--version", action="version", version=f"vtc {__version__}")
    parser.set_defaults(command=None, parser=parser, interrupted="interrupted")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    _add_list(commands)
    _add_bench(commands)
    _add_eval(commands)
    _add_flops(commands)
    _add_show(commands)
    _add_explore(commands)
    _add_report(commands)
    return parser


def _command(commands: Any, name: str, summary: str, description: str, example: str = "") -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=summary, description=description.strip(), epilog=example.strip(), formatter_class=plain
    )
    parser.set_defaults(parser=parser)
    return parser


# --------------------------------------------------------------------------------------------------------- vtc list


def _add_list(commands: Any) -> None:
    parser = _command(commands, "list", "name the strategies", LIST_HELP)
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.set_defaults(command=run_list)


def run_list(options: argparse.Namespace) -> int:
    """`vtc list`."""
    from vtc.compressor import available, strategy

    entries = [describe(strategy(name)) for name in available()]
    if options.json:
        print(json.dumps(entries, indent=2))
        return 0
    headings = ("name", "site", "needs", "positions", "paper", "summary")
    cells = [headings, *(tuple(_cell(entry[heading]) for heading in headings) for entry in entries)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def describe(cls: type[Compressor]) -> dict[str, Any]:
    """One strategy as plain data."""
    defaults = {item.name: item.default for item in fields(cls) if item.default is not MISSING}
    return {
        "name": cls.name,
        "site": cls.site,
        "needs": sorted(cls().needs),
        "positions": defaults["positions"],
        "paper": cls.paper,
        "code": cls.code,
        "parameters": defaults,
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
    }


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value) or "-"


# -------------------------------------------------------------------------------------------------------- vtc bench


def _add_bench(commands: Any) -> None:
    summary = "compare strategies on a model: accuracy, FLOPs, time, memory"
    parser = _command(commands, "bench", summary, BENCH_HELP, BENCH_EXAMPLE)
    _add_model(parser, random=True)
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="bundled task to ask (default: what a bundled model was trained for, else scenes)",
    )
    parser.add_argument(
        "--spec",
        action="append",
        default=[],
        metavar="SPEC",
        help="a strategy; repeat it for more (default: all that the model can do)",
    )
    parser.add_argument(
        "--keep",
        default="0.5,0.25,0.11",
        metavar="LIST",
        help="budgets, separated by commas, for specs that do not name their own (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace results of an earlier run in DIR")
    again.add_argument("--resume", action="store_true", help="go on with it: what it measured is kept")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N questions (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=50, metavar="N", help="questions answered at once (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="first of the seeds of random (default: 0)")
    parser.add_argument(
        "--positions",
        choices=("original", "contiguous"),
        help="how survivors are numbered, for all specs (default: what each paper's code does)",
    )
    parser.add_argument("--no-latency", action="store_true", help="measure no times; those columns stay empty")
    parser.add_argument(
        "--repeats", type=int, default=9, metavar="N", help="measurements of each time (default: %(default)s)"
    )
    made_up = parser.add_argument_group("the prompt for random weights")
    made_up.add_argument("--text", type=int, metavar="N", help="tokens that show nothing (default: 64)")
    made_up.add_argument("--frames", type=int, metavar="N", help="show a clip of N frames (default: a picture)")
    made_up.add_argument("--size", metavar="WxH", help="pixels of the picture or of each frame (default: 640x480)")
    goes_on = "interrupted; what was measured is kept: go on with --resume"
    parser.set_defaults(command=run_bench, extra="eval", interrupted=goes_on)


def _add_model(parser: argparse.ArgumentParser, random: bool = False) -> None:
    which = parser.add_mutually_exclusive_group()
    if random:
        which.add_argument(
            "--random-weights",
            metavar="NAME_OR_PATH",
            help="an architecture without its checkpoint: a bundled config, or a folder with a config.json",
        )
    which.add_argument(
        "--model",
        default="tiny-llava",
        metavar="NAME_OR_PATH",
        help="a bundled model, or the folder of a checkpoint (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a cpu)")
    parser.add_argument(
        "--attn", metavar="NAME", help="attention implementation: sdpa, eager, flash_attention_2 (default: the model's)"
    )


def parse_keeps(text: str) -> tuple[int | float, ...]:
    """`0.5,64` as numbers: whole numbers are ints, all others floats."""
    keeps: list[int | float] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            keeps.append(int(part))
        except ValueError:
            try:
                keeps.append(float(part))
            except ValueError:
                raise SpecError(f"--keep: '{part}' is neither a number of tokens (64) nor a fraction (0.25)") from None
    return tuple(keeps)


def made_up_prompt(options: argparse.Namespace) -> Any:
    """The prompt for random weights, or `None` for a model that is asked something."""
    from vtc.eval.made_up import MadeUp

    given = {name: getattr(options, name) for name in ("text", "frames", "size") if getattr(options, name) is not None}
    if options.random_weights is None:
        if given:
            raise VtcError(f"--{next(iter(given))} describes the prompt for --random-weights; there is no such here")
        return None
    if size := given.pop("size", None):
        edges = size.lower().split("x")
        if len(edges) != 2 or not all(edge.isdecimal() for edge in edges):
            raise VtcError(f"--size: '{size}' is not width x height in pixels, for example 640x480")
        given |= {"width": int(edges[0]), "height": int(edges[1])}
    return MadeUp(**given)


def run_bench(options: argparse.Namespace) -> int:
    """`vtc bench`."""
    import matplotlib  # noqa: F401  # the plot comes last, but without this package nothing should begin

    from vtc.eval import bench, plot, report

    quiet()
    chosen = bench.Options(
        model=options.random_weights or options.model,
        made_up=made_up_prompt(options),
        task=options.task,
        repeats=options.repeats,
        specs=tuple(options.spec),
        keeps=parse_keeps(options.keep),
        limit=options.limit,
        batch_size=options.batch_size,
        seed=options.seed,
        attention=options.attn,
        dtype=options.dtype,
        device=options.device,
        positions=options.positions,
        latency=not options.no_latency,
    )
    bench.run(chosen, options.out, overwrite=options.overwrite, go_on=options.resume, progress=True)
    run = report.load(options.out)
    text = report.markdown(run)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    plotted = plot.pareto(run.rows, options.out / "pareto.png")
    print(text)
    there = {"rows.jsonl": True, "samples.jsonl": bool(run.samples), "table.md": True, "pareto.png": plotted}
    print(f"Written: {', '.join(str(options.out / name) for name, written in there.items() if written)}")
    return 0


def quiet() -> None:
    """Keep transformers' own progress bars and hints off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# --------------------------------------------------------------------------------------------------------- vtc eval


def _add_eval(commands: Any) -> None:
    parser = _command(commands, "eval", "accuracy on tasks, with or without lmms-eval", EVAL_HELP, EVAL_EXAMPLE)
    _add_model(parser)
    parser.add_argument(
        "--tasks", default="", metavar="LIST", help="tasks, separated by commas: bundled, or names that lmms-eval knows"
    )
    parser.add_argument("--spec", default="none", metavar="SPEC", help="strategies (default: no compression)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results; what is there is continued")
    parser.add_argument("--overwrite", action="store_true", help="replace results of an earlier run in DIR")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N documents of each task (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="questions answered at once (default: %(default)s)"
    )
    parser.add_argument(
        "--include-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with tasks for lmms-eval (YAML); repeat it for more",
    )
    parser.add_argument("--simple", action="store_true", help="use the simple form of lmms-eval's tasks, not messages")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames of a clip (default: %(default)s)")
    parser.add_argument(
        "--reader", default="auto", metavar="NAME", help="of video files: pyav, decord, torchcodec (default: any)"
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="only write bundled tasks (those of --tasks, or all) to DIR, as lmms-eval's vtc_scenes and so on",
    )
    goes_on = "interrupted; what was answered is kept: the same command goes on"
    parser.set_defaults(command=run_eval, extra="lmms", interrupted=goes_on)


def run_eval(options: argparse.Namespace) -> int:
    """`vtc eval`."""
    from vtc.eval import tasks
    from vtc.eval.lmms import export, run
    from vtc.eval.lmms.record import MAX_FAILURES, Failed
    from vtc.zoo import torchvision

    if options.limit is not None and options.limit < 1:
        raise VtcError(f"--limit is {options.limit}; use at least 1")
    names = tuple(dict.fromkeys(filter(None, (task.strip() for task in options.tasks.split(",")))))
    if options.export is not None:
        print(f"Written: {export.export(options.export, options.limit, names or tasks.names())}")
        return 0
    if options.out is None:
        raise VtcError("--out DIR is missing: the folder for the results")
    settings = run.Settings(
        out=options.out,
        tasks=names,
        model=options.model,
        spec=options.spec,
        include=tuple(options.include_path),
        simple=options.simple,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        attention=options.attn,
        frames=options.frames,
        reader=options.reader,
        overwrite=options.overwrite,
    )
    torchvision.mend()  # before transformers, which imports it
    quiet()
    try:
        results = run.run(settings)
    except Failed as error:
        for failure in error.failures:
            print(f"  {failure}", file=sys.stderr)
        many = f"{len(error.failures)} questions have no answer"
        stop = ", and the rest was not asked" if len(error.failures) >= MAX_FAILURES else ""
        return fail(f"{many}{stop}, so there are no scores; see {options.out / 'failures.jsonl'}", code=1)
    if results is not None:  # on the first of several processes
        print(run.table(results))
        print(f"Written: {options.out / 'results.json'}, {options.out / 'documents.jsonl'}")
    return 0


# -------------------------------------------------------------------------------------------------------- vtc flops


def _add_flops(commands: Any) -> None:
    parser = _command(commands, "flops", "count what a prompt costs, without a model", FLOPS_HELP, FLOPS_EXAMPLE)
    parser.add_argument(
        "--config", required=True, metavar="NAME_OR_PATH", help="a bundled config, or a folder with a config.json"
    )
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="visual tokens that the encoder makes")
    parser.add_argument("--text", type=int, default=0, metavar="N", help="other tokens (default: %(default)s)")
    parser.add_argument(
        "--schedule",
        metavar="LIST",
        help="visual tokens per layer: 2:576,30:288 is 2 layers with 576, then 30 with 288 (default: all tokens)",
    )
    parser.add_argument("--convention", default="exact", metavar="NAME", help="see above (default: %(default)s)")
    parser.add_argument("--causal", action="store_true", help="leave out pairs that a causal mask hides; exact only")
    parser.add_argument(
        "--lm-head", type=int, metavar="N", help="rows of logits in the prefill (default: the convention's)"
    )
    parser.add_argument(
        "--decode", type=int, default=1, metavar="N", help="steps of generation to count (default: %(default)s)"
    )
    parser.add_argument("--strategy", metavar="NAME", help="count this strategy's selection wherever tokens drop")
    parser.add_argument("--views", type=int, metavar="N", help="images or crops that the encoder looks at")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of a clip that it looks at")
    parser.add_argument("--grid", metavar="TxHxW", help="for Qwen: frames, rows and columns of visual tokens")
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    parser.set_defaults(command=run_flops)


def run_flops(options: argparse.Namespace) -> int:
    """`vtc flops`."""
    from vtc.eval.estimate import estimate, parse_grid, table

    cost = estimate(
        options.config,
        options.tokens,
        text=options.text,
        schedule=options.schedule,
        convention=options.convention,
        causal=options.causal,
        lm_head_tokens=options.lm_head,
        decode_steps=options.decode,
        strategy=options.strategy,
        views=options.views,
        frames=options.frames,
        grid=None if options.grid is None else parse_grid(options.grid),
    )
    print(json.dumps(cost.to_dict(), indent=2) if options.json else table(cost))
    return 0


# --------------------------------------------------------------------------------------------------------- vtc show


def _add_show(commands: Any) -> None:
    parser = _command(commands, "show", "draw which parts of an image or a clip survive", SHOW_HELP, SHOW_EXAMPLE)
    parser.add_argument(
        "image",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="a picture; or a clip: a video, an animated picture, a folder of frames, or several pictures",
    )
    parser.add_argument("--question", required=True, metavar="TEXT", help="what to ask about it")
    parser.add_argument(
        "--spec", action="append", required=True, metavar="SPEC", help="a strategy; repeat it for one more panel"
    )
    parser.add_argument(
        "--keep", metavar="K", help="budget for specs that do not name their own: tokens (64) or a fraction (0.25)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kept.png"),
        metavar="FILE",
        help="picture, or kept.gif for a clip that moves (default: %(default)s)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=8,
        metavar="N",
        help="frames of a video that the model sees (default: %(default)s)",
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="heat maps of the scores or the attention that strategies read, if any",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: %(default)s)"
    )
    _add_model(parser)
    parser.set_defaults(command=run_show, extra="viz")


def run_show(options: argparse.Namespace) -> int:
    """`vtc show`."""
    from vtc.eval.bench import Options
    from vtc.eval.show import show

    quiet()
    chosen = Options(
        model=options.model,
        keeps=parse_keeps(options.keep or ""),
        attention=options.attn,
        dtype=options.dtype,
        device=options.device,
    )
    answers = show(
        options.image,
        options.question,
        options.spec,
        chosen,
        options.out,
        frames=options.frames,
        scores=options.scores,
        max_new_tokens=options.max_new_tokens,
    )
    width = max(len(name) for name in answers)
    for name, answer in answers.items():
        print(f"{name.ljust(width)}  {answer}")
    print(f"Written: {options.out}")
    return 0


# ------------------------------------------------------------------------------------------------------ vtc explore


def _add_explore(commands: Any) -> None:
    parser = _command(commands, "explore", "a page to play with, in a browser", EXPLORE_HELP, EXPLORE_EXAMPLE)
    _add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="to listen on (default: a free one from 7860 on)")
    parser.add_argument(
        "--frames", type=int, default=8, metavar="N", help="frames of a clip that the model sees (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.set_defaults(command=run_explore, extra="explore")


def run_explore(options: argparse.Namespace) -> int:
    """`vtc explore`."""
    from vtc.eval import explore_page
    from vtc.eval.bench import Options
    from vtc.eval.explore import Shelf

    quiet()
    chosen = Options(model=options.model, attention=options.attn, dtype=options.dtype, device=options.device)
    explore_page.serve(Shelf(chosen, options.frames, options.max_new_tokens), options.host, options.port)
    return 0


# ------------------------------------------------------------------------------------------------------- vtc report


def _add_report(commands: Any) -> None:
    summary = "tables and pages of a run, or what changed between two"
    parser = _command(commands, "report", summary, REPORT_HELP, REPORT_EXAMPLE)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one run, or two to compare")
    parser.add_argument(
        "--format", metavar="NAME", help="md, csv, latex or html (default: by the name of FILE, else md)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument(
        "--samples",
        type=int,
        default=12,
        metavar="N",
        help="disagreements that the page draws, 0 for none (default: %(default)s)",
    )
    parser.set_defaults(command=run_report, extra="eval")


def run_report(options: argparse.Namespace) -> int:
    """`vtc report`."""
    from vtc.eval import report

    text = report.report(options.runs, report.choose(options.format, options.out), drawings=options.samples)
    if options.out is None:
        print(text, end="")
        return 0
    report.write(text, options.out, options.runs)
    print(f"Written: {options.out}")
    return 0
