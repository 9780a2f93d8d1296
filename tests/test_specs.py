"""Spec strings, the registry, and what users get told when they mistype."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import vtc
from families import FAMILIES
from vtc import compressor
from vtc.compressor import Compressor, Scorer, as_compressors, available, parse, register, strategy
from vtc.errors import SpecError, UnsupportedModelError, VtcError
from vtc.visual import Layout, Visual

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    available()
    monkeypatch.setattr(compressor, "_registry", dict(compressor._registry))


@dataclass(kw_only=True)
class Demo(Compressor):
    """Has a parameter of every kind."""

    count: int = 3
    ratio: float = 0.5
    flag: bool = False
    word: str = "a"
    choice: Literal["one", "two-three"] = "one"
    layer: int | None = None
    share: int | float = 7


def values(hint: Any) -> Iterator[Any]:
    """Some of every kind of value that `hint` allows."""
    for option in (hint,) if get_origin(hint) in (None, Literal) else get_args(hint):
        if get_origin(option) is Literal:
            yield from get_args(option)
        else:
            yield from {
                int: (0, 1, 2, 64, -1, 10**12),
                float: (0.5, 0.1, 1.0, 1e-05, 1 / 3, 2.0),
                bool: (True, False),
                str: ("b", "some-word", "x.y"),
                type(None): (None,),
            }[option]


def same(a: Compressor, b: Compressor) -> bool:
    """Equal with equal types: 1 is not 1.0."""
    pairs = [(getattr(a, item.name), getattr(b, item.name)) for item in fields(a)]
    return type(a) is type(b) and all(x == y and type(x) is type(y) for x, y in pairs)


@pytest.mark.parametrize("name", ["demo", *available()])
def test_round_trip_of_every_parameter(name: str) -> None:
    cls = register("demo")(Demo) if name == "demo" else strategy(name)
    hints, tried = get_type_hints(cls), 0
    for item in fields(cls):
        for value in values(hints[item.name]):
            try:
                one = cls(**{item.name: value})
            except SpecError:  # a value that this strategy refuses
                continue
            assert getattr(one, item.name) == value
            assert same(parse(str(one)), one) and str(parse(str(one))) == str(one)
            assert (f"{item.name}={value}" in str(one)) or value == item.default
            tried += 1
    assert tried >= len(fields(cls))


@pytest.mark.parametrize("name", available())
def test_names_and_defaults(name: str) -> None:
    cls = strategy(name)
    assert issubclass(cls, Compressor) and cls.name == name
    assert all(item.default is not MISSING and item.kw_only for item in fields(cls))
    assert same(parse(name), cls()) and same(parse(name + ":"), cls())
    assert str(cls()) == f"{name}:keep={cls().keep}"


def test_available_is_sorted() -> None:
    assert list(available()) == sorted(available())
    assert {"none", "random", "uniform", "pool", "fastervlm", "vtc-cls", "divprune", "todre"} <= set(available())


def test_spelling_is_forgiving_about_blanks_and_commas() -> None:
    assert same(parse(" fastervlm : keep = 64 , layer = -1 , "), strategy("fastervlm")(keep=64, layer=-1))


def test_a_whole_number_counts_and_a_fraction_is_a_fraction() -> None:
    one, all_of_them = parse("random:keep=1"), parse("random:keep=1.0")
    assert type(one.keep) is int and type(all_of_them.keep) is float
    assert (str(one), str(all_of_them)) == ("random:keep=1", "random:keep=1.0")
    assert one.budget(Layout.frames(1, 3, 3)) == 1
    assert all_of_them.budget(Layout.frames(1, 3, 3)) == 9


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "0.0", "-0.5", "nan", "inf", "1e3", "64.0"])
def test_keep_out_of_range(keep: str) -> None:
    value = float(keep) if set(keep) & set(".nae") else int(keep)
    for make in (lambda: parse(f"fastervlm:keep={keep}"), lambda: strategy("fastervlm")(keep=value)):
        with pytest.raises(SpecError, match=f"keep={value} (is not a fraction|keeps nothing)"):
            make()


@pytest.mark.parametrize("keep", ["true", "True", "None", "half", "64%", "1/4", "0x10", ""])
def test_keep_that_is_no_number(keep: str) -> None:
    with pytest.raises(SpecError, match=r"keep=.* is not a whole number or a fraction"):
        parse(f"fastervlm:keep={keep}")


@pytest.mark.parametrize("keep", [True, False, None, "64", (64,), torch.tensor(64)])
def test_keep_of_the_wrong_type(keep: Any) -> None:
    with pytest.raises(SpecError, match=r"keep=.* is not a whole number or a fraction"):
        strategy("fastervlm")(keep=keep)


@pytest.mark.parametrize(
    ("key", "text"),
    [("count", "1.5"), ("count", "True"), ("count", "x"), ("count", ""), ("ratio", "x"), ("ratio", "None"),
     ("flag", "1"), ("flag", "yes"), ("choice", "three"), ("choice", "ONE"), ("layer", "x"), ("layer", "1.0")],
)  # fmt: skip
def test_text_of_the_wrong_type(key: str, text: str) -> None:
    register("demo")(Demo)
    with pytest.raises(SpecError, match=rf"demo: {key}={text} is not "):
        parse(f"demo:{key}={text}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("count", 1.0), ("count", True), ("count", None), ("count", "3"), ("ratio", "x"), ("ratio", True), ("ratio", None),
     ("flag", 1), ("flag", "true"), ("word", 3), ("word", None), ("choice", "three"), ("choice", None), ("layer", 1.5),
     ("layer", False), ("positions", "kept")],
)  # fmt: skip
def test_values_of_the_wrong_type(key: str, value: Any) -> None:
    register("demo")(Demo)
    with pytest.raises(SpecError, match=f"demo: {key}={value!r} is not "):
        Demo(**{key: value})


def test_a_choice_names_the_choices() -> None:
    with pytest.raises(SpecError, match="'cls' or 'received'"):
        parse("fastervlm:saliency=attention")


def test_a_whole_number_is_a_number() -> None:
    assert register("demo")(Demo)(ratio=1).ratio == 1
    assert parse("demo:ratio=1").ratio == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("fastervml", "fastervlm"), ("FasterVLM", "fastervlm"), ("vtc_cls", "vtc-cls"), ("divprun", "divprune"),
     ("uniforn", "uniform"), ("randon", "random")],
)  # fmt: skip
def test_unknown_strategy_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(SpecError, match=rf"unknown strategy '{typed}' \(did you mean '{meant}'\?\); known: .*todre"):
        parse(f"{typed}:keep=3")


def test_unknown_strategy_far_from_everything() -> None:
    with pytest.raises(SpecError, match="unknown strategy 'xyzzy'; known: "):
        strategy("xyzzy")
    with pytest.raises(SpecError, match="unknown strategy ''"):
        parse("")


@pytest.mark.parametrize(("typed", "meant"), [("kep", "keep"), ("layers", "layer"), ("position", "positions")])
def test_unknown_key_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(SpecError, match=rf"fastervlm has no key '{typed}' \(did you mean '{meant}'\?\); known: keep, "):
        parse(f"fastervlm:{typed}=3")


@pytest.mark.parametrize("key", ["name", "paper", "site", "needs", "__class__", ""])
def test_what_is_not_a_parameter_is_not_a_key(key: str) -> None:
    with pytest.raises(SpecError, match=f"fastervlm has no key '{key}'"):
        parse(f"fastervlm:{key}=3")


def test_duplicate_key() -> None:
    with pytest.raises(SpecError, match=r"'keep' is given twice in 'random:keep=3,seed=1,keep=4'"):
        parse("random:keep=3,seed=1,keep=4")


@pytest.mark.parametrize("spec", ["random:64", "random:keep", "random:keep=3,fast", "random:keep:3"])
def test_not_key_and_value(spec: str) -> None:
    with pytest.raises(SpecError, match="is not key=value"):
        parse(spec)


def test_a_number_alone_is_meant_to_be_kept() -> None:
    for number in ("64", "0.25"):
        with pytest.raises(SpecError, match=f"is not key=value: write keep={number}"):
            parse(f"random:{number}")


def test_errors_are_value_errors() -> None:
    assert issubclass(SpecError, VtcError) and issubclass(VtcError, ValueError)


def test_positional_parameters_are_refused() -> None:
    with pytest.raises(TypeError):
        strategy("random")(64)  # type: ignore[misc]


def test_as_compressors() -> None:
    one = strategy("random")(keep=3)
    assert [str(item) for item in as_compressors("uniform:keep=5")] == ["uniform:keep=5"]
    assert as_compressors(one) == (one,) and as_compressors(one)[0] is one
    assert [str(item) for item in as_compressors(["uniform:keep=5", one])] == ["uniform:keep=5", "random:keep=3"]
    assert len(as_compressors(iter(("random", "pool")))) == 2


def test_as_compressors_refuses() -> None:
    with pytest.raises(SpecError, match="no compressor given"):
        as_compressors([])
    with pytest.raises(SpecError, match=r"spec string or a vtc\.Compressor, not int"):
        as_compressors(["random", 64])  # type: ignore[list-item]
    with pytest.raises(SpecError, match=r"not type: make one, Random\(keep=64\)"):
        as_compressors([strategy("random")])  # type: ignore[list-item]
    for wrong in ({"random": 64}, b"random"):
        with pytest.raises(SpecError, match=f"not {type(wrong).__name__}"):
            as_compressors(wrong)  # type: ignore[arg-type]


def test_register_makes_available() -> None:
    assert register("demo")(Demo) is Demo
    assert "demo" in available() and strategy("demo") is Demo and Demo.name == "demo"
    assert str(parse("demo:count=4")) == "demo:keep=0.25,count=4"


def test_register_twice() -> None:
    """The same class again, as when a cell of a notebook is run again, replaces; another one is refused."""
    register("demo")(Demo)
    again = register("demo")(
        dataclass(kw_only=True)(type("Demo", (Compressor,), {"__qualname__": "Demo", "__module__": __name__}))
    )
    assert strategy("demo") is again
    for name in ("demo", "random"):
        with pytest.raises(SpecError, match=f"a strategy named '{name}' is already registered"):
            register(name)(type("Other", (Compressor,), {}))
    assert strategy("demo") is again and strategy("random").__name__ == "Random"


@pytest.mark.parametrize("name", ["a:b", "a,b", "a=b", "a+b", "a b", "a\tb", ":", " ", ""])
def test_names_that_specs_could_not_hold(name: str) -> None:
    before = available()
    with pytest.raises(SpecError, match="cannot be a strategy name"):
        register(name)(Demo)
    assert available() == before


def test_a_strategy_has_to_select() -> None:
    visual = Visual(Layout.frames(1, 2, 2), 1, CPU, {})
    with pytest.raises(NotImplementedError, match=r"Demo must implement select\(visual\)"):
        Demo().select(visual)

    @dataclass(kw_only=True)
    class Idle(Scorer):
        """Scores nothing."""

    with pytest.raises(NotImplementedError, match=r"Idle must implement score\(visual\)"):
        Idle().select(visual)


def test_what_is_forgotten_above_a_class_is_named() -> None:
    with pytest.raises(SpecError, match=r'write @vtc\.register\("some-name"\)'):
        register(Demo)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"dict is not a compressor"):
        register("demo")(dict)  # type: ignore[type-var]

    class Plain(Compressor):
        """Its parameter is no field."""

        pull: float = 1.0

    register("plain")(Plain)
    with pytest.raises(SpecError, match=r"put @dataclass\(kw_only=True\) above it"):
        parse("plain:pull=2")


def test_parameters_that_no_spec_can_hold() -> None:
    @dataclass(kw_only=True)
    class Bare(Compressor):
        """Its parameter has no default."""

        pull: float

    with pytest.raises(SpecError, match=r"Bare\.pull has no default"):
        register("bare")(Bare)

    @dataclass(kw_only=True)
    class Several(Compressor):
        """Its parameter is of a kind that has no spelling."""

        layers_read: tuple[int, ...] = (1, 2)

    with pytest.raises(SpecError, match=r"Several\.layers_read is tuple\[int, \.\.\.\], which a spec cannot hold"):
        Several()
    register("several")(Several)
    with pytest.raises(SpecError, match=r"several: layers_read=3 is not tuple"):
        parse("several:layers_read=3")


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4), (1, 3)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    @dataclass(kw_only=True)
    class Odd(Scorer):
        """Scores in the wrong shape."""

        def score(self, visual: Visual) -> torch.Tensor:
            return torch.zeros(shape)

    with pytest.raises(
        VtcError, match=rf"one score per token, \(B, N\) = \(1, 4\), not of shape {re.escape(str(shape))}"
    ):
        Odd(keep=2).select(Visual(Layout.frames(1, 2, 2), 1, CPU, {}))


def test_a_scorer_keeps_the_best() -> None:
    @register("norm")
    @dataclass(kw_only=True)
    class Norm(Scorer):
        """Keep the longest features."""

        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"features"})

        def score(self, visual: Visual) -> torch.Tensor:
            return visual.features.norm(dim=-1)

    x = torch.tensor([[[1.0], [3.0], [-3.0], [2.0]]])
    kept = parse("norm:keep=2").select(Visual(Layout.frames(1, 2, 2), 1, CPU, {"features": lambda: x}))
    assert kept.index.tolist() == [[1, 2]]
    assert str(parse("norm:keep=0.5")) == "norm:keep=0.5"


def test_undeclared_needs_are_not_there() -> None:
    with pytest.raises(AttributeError, match=r"Visual\.saliency was not declared: add it to the strategy's `needs`"):
        _ = Visual(Layout.frames(1, 2, 2), 1, CPU, {}).saliency


def test_features_are_loaded_once() -> None:
    calls: list[int] = []
    visual = Visual(Layout.frames(1, 1, 1), 1, CPU, {"features": lambda: calls.append(1) or torch.zeros(1, 1, 1)})  # type: ignore[func-returns-value]
    assert visual.features is visual.features and calls == [1]


def test_needs_are_a_set() -> None:
    @dataclass(kw_only=True)
    class Loose(Scorer):
        """Its needs are a word."""

        needs = "features"  # type: ignore[assignment]

    with pytest.raises(SpecError, match=r"needs is 'features'; it is a set, for example frozenset\(\{'features'\}\)"):
        vtc.compress(FAMILIES["llava"].model(), Loose(keep=2))


def test_what_would_work_keeps_what_was_asked() -> None:
    with pytest.raises(UnsupportedModelError, match="use fastervlm:keep=3,saliency=received,layer=0, "):
        vtc.compress(FAMILIES["llava-siglip"].model(), "fastervlm:keep=3,layer=0")


def test_only_a_model_is_restored() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module, got NoneType"):
        vtc.restore(None)  # type: ignore[arg-type]
