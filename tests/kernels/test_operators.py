"""The operators as `torch` sees them, and the dispatcher: what runs, what is imported, what is waited for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vtc import kernels
from vtc.kernels import dispatch
from vtc.kernels.cosine import gram, products
from vtc.kernels.greedy import naive
from watch import Watch

X = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0))
FIRST, WEIGHT = torch.tensor([3, 20]), torch.rand(2, 21, generator=torch.Generator().manual_seed(1))
KEEP = torch.tensor([[0, 4, 9], [2, 3, 5]])
HEADS = X.unflatten(2, (2, 4))  # (B, N, H, D)
OFFSETS = torch.tensor([0, 5, 42])

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "k_center": lambda x: kernels.k_center(x, 5, FIRST),
    "k_center, isolated": lambda x: kernels.k_center(x, 5),
    "k_center, weighted": lambda x: kernels.k_center(x, 5, FIRST, WEIGHT),
    "max_sum": lambda x: kernels.max_sum(x, 5, FIRST),
    "most_isolated": lambda x: kernels.most_isolated(x),
    "dpp": lambda x: kernels.dpp(x, WEIGHT, 5),
    "query_rows": lambda x: kernels.query_rows(x.unflatten(2, (2, 4))[:, :1], HEADS, 0.5, WEIGHT > 0.3),
    "received": lambda x: kernels.received(x.unflatten(2, (2, 4)), HEADS, 0.5, causal=True),
    "received_packed": lambda x: kernels.received_packed(
        x.unflatten(2, (2, 4)).flatten(0, 1), HEADS.flatten(0, 1), OFFSETS, 37, 0.5
    ),
    "assign": lambda x: kernels.assign(x, KEEP),
    "merge": lambda x: kernels.merge(x, kernels.assign(x, KEEP), torch.arange(21).expand(2, -1), WEIGHT, 3),
    "density_peaks": lambda x: kernels.density_peaks(x, 5),
    "frame_similarity": lambda x: kernels.frame_similarity(x),
}
OPERATORS = {
    "greedy": (X, 5, FIRST, WEIGHT, False),
    "most_isolated": (X, 8),
    "dpp": (X, WEIGHT, 5),
    "query_rows": (HEADS[:, :2], HEADS, 0.5, None),
    "received": (HEADS.flatten(0, 1), HEADS.flatten(0, 1), OFFSETS, 37, 0.5, False),
    "assign": (X, KEEP, False),
    "merge": (X.clone().requires_grad_(), KEEP % 3, KEEP, WEIGHT[:, :3].clone().requires_grad_(), 3),
    "density_peaks": (X, 3),
}


def test_every_operation_is_among_the_cases() -> None:
    assert {name.partition(",")[0] for name in CALLS} == set(kernels.__all__)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_the_rules_of_torch(name: str) -> None:
    """Schema, fake implementation and gradient agree with what happens, also under `aot_eager`."""
    torch.library.opcheck(getattr(torch.ops.vtc, name).default, OPERATORS[name])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=backend)
    assert torch.equal(compiled(X), CALLS[name](X))


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_left_alone_and_results_repeat(name: str) -> None:
    x = X.clone()
    once = CALLS[name](x)
    assert torch.equal(x, X) and torch.equal(CALLS[name](x), once)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "merge"])
def test_choices_have_no_gradient(name: str) -> None:
    assert not CALLS[name](X.clone().requires_grad_()).requires_grad


def test_gradient_of_merge() -> None:
    x, weight = X.double().requires_grad_(), WEIGHT[:, :3].double().requires_grad_()
    slot, source = torch.tensor([[2, 0, 2], [1, 1, 1]]), torch.tensor([[4, 4, 20], [0, 7, 0]])
    expected = torch.zeros(2, 3, 8, dtype=torch.float64)
    for b in range(2):
        for e in range(3):
            expected[b, slot[b, e]] += (weight[b, e] * x[b, source[b, e]]).detach()
    merged = kernels.merge(x, slot, source, weight, 3)
    assert merged.dtype == torch.float64 and torch.allclose(merged, expected, atol=1e-6)  # sums are float32
    upstream = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    to_x, to_weight = torch.autograd.grad((merged * upstream).sum(), (x, weight))
    rows = torch.stack([upstream[b, slot[b]] for b in range(2)])  # (B, E, C)
    assert torch.allclose(to_weight, (rows * torch.stack([x[b, source[b]] for b in range(2)])).sum(2), atol=1e-5)
    by_hand = torch.zeros_like(x)
    for b in range(2):
        for e in range(3):
            by_hand[b, source[b, e]] += weight[b, e] * rows[b, e]
    assert torch.allclose(to_x, by_hand, atol=1e-5)


@pytest.mark.parametrize("triton", ["unused", "missing"])
def test_the_cpu_needs_no_triton(triton: str) -> None:
    code = f"""
import sys
if {triton == "missing"}:
    sys.modules["triton"] = None
import torch, vtc, vtc.select, vtc.saliency, vtc.selection
from vtc import kernels
x = torch.randn(1, 9, 8)
keep = kernels.k_center(x, 3)
kernels.merge(x, kernels.assign(x, keep), torch.arange(9)[None], torch.ones(1, 9), 3)
kernels.dpp(x, torch.ones(1, 9), 3), kernels.density_peaks(x, 2)
kernels.received(x[:, :, None], x[:, :, None], 1.0), kernels.query_rows(x[:, :1, None], x[:, :, None], 1.0)
assert sys.modules.get("triton") is None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_on_a_gpu_are_float32(dtype: torch.dtype) -> None:
    """What the CPU cannot run, half precision with sums in float32, at least has the right arguments and shapes."""
    with FakeTensorMode():
        x = torch.empty(2, 21, 8, device="cuda", dtype=dtype)
        found, length = gram(x)
        mixed = products(x, torch.empty(2, 3, 8, device="cuda"))
    assert found.shape == (2, 32, 32) and length.shape == (2, 32) and mixed.shape == (2, 21, 3)
    assert found.dtype == length.dtype == mixed.dtype == torch.float32


@pytest.mark.parametrize("half", [False, True])
def test_products_compile_into_one_graph(half: bool) -> None:
    """Outside of the operators, in strategies, they are compiled with what is around them."""
    torch._dynamo.reset()
    with torch.autocast("cpu", enabled=half):
        found, length = torch.compile(gram, fullgraph=True, backend="aot_eager")(X)
    assert torch.equal(found, gram(X)[0]) and torch.equal(length, gram(X)[1])


def on_a_gpu(dtype: torch.dtype = torch.float16, index: int = 0, kind: str = "cuda") -> Tensor:
    """As much of a tensor as the dispatcher looks at."""
    device = torch.device(kind, index)
    return SimpleNamespace(device=device, dtype=dtype, is_floating_point=lambda: dtype.is_floating_point)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_dispatch_by_type(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (8, 0))
    assert dispatch.fused(on_a_gpu(dtype), None) == (dtype != torch.float64)


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [(True, (9, 0), True), (True, (8, 6), True), (True, (7, 5), False), (False, (9, 0), False)],
)
def test_dispatch_by_machine(
    monkeypatch: pytest.MonkeyPatch, installed: bool, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: installed)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    assert dispatch.fused(on_a_gpu(), on_a_gpu(torch.int64)) == expected
    assert not dispatch.fused(on_a_gpu(), on_a_gpu(index=1))
    assert not dispatch.fused(on_a_gpu(), on_a_gpu(kind="cpu"))
    assert not dispatch.fused(X)


def test_the_reference_of_greedy_selection_stays_small() -> None:
    """No tensor of tokens x tokens at a length where that would matter."""
    tokens = 6000
    with Watch() as seen:
        naive.greedy(torch.empty(1, tokens, 8, device="meta"), 3, None, None, False)
    assert tokens < seen.largest <= tokens * 512 and not seen.waits
