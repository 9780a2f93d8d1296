"""The harness: what is asked, how answers are scored, how times are taken, and what a run leaves behind."""

from __future__ import annotations

import inspect
import json
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

import vtc
from checkpoints import TOKENS, save_llava
from families import FAMILIES, ONE_IMAGE
from vtc import adapters, zoo
from vtc.errors import SpecError, UnsupportedModelError, VtcError
from vtc.eval import accuracy, bench, costs, flops, latency, plot, scenes, table, tasks
from vtc.eval.items import Item

LIMIT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "random-llava")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return zoo.load(str(folder))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(scenes.questions("test", LIMIT))


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bench.Row], Path]:
    """One whole run, for all tests that look at its results."""
    out = tmp_path_factory.mktemp("results") / "run"
    options = bench.Options(model=str(folder), specs=("fastervlm", "divprune:keep=3"), keeps=(0.5, 2), limit=LIMIT)
    return bench.run(options, out), out


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(right: int, n: int, low: float, high: float) -> None:
    """The last case is the example of Newcombe (1998)."""
    assert accuracy.wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing_says_nothing() -> None:
    assert accuracy.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("text", ["top-left", " Top-Left.", "top-left\n", '"top-left"'])
def test_normalise_accepts_the_same_word(text: str) -> None:
    assert accuracy.normalise(text) == "top-left"


@pytest.mark.parametrize("text", ["top left", "it is top-left", "top-left top-left", ""])
def test_normalise_keeps_what_differs(text: str) -> None:
    assert accuracy.normalise(text) != "top-left"


def test_batches_hold_every_question_once_without_padding(loaded: Any, items: list[Item]) -> None:
    batches = accuracy.batches(loaded[1], items, 5)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(LIMIT))
    assert max(len(batch.rows) for batch in batches) == 5
    for batch in batches:
        assert bool(batch.inputs["attention_mask"].all())
        assert len(batch.inputs["pixel_values"]) == len(batch.rows)


def test_answers_do_not_depend_on_batches(loaded: Any, items: list[Item]) -> None:
    one, many = (accuracy.answer(*loaded, accuracy.batches(loaded[1], items, size), 3) for size in (1, 16))
    assert one == many
    assert len(set(one)) > 3, "the model must not say the same to everything, or this test says nothing"


@pytest.mark.parametrize("spec", [None, "fastervlm:keep=3", "pool:keep=4"])
def test_encoding_a_picture_once_changes_no_answer(
    spec: str | None, loaded: Any, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    batches = accuracy.batches(processor, items, 16)
    seen = []
    handle = adapters.find(model).encoder.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    with handle, vtc.compress(model, spec) if spec else nullcontext():
        shared = accuracy.answer(model, processor, batches, 3)
        count, _ = sum(seen), seen.clear()
        monkeypatch.setattr(accuracy, "encode_once", lambda model, inputs, pictures: inputs)
        plain = accuracy.answer(model, processor, batches, 3)
    assert shared == plain
    assert sum(seen) == LIMIT
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        assert count == sum(len(set(batch.pictures)) for batch in batches) < LIMIT


def test_blind_prompts_have_no_visual_token(loaded: Any, items: list[Item]) -> None:
    adapter = adapters.find(loaded[0])
    for blind, count in ((False, TOKENS), (True, 0)):
        for batch in accuracy.batches(loaded[1], items, 8, blind=blind):
            assert ("pixel_values" in batch.inputs) is not blind
            assert set(adapter.placeholders(batch.inputs["input_ids"], None)["image"].sum(1).tolist()) == {count}


def test_enough_tokens_for_the_longest_answer(loaded: Any, items: list[Item]) -> None:
    assert accuracy.longest_answer(loaded[1], items) == 2  # one word and the end
    longer = replace(items[0], answer="red square left of the circle")
    assert accuracy.longest_answer(loaded[1], [longer]) == 7


def test_scores_by_type_add_up(items: list[Item]) -> None:
    answers = [item.answer.upper() if i % 3 else "wrong" for i, item in enumerate(items)]
    total, types = accuracy.score(answers, items)
    assert (total.right, total.n) == (LIMIT - 8, LIMIT)
    assert sum(score.right for score in types.values()) == total.right
    assert sum(score.n for score in types.values()) == total.n
    assert set(types) == {item.type for item in items}
    assert total.interval[0] < total.accuracy < total.interval[1]


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    assert accuracy.agreement(["a", "b", "c", ""], ["a", "x", "c", ""]) == 0.75


def test_an_exception_is_not_an_empty_answer(loaded: Any, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded

    def broken(**inputs: Any) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="index out of range") as caught:
        accuracy.answer(model, processor, accuracy.batches(processor, items, 8), 2)
    assert isinstance(caught.value.__cause__, IndexError)


# ----------------------------------------------------------------------------------------------------------- latency


def first(loaded: Any, items: list[Item]) -> dict[str, torch.Tensor]:
    return accuracy.process(loaded[1], [items[0].question], [items[0].media])


def test_run_sees_the_true_lengths(loaded: Any, items: list[Item]) -> None:
    model, inputs = loaded[0], first(loaded, items)
    length = inputs["input_ids"].shape[1]
    text = model.config.text_config
    for keep in (3, None):
        with vtc.compress(model, f"fastervlm:keep={keep}") if keep else nullcontext():
            run = latency.run(model, inputs, 4)
        assert run.length == length - (TOKENS - keep if keep else 0)
        assert run.cache_bytes == flops.kv_cache_bytes(text, run.length, torch.float32)
        assert run.images == 1


def test_parts_are_measured_and_hooks_removed(loaded: Any, items: list[Item]) -> None:
    model = loaded[0]
    latency.run(model, first(loaded, items))  # the first call makes transformers install its own hooks
    before = hooks(model)
    with vtc.compress(model, "divprune:keep=3"):
        compressed = hooks(model)
        run = latency.run(model, first(loaded, items))
        assert hooks(model) == compressed
    assert hooks(model) == before
    assert all(run.parts[part] > 0 for part in latency.PARTS)
    assert sum(run.parts.values()) <= run.ttft


@pytest.mark.parametrize("name", ["qwen2vl", "qwen25vl", "qwen3vl"])
def test_a_projector_inside_the_encoder_counts_once(name: str) -> None:
    family, pause = FAMILIES[name], 0.3
    model = family.make()
    adapters.find(model).projector.register_forward_pre_hook(lambda *args: time.sleep(pause))
    run = latency.run(model, family.batch([ONE_IMAGE]).inputs())
    assert run.parts["projector"] >= 1000 * pause and run.parts["encoder"] > 0
    assert sum(run.parts.values()) <= run.ttft


def test_selection_inside_the_language_model_is_selection(
    loaded: Any, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy that takes its time, in front of the language model and in front of one of its layers."""
    pause = 0.05
    for name in ("uniform", "fastv"):
        cls = vtc.compressor.strategy(name)
        real = cls.select
        monkeypatch.setattr(cls, "select", lambda self, visual, real=real: time.sleep(pause) or real(self, visual))
    with vtc.compress(loaded[0], "uniform:keep=8+fastv:layer=1,keep=3"):
        latency.run(loaded[0], first(loaded, items))  # the first call of a session also checks
        run = latency.run(loaded[0], first(loaded, items))
    assert run.parts["selection"] >= 2 * 1000 * pause
    assert 0 < run.parts["prefill"] <= run.ttft - run.parts["selection"]
    assert sum(run.parts.values()) <= run.ttft


def test_hooks_are_removed_after_an_error(loaded: Any) -> None:
    before = hooks(loaded[0])
    with pytest.raises(Exception, match=r".+"):
        latency.run(loaded[0], {"input_ids": torch.tensor([[10**9]])})
    assert hooks(loaded[0]) == before


def test_decoding_with_the_cache_is_greedy_generation(loaded: Any, items: list[Item]) -> None:
    """What is timed is the work that `generate` does: same tokens, compressed or not."""
    model, inputs = loaded[0], first(loaded, items)
    told: list[int] = []
    real = torch.Tensor.argmax

    def listen(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        token = real(self, *args, **kwargs)
        if self.shape[-1] == len(loaded[1].tokenizer):
            told.append(int(token))
        return token

    with vtc.compress(model, "random:keep=5"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "argmax", listen)
            latency.run(model, inputs, 6)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, suppress_tokens=None)
    assert told == tokens[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_second_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--device cuda:1` the current GPU is still the first one, on which nothing happens."""
    asked: list[torch.device] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: torch.device) -> None:
            asked.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
    clock = latency.Clock(torch.device("cuda:1"))
    clock.now()
    clock.wait()
    clock.forget_peak()
    assert clock.peak() == 7
    assert asked == [torch.device("cuda:1")] * 4
    assert latency.Clock(torch.device("cpu")).peak() is None


def test_measurements_are_interleaved_and_compared_per_repeat(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times: a machine that gets ten times slower half-way through must not change the speed-up."""
    order: list[str] = []
    compressed = False
    slow = iter([50.0, 50.0] + [1.0] * 3 + [10.0] * 2)  # two warm-ups, then five repeats
    factor = 0.0

    @contextmanager
    def setting() -> Any:
        nonlocal compressed
        compressed = True
        yield
        compressed = False

    def run(model: Any, inputs: Any, tokens: int = 1) -> latency.Run:
        nonlocal factor
        if tokens == 1:  # not timed: an absurd result must not count
            return latency.Run({}, 1e9, 1e9, 7, 1, 64, None)
        if not compressed:
            factor = next(slow)
        order.append("ours" if compressed else "bare")
        ttft, prefill = (40 * factor, 20 * factor) if compressed else (100 * factor, 80 * factor)
        parts = {"encoder": 10 * factor, "projector": 0.0, "selection": 5 * factor, "prefill": prefill}
        return latency.Run(parts, ttft, 15 * factor, 7, 1, 64, None)

    def bare_prefill(model: Any, batch: int, length: int) -> float:
        order.append("ideal")
        assert length == 7
        return 15 * factor

    monkeypatch.setattr(latency, "run", run)
    monkeypatch.setattr(latency, "bare_prefill", bare_prefill)
    inputs = {"input_ids": torch.zeros(1, 9, dtype=torch.long)}
    found = latency.measure(loaded[0], inputs, setting, repeats=5, warmup=2, decode_tokens=4)
    assert order == ["bare", "ours", "ideal"] * 7
    assert found.ttft_speedup == pytest.approx(2.5)
    assert (found.ttft_ms, found.baseline_ttft_ms) == (40, 100)
    assert found.ideal_ttft_ms == 100 - 80 + 15
    assert (found.encoder_ms, found.selection_ms, found.prefill_ms, found.other_ms) == (10, 5, 20, 5)
    assert found.ttft_iqr_ms > 0
    assert found.decode_tokens_per_s == pytest.approx(3 * 1000 / 15)
    assert found.peak_memory_bytes is None


# ---------------------------------------------------------------------------------------------------------- the plan


def specs(**options: Any) -> list[str]:
    return [setting.spec for setting in bench.settings(bench.Options(**options))]


def test_baselines_join_every_run() -> None:
    assert specs(specs=("fastervlm",), keeps=(0.25,)) == [
        "none",
        "blind",
        "fastervlm:keep=0.25",
        *("random:keep=0.25", "random:keep=0.25,seed=1", "random:keep=0.25,seed=2"),
        "uniform:keep=0.25",
        "pool:keep=0.25",
        "downsample:keep=0.25",
    ]


def test_no_setting_occurs_twice() -> None:
    found = specs(specs=("random", "pool", "pool:keep=0.25", "none", "uniform"), keeps=(0.25, 9))
    assert len(found) == len(set(found)) == 2 + 2 * 3 + 2 * 3


def test_specs_are_composed_and_the_first_budget_varies() -> None:
    found = specs(specs=("divprune+fastv:layer=1,keep=0.5",), keeps=(0.5, 9))
    assert [spec for spec in found if "fastv" in spec] == [
        "divprune:keep=0.5+fastv:keep=0.5,layer=1",
        "divprune:keep=9+fastv:keep=0.5,layer=1",
    ]


def test_a_spec_with_its_own_keep_keeps_it() -> None:
    found = specs(specs=("fastervlm:keep=7", "divprune"), keeps=(0.5,))
    assert "fastervlm:keep=7" in found and "fastervlm:keep=0.5" not in found and "divprune:keep=0.5" in found
    assert "uniform:keep=7" in found, "baselines are there at every budget that occurs"


def test_budgets_that_no_spec_uses_are_not_measured() -> None:
    assert not [spec for spec in specs(specs=("fastervlm:keep=7",), keeps=(0.5,)) if "0.5" in spec]


def test_one_token_is_not_all_tokens() -> None:
    found = specs(specs=("uniform",), keeps=(1, 1.0))
    assert "uniform:keep=1" in found and "uniform:keep=1.0" in found


def test_random_with_a_seed_is_that_seed_and_the_baseline_starts_at_the_seed_given() -> None:
    found = specs(specs=("random:keep=0.5,seed=40",), seed=10)
    assert [spec for spec in found if spec.startswith("random")] == [
        f"random:keep=0.5,seed={seed}" for seed in (40, 10, 11, 12)
    ]


def test_without_specs_all_strategies_run() -> None:
    names = {setting.name for setting in bench.settings(bench.Options(keeps=(0.5,)))}
    assert names == {*vtc.available(), "blind", "downsample"}


def test_a_strategy_that_keeps_nothing_runs_once_and_no_baseline_follows_it() -> None:
    found = specs(specs=("todre-inner", "todre-inner:tau=0.1"), keeps=(0.5, 2))
    assert found[2:4] == ["todre-inner:keep=0", "todre-inner:keep=0,tau=0.1"]
    assert {spec.partition("keep=")[2].partition(",")[0] for spec in found[4:]} == {"0.5", "2"}


def test_positions_override_reaches_every_compressor() -> None:
    for word in ("original", "contiguous"):
        plan = bench.settings(bench.Options(specs=("fastervlm",), positions=word))  # type: ignore[arg-type]
        assert {one.compressor.positions for one in plan if one.compressor} == {word}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "--limit is 0"),
        ({"batch_size": -3}, "--batch-size is -3"),
        ({"dtype": "float12"}, "one of float32"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"keeps": (0.5, 1.5)}, "keep=1.5 is not a fraction"),
        ({"keeps": (0,)}, "keep=0 keeps nothing"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VtcError, match=message):
        bench.Options(**options)


@pytest.mark.parametrize("task", tasks.TRAINED)
def test_a_bundled_model_is_asked_what_it_was_trained_for(task: str) -> None:
    assert bench.Options(model=tasks.TRAINED[task]).asked == task
    assert bench.Options(model="elsewhere/some-llava").asked == "scenes"
    assert bench.Options(model=tasks.TRAINED[task], task="clips").asked == "clips"


# ----------------------------------------------------------------------------------------------------------- the run


def test_rows_have_what_they_should(finished: Any, folder: Path) -> None:
    rows, out = finished
    assert bench.read(out / "rows.jsonl") == json.loads(json.dumps(rows))
    for row in rows:
        assert row["model"] == str(folder)
        assert row["n"] == LIMIT
        assert set(row["versions"]) == {"vtc", "torch", "transformers", "python"}
        assert (row["dtype"], row["attention"], row["flops_convention"]) == ("float32", "sdpa", "exact")
        assert row["accuracy_ci"][0] <= row["accuracy"] <= row["accuracy_ci"][1]
        assert sum(kind["n"] for kind in row["by_type"].values()) == LIMIT
        assert min(row[key] for key in ("ttft_ms", "ideal_ttft_ms", "decode_tokens_per_s", "kv_cache_bytes")) > 0
        assert row["date"] and row["device"] and row["threads"] >= 1


def test_rows_tell_tokens_and_flops(finished: Any) -> None:
    rows = {row["spec"]: row for row in finished[0]}
    full, half, blind = rows["none"], rows["fastervlm:keep=0.5"], rows["blind"]
    text = full["sequence_in"] - TOKENS
    assert (full["tokens_in"], full["tokens_out"], full["sequence_out"]) == (TOKENS, TOKENS, text + TOKENS)
    assert (half["tokens_in"], half["tokens_out"], half["sequence_out"]) == (TOKENS, TOKENS // 2, text + TOKENS // 2)
    assert rows["divprune:keep=3"]["tokens_out"] == 3
    assert (blind["tokens_in"], blind["tokens_out"], blind["sequence_out"]) == (0, 0, text)
    assert (blind["encoder_flops"], blind["projector_flops"], blind["encoder_ms"]) == (0, 0, 0)
    assert full["prefill_flops_ratio"] == 1 > half["prefill_flops_ratio"] > blind["prefill_flops_ratio"] > 0
    assert full["kv_cache_bytes"] > half["kv_cache_bytes"] > blind["kv_cache_bytes"]


def test_the_work_of_selection_is_counted_where_there_is_a_closed_form(loaded: Any, items: list[Item]) -> None:
    model, inputs = loaded[0], first(loaded, items)
    text = inputs["input_ids"].shape[1] - TOKENS
    row, pairs, chosen = TOKENS * 32, TOKENS**2 * 32, 5 * TOKENS * 32  # encoder and language model are 32 wide
    asked = 32 * 32 + (5 + text) * 32  # the last token's query, and that with the keys
    wanted = {
        "uniform:keep=5": 0,
        "fastervlm:keep=5": row,
        "divprune:keep=5": pairs,
        "todre:keep=5,seed=3,positions=original": row + chosen,
        "divprune:keep=5+fastv:layer=1,keep=3": pairs + asked,
        "fastv:layer=1,keep=1.0": 0,  # nothing is dropped
        "todre:keep=5,pivot=mean": None,  # another pivot, other work
    }
    for spec, macs in wanted.items():
        setting = bench.Setting("asked", vtc.compressor.as_compressors(spec))
        found = costs.sizes(model, setting, inputs).selection_flops
        assert found == (None if macs is None else 2 * macs), spec
    assert costs.sizes(model, bench.Setting("none"), inputs).selection_flops == 0


def test_measured_and_computed_cache_agree(finished: Any, loaded: Any) -> None:
    for row in finished[0]:
        closed = flops.kv_cache_bytes(loaded[0].config.text_config, row["sequence_out"], torch.float32)
        assert row["kv_cache_bytes"] == closed, row["spec"]


def test_agreement_is_with_the_uncompressed_model(finished: Any) -> None:
    rows = {row["spec"]: row for row in finished[0]}
    assert rows["none"]["agreement"] == 1
    assert rows["fastervlm:keep=2"]["agreement"] < 1, "a random model must notice that tokens are gone"


def test_random_has_one_row_per_seed(finished: Any) -> None:
    found = [(row["keep"], row["seed"]) for row in finished[0] if row["strategy"] == "random"]
    assert found == [(keep, seed) for keep in (0.5, 2, 3) for seed in (0, 1, 2)]


def test_a_run_that_dies_keeps_its_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = accuracy.answer, iter(range(9))

    def fails_later(*args: Any) -> list[str]:
        if next(calls) == 2:
            raise RuntimeError("no answer to questions 0 and others: out of memory")
        return real(*args)

    monkeypatch.setattr(accuracy, "answer", fails_later)
    options = bench.Options(model=str(folder), specs=("uniform:keep=3",), limit=4, latency=False)
    with pytest.raises(RuntimeError, match=r"uniform:keep=3: no answer .* out of memory"):
        bench.run(options, tmp_path)
    assert [row["spec"] for row in bench.read(tmp_path / "rows.jsonl")] == ["none", "blind"]


def test_a_mistake_in_the_last_spec_shows_before_anything_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.Bench, "rows", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(SpecError, match=f"more than the {TOKENS} visual tokens"):
        bench.run(bench.Options(model=str(folder), specs=("uniform:keep=3", "uniform:keep=17")), tmp_path)


def test_without_specs_what_the_model_cannot_do_is_left_out(tmp_path: Path) -> None:
    folder = save_llava(tmp_path / "siglip", "siglip")
    options = bench.Options(model=str(folder), keeps=(3,), limit=2, latency=False)
    ran = {row["strategy"] for row in bench.run(options, tmp_path / "out")}
    assert {"none", "blind", "random", "uniform", "pool", "divprune"} <= ran
    assert not ran & {"fastervlm", "vtc-cls"}, "this tower has no class token"
    with pytest.raises(UnsupportedModelError, match="fastervlm"):
        bench.run(replace(options, specs=("fastervlm",)), tmp_path / "other")


def test_earlier_results_are_refused_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"precious": 1}\n')
    options = bench.Options(model=str(folder), specs=("uniform:keep=3",), limit=2, latency=False)
    with pytest.raises(VtcError, match="--overwrite"):
        bench.run(options, tmp_path)
    assert "precious" in (tmp_path / "rows.jsonl").read_text()
    # A mistake elsewhere must not cost the old results either.
    with pytest.raises(VtcError, match="17"):
        bench.run(replace(options, specs=("uniform:keep=17",)), tmp_path, overwrite=True)
    assert "precious" in (tmp_path / "rows.jsonl").read_text()
    bench.run(options, tmp_path, overwrite=True)
    assert "precious" not in (tmp_path / "rows.jsonl").read_text()


def test_without_latency_times_are_empty(folder: Path, tmp_path: Path) -> None:
    options = bench.Options(model=str(folder), specs=("uniform:keep=3",), limit=2, latency=False)
    rows = bench.run(options, tmp_path)
    assert {row["ttft_ms"] for row in rows} == {row["decode_tokens_per_s"] for row in rows} == {None}
    assert all(row["kv_cache_bytes"] > 0 for row in rows), "the closed form stays"
    assert "Time to first token" not in table.render(rows)


# ---------------------------------------------------------------------------------------------------- table and plot


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("none", "none"),
        ("fastervlm:keep=0.5", "fastervlm"),
        ("random:keep=3,seed=2", "random"),
        ("todre:keep=0.5,pivot=mean", "todre:pivot=mean"),
    ],
)
def test_label_leaves_out_keep_and_seed(spec: str, name: str) -> None:
    assert table.label(spec) == name


def test_table_has_one_line_per_setting_and_one_for_all_seeds(finished: Any) -> None:
    rows = finished[0]
    text = table.render(rows)
    results = text.split("## Results")[1].split("##")[0]
    lines = [line.split("|")[1:-1] for line in results.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 2 + 3 + (1 + 1 + 1) * 3
    assert {len(line) for line in lines} == {9}
    seeds = [100 * row["accuracy"] for row in rows if row["strategy"] == "random" and row["keep"] == 0.5]
    line = next(line for line in lines if line[0].strip() == "random (3 seeds)" and line[1].strip() == "0.5")
    assert line[7].strip() == f"{mean(seeds):.1f} ± {stdev(seeds):.1f}"
    assert [line[0].strip() for line in lines[:2]] == ["none", "blind"]
    for kind in rows[0]["by_type"]:
        assert f" {kind} |" in text


def test_plot_is_a_picture(finished: Any, tmp_path: Path) -> None:
    from PIL import Image

    plot.pareto(finished[0], tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert min(picture.size) > 400


def test_front_is_what_nothing_cheaper_beats() -> None:
    def row(name: str, tokens: int, share: float) -> dict[str, Any]:
        return {
            "strategy": name,
            "spec": f"{name}:keep={tokens}",
            "keep": tokens,
            "tokens_out": tokens,
            "accuracy": share,
        }

    rows = [row("a", 10, 0.5), row("a", 20, 0.4), row("b", 30, 0.75), row("b", 10, 0.25), row("blind", 0, 0.9)]
    rows.append(row("none", 99, 0.7))
    assert plot._front(rows, lambda row: row["tokens_out"]) == [(10, 50), (30, 75), (99, 75)]


# --------------------------------------------------------------------------------------------------- the trained model


def test_the_bundled_model_tells_good_selections_from_bad_ones(tmp_path: Path) -> None:
    """The point of the whole harness, on 100 questions: what a random model cannot show."""
    options = bench.Options(specs=("fastervlm", "divprune"), keeps=(28,), limit=100, latency=False)
    share = {row["spec"]: row["accuracy"] for row in bench.run(options, tmp_path)}
    random = [share[f"random:keep=28{seed}"] for seed in ("", ",seed=1", ",seed=2")]
    assert share["none"] > 0.9
    assert share["blind"] < 0.4
    for spec in ("fastervlm:keep=28", "divprune:keep=28"):
        assert share["none"] > share[spec] > mean(random) + 0.08
    assert share["pool:keep=28"] < share["none"] - 0.1
