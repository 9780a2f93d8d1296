"""What `vtc bench` compares: its options, and the settings that follow from them.

A setting is a compressor, or a baseline. Every run has `none`, the uncompressed model, and `blind`, the same prompts
without what they show. The strategies `random` (three seeds), `uniform` and `pool` join every run at every `keep` that
occurs in it, and so does `downsample`, which compresses nothing: it scales pictures down before the model sees them, to
about as many visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

import vtc
from vtc.compressor import Compressor, as_compressors, available, parse
from vtc.errors import SpecError, VtcError
from vtc.eval import tasks
from vtc.eval.made_up import MadeUp

BASELINES = ("random", "uniform", "pool")
DOWNSAMPLE = "downsample"
SEEDS = 3  # of `random`, which is reported as a mean with its spread
KEEPS: tuple[int | float, ...] = (0.5, 0.25, 0.11)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What to compare and how; the command line's options."""

    model: str = "tiny-llava"
    task: str | None = None  # by default the one that a bundled model was trained for
    specs: tuple[str, ...] = ()  # all strategies if empty
    keeps: tuple[int | float, ...] = KEEPS  # for specs that do not name their own
    limit: int | None = None  # number of questions
    batch_size: int = 50
    seed: int = 0
    attention: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    positions: Literal["original", "contiguous"] | None = None  # overrides every strategy's own
    latency: bool = True
    repeats: int = 9  # of each time
    made_up: MadeUp | None = None  # the prompt for random weights, which answer nothing; `model` is an architecture

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("repeats", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise VtcError(f"--{name.replace('_', '-')} is {value}; use at least {least}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise VtcError(f"--dtype is '{self.dtype}'; use one of {', '.join(DTYPES)}")
        for keep in self.keeps:
            Compressor(keep=keep)  # refuses what is out of range
        if self.made_up is not None and not (self.task is None and self.limit is None):
            raise VtcError("a model with random weights is asked nothing: leave --task and --limit out")
        tasks.check(self.asked)
        check_device(self.device)

    @property
    def asked(self) -> str:
        """The task whose questions are asked, if any are."""
        return self.task or tasks.task_of(self.model)

    @property
    def name(self) -> str:
        """The model, as results call it."""
        return self.model if self.made_up is None else f"{self.model}, random weights"


@dataclass(frozen=True)
class Setting:
    """One line of the comparison."""

    name: str  # "none", "blind", "downsample", or the strategies
    compressors: tuple[Compressor, ...] = ()  # the budgets vary that of the first
    scaled: int | float | None = None  # to how many visual tokens pictures are scaled down, in the manner of `keep`

    @property
    def spec(self) -> str:
        if self.scaled is not None:
            return f"{self.name}:keep={self.scaled}"
        return "+".join(str(one) for one in self.compressors) or self.name

    @property
    def compressor(self) -> Compressor | None:
        return self.compressors[0] if self.compressors else None

    @property
    def blind(self) -> bool:
        return self.name == "blind"

    @property
    def keep(self) -> int | float:
        if self.scaled is not None:
            return self.scaled
        if self.compressor is not None:
            return self.compressor.keep
        return 0.0 if self.blind else 1.0

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """The context in which `model` is compressed like this."""
        return vtc.compress(model, self.compressors) if self.compressors else nullcontext()


def check_device(name: str) -> None:
    """Refuse a device that does not exist here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise VtcError(f"device '{name}' is not available here; use one of: {have}") from error


def settings(options: Options) -> list[Setting]:
    """All settings of a run, each once: `none` and `blind`, then strategy by strategy, the largest budget first."""
    if not options.keeps:
        raise SpecError("--keep names no budget: give at least one, for example 0.25")
    specs = options.specs or tuple(name for name in available() if name != "none")
    seeds = SEEDS if options.made_up is None else 1  # where nothing is answered, seeds do not differ
    asked = [one for spec in specs if not _scales(spec) for one in _expand(spec, options.keeps, options.seed, seeds)]
    scaled = [keep for spec in specs if _scales(spec) for keep in _scaled(spec, options.keeps)]
    keeps = _distinct([*(one[0].keep for one in asked if one[0].keep), *scaled]) or options.keeps  # baselines keep some
    usual = [one for name in BASELINES for one in _expand(name, keeps, options.seed, seeds)]
    found: dict[str, Setting] = {}
    for compressors in [*asked, *usual]:
        if options.positions is not None:
            compressors = tuple(replace(one, positions=options.positions) for one in compressors)
        setting = Setting("+".join(one.name for one in compressors), compressors)
        found.setdefault(setting.spec, setting)
    order = _distinct([setting.name for setting in found.values()])
    compressed = sorted(found.values(), key=lambda setting: order.index(setting.name))  # stable
    return [Setting("none"), Setting("blind"), *compressed, *(Setting(DOWNSAMPLE, scaled=keep) for keep in keeps)]


def budgets(spec: str, keeps: Sequence[int | float]) -> list[tuple[Compressor, ...]]:
    """The compressors of `spec` once per budget of the first, or as the spec asks itself; without `keeps`, the default.

    A strategy that by default keeps nothing has no budget to vary.
    """
    first, *others = as_compressors(spec)
    if "keep" in named(spec) or not keeps or first.keep == 0:
        return [(first, *others)]
    return [(replace(first, keep=keep), *others) for keep in keeps]


def _expand(spec: str, keeps: Sequence[int | float], seed: int, seeds: int) -> list[tuple[Compressor, ...]]:
    """The settings that a spec stands for: its budgets, and several seeds of `random` unless it names one."""
    if as_compressors(spec)[0].name == "none":
        return []  # every run has it
    found = budgets(spec, keeps)
    first = found[0][0]
    if first.name != "random" or "seed" in named(spec):
        return found
    return [(parse(f"{one},seed={seed + k}"), *others) for one, *others in found for k in range(seeds)]


def _scales(spec: str) -> bool:
    return spec.partition("+")[0].partition(":")[0].strip() == DOWNSAMPLE


def _scaled(spec: str, keeps: Sequence[int | float]) -> list[int | float]:
    """The budgets of `downsample` or `downsample:keep=0.25`. It is no compressor, so nothing else can be set."""
    if "+" in spec:
        raise SpecError(f"{spec}: downsample is no compressor, so nothing can follow it; give it alone")
    if others := named(spec) - {"keep", ""}:
        raise SpecError(f"{spec}: downsample has no '{others.pop()}'; all that can be set is keep")
    return [one.keep for one, *_ in budgets(spec.replace(DOWNSAMPLE, BASELINES[1], 1), keeps)]


def named(spec: str) -> set[str]:
    """The keys that the first compressor of a spec is given."""
    return {part.partition("=")[0].strip() for part in spec.partition("+")[0].partition(":")[2].split(",")}


def _distinct(values: Sequence[Any]) -> list[Any]:
    # The key tells the int 1 (one token) from the float 1.0 (all of them).
    return list({(type(value), value): value for value in values}.values())
