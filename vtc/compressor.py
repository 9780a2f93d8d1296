"""`Compressor` and `Scorer`: the base classes of every strategy, the registry, and the spec strings that name them."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from vtc.errors import SpecError, UnsupportedModelError, VtcError, did_you_mean
from vtc.select import top_k
from vtc.selection import Selection
from vtc.visual import Encoder, Layout, Visual

NEEDS = {
    "input": frozenset({"features", "cls", "received", "logits"}),
    "decoder": frozenset({"features", "attention", "ahead", "exchange"}),
}
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
WORDS[type(None)] = "None"


@dataclass(kw_only=True)
class Compressor:
    """A training-free strategy that decides which visual tokens survive.

    Subclass it as a dataclass whose fields are the strategy's parameters, implement `select`, and put
    `@vtc.register("name")` above it. The class needs a docstring whose first line says what it does.

    Attributes:
        keep: how many tokens survive per visual input (an image, or a clip): an int counts tokens, a float is a
            fraction. `keep=1` is one token, `keep=1.0` is all of them. At a decoder layer fractions are of the tokens
            that arrive there.
        positions: `"original"` keeps the survivors' position ids, `"contiguous"` numbers them without gaps. Text that
            follows moves up accordingly. Strategies set the default to what their paper's code does. Models with
            coordinates for positions (M-RoPE) keep them in either case, as every published port does.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # arXiv id
    code: ClassVar[str] = ""  # repository of the official code, if there is one
    site: ClassVar[str] = "input"

    keep: int | float = 0.25
    positions: Literal["original", "contiguous"] = "original"

    def __post_init__(self) -> None:
        self._check_types()
        if isinstance(self.keep, float) and not 0.0 < self.keep <= 1.0:
            raise SpecError(f"keep={self.keep} is not a fraction: use 0 < keep <= 1.0, or a whole number of tokens")
        if isinstance(self.keep, int) and self.keep < 1:
            raise SpecError(f"keep={self.keep} keeps nothing: use at least 1 token, or a fraction 0 < keep <= 1.0")

    @property
    def needs(self) -> frozenset[str]:
        """What `select` reads of a `Visual`: a subset of `NEEDS` for its site."""
        return frozenset()

    @property
    def adaptive(self) -> bool:
        """Whether the number of survivors depends on content, as some papers have it.

        `select` then gets one visual input at a time and may return any number of survivors. The device is waited for.
        """
        return False

    def layers(self, encoder: Encoder) -> tuple[int, ...]:
        """0-based encoder layers whose saliency row is read, if `needs` says so. Default: the feature layer."""
        return (encoder.feature_layer,)

    def budget(self, layout: Layout) -> int:
        """How many of `layout.tokens` survive: a function of sizes, never of content. At most `layout.tokens`."""
        count = self.keep if isinstance(self.keep, int) else max(1, int(layout.tokens * self.keep + 0.5))
        return min(count, layout.tokens)

    def select(self, visual: Visual) -> Selection:
        """Choose exactly `budget(visual.layout)` tokens of each of the `B` visual inputs."""
        raise NotImplementedError(f"{type(self).__name__} must implement select(visual)")

    def __str__(self) -> str:
        """The spec that makes this compressor: `name:keep=...` and every parameter that differs from its default."""
        parts = [f"keep={self.keep}"]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "keep" and value != _default(item):
                parts.append(f"{item.name}={value}")
        return f"{self.name}:{','.join(parts)}"

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if any(get_origin(option) is not Literal and option not in WORDS for option in _options(hints[item.name])):
                raise SpecError(
                    f"{type(self).__name__}.{item.name} is {hints[item.name]}, which a spec cannot hold; a parameter "
                    "is int, float, bool, str, None or a Literal of words, or several of them joined by |"
                )
            if not _fits(value, hints[item.name]):
                raise SpecError(
                    f"{self.name or type(self).__name__}: {item.name}={value!r} is not {_describe(hints[item.name])}"
                )


@dataclass(kw_only=True)
class Scorer(Compressor):
    """A strategy that gives every token a score and keeps the best; ties go to the lowest index."""

    def score(self, visual: Visual) -> Tensor:
        """`(B, N)` float: larger is kept."""
        raise NotImplementedError(f"{type(self).__name__} must implement score(visual)")

    def select(self, visual: Visual) -> Selection:
        score, tokens = self.score(visual), visual.layout.tokens
        if not isinstance(score, Tensor) or score.ndim != 2 or score.shape[1] != tokens:
            found = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            wanted = (visual.inputs, tokens)
            raise VtcError(f"{self.name}: score() must return one score per token, (B, N) = {wanted}, not {found}")
        return Selection.keep(top_k(score, self.budget(visual.layout)), visual.layout.tokens)


@dataclass(kw_only=True)
class DecoderCompressor(Compressor):
    """A strategy that acts inside the language model, in front of one of its decoder layers or several.

    `Visual.features` are hidden states there, and `Visual.layout` tells the number of tokens that are left, not where
    they came from. `select` keeps `visual.budget` of them.

    Attributes:
        truncate: also remove the dropped tokens from the cache of the layers before. By default these keep all, as in
            the papers, and only later layers are cheaper while decoding.
    """

    site: ClassVar[str] = "decoder"

    truncate: bool = False

    def cuts(self, depth: int) -> tuple[int, ...]:
        """In front of which of `depth` decoder layers it acts, ascending; layer 0 has no layer before it."""
        raise NotImplementedError(f"{type(self).__name__} must implement cuts(depth)")

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        """How many of the `layout.tokens` that arrive at the first cut survive each cut, never increasing."""
        return (self.budget(layout),)


@dataclass(kw_only=True)
class LayerCompressor(DecoderCompressor):
    """A strategy that acts in front of one decoder layer.

    Attributes:
        layer: in front of which decoder layer: from 0, or from the end with -1 as the last, or as a fraction of depth,
            which means the nearest layer that has one before it.
    """

    layer: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_layer()

    def cuts(self, depth: int) -> tuple[int, ...]:
        if isinstance(self.layer, float):
            place = max(1, min(round(self.layer * depth), depth - 1))
        else:
            place = self.layer + depth if self.layer < 0 else self.layer
        if not 0 < place < depth:
            raise UnsupportedModelError(
                f"{self.name}: layer={self.layer} is not in front of a decoder layer that has one before it: this "
                f"language model has {depth} layers; use 1 to {depth - 1}, {1 - depth} to -1, or a fraction"
            )
        return (place,)

    def _check_layer(self) -> None:
        if isinstance(self.layer, float) and not 0.0 < self.layer < 1.0:
            raise SpecError(
                f"{self.name}: layer={self.layer} is not a fraction of depth: use 0 < layer < 1, or a whole number"
            )


C = TypeVar("C", bound=type[Compressor])
_registry: dict[str, type[Compressor]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a `Compressor` available under `name`, in specs and on the command line."""
    if not isinstance(name, str):
        raise SpecError(f'{name!r} is not a name: write @vtc.register("some-name") above the class')

    def add(cls: C) -> C:
        if not issubclass(cls, Compressor):
            raise SpecError(f"{cls.__name__} is not a compressor: make it a subclass of vtc.Scorer or vtc.Compressor")
        for item in fields(cls):
            if item.default is MISSING:
                raise SpecError(f"{cls.__name__}.{item.name} has no default, and a spec may leave out any parameter")
        if not name or any(character in ":,=+" or character.isspace() for character in name):
            raise SpecError(f"'{name}' cannot be a strategy name: it is empty or has one of ':,=+' or a space in it")
        known = _registry.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # running a cell again is fine
            raise SpecError(f"a strategy named '{name}' is already registered: {known.__module__}.{known.__qualname__}")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def available() -> tuple[str, ...]:
    """Names of all registered strategies, sorted."""
    _load_strategies()
    return tuple(sorted(_registry))


def strategy(name: str) -> type[Compressor]:
    """The class registered under `name`."""
    _load_strategies()
    if name not in _registry:
        known = ", ".join(sorted(_registry))
        raise SpecError(f"unknown strategy '{name}'{did_you_mean(name, _registry)}; known: {known}")
    return _registry[name]


def parse(spec: str) -> Compressor:
    """The compressor that `spec` describes: `name` or `name:key=value,key=value`; `str()` gives the spec back."""
    name, _, rest = spec.partition(":")
    cls = strategy(name.strip())
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            meant = f": write keep={part}" if part.replace(".", "", 1).isdecimal() else ""
            raise SpecError(f"'{part}' in '{spec}' is not key=value{meant}")
        if key not in known and key in hints and get_origin(hints[key]) is not ClassVar:
            raise SpecError(
                f"{cls.name} has no key '{key}' because {cls.__name__} is no dataclass: put @dataclass(kw_only=True) "
                "above it, under @vtc.register"
            )
        if key not in known:
            raise SpecError(f"{cls.name} has no key '{key}'{did_you_mean(key, known)}; known: {', '.join(known)}")
        if key in values:
            raise SpecError(f"'{key}' is given twice in '{spec}'")
        values[key] = _read(text, hints[key], f"{cls.name}: {key}")
    return cls(**values)


def as_compressors(spec: str | Compressor | Iterable[str | Compressor]) -> tuple[Compressor, ...]:
    """What `vtc.compress` accepts, as a tuple of compressors. A string may hold several specs, joined by `+`."""
    several = isinstance(spec, Iterable) and not isinstance(spec, str | bytes | Mapping)
    given: list[Any] = list(spec) if several else [spec]  # type: ignore[arg-type]
    items: list[Any] = []
    for item in given:
        items += re.split(r"\+(?=\s*[a-zA-Z])", item) if isinstance(item, str) else [item]
    if not items:
        raise SpecError("no compressor given: name at least one, for example 'fastervlm:keep=64'")
    for item in items:
        if not isinstance(item, str | Compressor):
            meant = f": make one, {item.__name__}(keep=64)" if isinstance(item, type) else ""
            raise SpecError(f"a compressor is a spec string or a vtc.Compressor, not {type(item).__name__}{meant}")
    return tuple(parse(item) if isinstance(item, str) else item for item in items)


def _load_strategies() -> None:
    package = importlib.import_module("vtc.strategies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"vtc.strategies.{module.name}")


def _default(item: Field[Any]) -> Any:
    return item.default if item.default is not MISSING else None


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        if get_origin(option) is Literal:
            if value in get_args(option):
                return True
        elif type(value) is option or (option is float and type(value) is int):
            return True
    return False


def _read(text: str, hint: Any, where: str) -> Any:
    for option in _options(hint):
        if get_origin(option) is Literal:
            if text in get_args(option):
                return text
        elif option is type(None) and text == "None":
            return None
        elif option is bool and text in ("True", "False", "true", "false"):
            return text.lower() == "true"
        elif option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        elif option is str:
            return text
    raise SpecError(f"{where}={text} is not {_describe(hint)}")


def _describe(hint: Any) -> str:
    options = _options(hint)
    if set(options) == {int, float}:
        return "a whole number or a fraction"
    parts: list[str] = []
    for option in options:
        known = get_args(option) if get_origin(option) is Literal else ()
        parts += [repr(word) for word in known] or [WORDS.get(option, str(option))]
    return " or ".join(parts)
