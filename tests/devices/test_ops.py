# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rows of every op on the forward path, in the mode: the same bits among any number of other rows, on any threads."""

import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torchtitan.experiments.rl.unified.devices.checks import check_supported
from torchtitan.experiments.rl.unified.devices.cpu import ops as cpu
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 300

Op = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def linear(dtype: torch.dtype, k: int, n: int, bias: bool = False) -> Op:
    weight, offset = numbers(n, k, dtype=dtype), numbers(n, dtype=dtype) if bias else None
    return lambda x: F.linear(x, weight, offset)


def strided_weight(dtype: torch.dtype, k: int, n: int) -> Op:
    weight = numbers(2 * n, 2 * k, dtype=dtype)[::2, k:]
    return lambda x: F.linear(x, weight)


def plain_weight(dtype: torch.dtype, k: int, n: int) -> Op:
    weight = numbers(k, n, dtype=dtype)
    return lambda x: x @ weight


def batched(dtype: torch.dtype, k: int, n: int) -> Op:
    weight = numbers(3, k, n, dtype=dtype)
    return lambda x: torch.bmm(x.expand(3, -1, -1), weight).transpose(0, 1)


def strided_rows(dtype: torch.dtype, k: int, n: int) -> Op:
    half = (k + 1) // 2
    weight = numbers(n, half, dtype=dtype)
    return lambda x: F.linear(x[:, k - half :], weight)


def three_dimensions(dtype: torch.dtype, k: int, n: int) -> Op:
    weight = numbers(n, k, dtype=dtype)
    return lambda x: F.linear(x[None], weight)[0]


PRODUCTS = {
    "linear": linear,
    "linear with bias": lambda dtype, k, n: linear(dtype, k, n, bias=True),
    "linear, 3 dimensions": three_dimensions,
    "strided weight": strided_weight,
    "strided rows": strided_rows,
    "matmul": plain_weight,
    "bmm": batched,
}


def rms_norm(dtype: torch.dtype, width: int) -> Op:
    weight = numbers(width, dtype=dtype)
    return lambda x: F.rms_norm(x, (width,), weight, 1e-6)


def native_rms_norm(dtype: torch.dtype, width: int) -> Op:
    """As vLLM writes it."""

    def norm(x: Tensor) -> Tensor:
        x = x.float()
        return (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)).to(dtype)

    return norm


ROWWISE = {
    "silu": lambda dtype, width: F.silu,
    "silu and mul, of parts": lambda dtype, width: lambda x: F.silu(x[:, : (width + 1) // 2]) * x[:, width // 2 :],
    "rms_norm": rms_norm,
    "vLLM's rms_norm": native_rms_norm,
    "softmax": lambda dtype, width: lambda x: x.softmax(-1),
    "log_softmax": lambda dtype, width: lambda x: x.float().log_softmax(-1),
    "logsumexp": lambda dtype, width: lambda x: x.float().logsumexp(-1),
    "mean": lambda dtype, width: lambda x: x.mean(-1),
    "exp": lambda dtype, width: torch.exp,
    "cos": lambda dtype, width: torch.cos,
    "mul and add": lambda dtype, width: lambda x: x * 1.7 + x.flip(-1),
}


def rows_that_differ(op: Op, x: Tensor, counts: list[int]) -> list[tuple[int, int]]:
    """(rows, threads) at which `op` gives some row of `x` other bits than among all of them, one thread."""
    torch.set_num_threads(1)
    expected = op(x)
    found = []
    for count in counts:
        rows = torch.randperm(len(x))[:count]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            if not torch.equal(op(x[rows]), expected[rows]):
                found.append((count, threads))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(128, 512), (344, 128), (97, 33), (64, 1), (3, 80)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_of_products(name, k, n, dtype):
    op, x = PRODUCTS[name](dtype, k, n), numbers(ROWS, k, dtype=dtype)
    with batch_invariant_mode():
        assert rows_that_differ(op, x, [*range(1, 71), 128, 257, ROWS]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 80, 128, 872, 1003])
@pytest.mark.parametrize("name", ROWWISE)
def test_rows_of_the_other_ops(name, width, dtype):
    op, x = ROWWISE[name](dtype, width), numbers(ROWS, width, dtype=dtype)
    with batch_invariant_mode():
        assert rows_that_differ(op, x, [*range(1, 71), 128, 257, ROWS]) == []


@pytest.mark.parametrize("name", ["linear", "silu"])
def test_stock_torch_does_not_pass(name):
    op = linear(torch.float32, 344, 128) if name == "linear" else F.silu
    if not rows_that_differ(op, numbers(ROWS, 344 if name == "linear" else 1003, dtype=torch.float32), [*range(1, 71)]):
        pytest.skip(f"this CPU's own {name} is row-invariant")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(128, 512), (344, 128), (97, 33), (1, 64), (3, 20)])
def test_tiles_and_one_call_have_the_same_bits(k, n, dtype):
    x, weight = numbers(100, k, dtype=dtype), numbers(n, k, dtype=dtype)
    with batch_invariant_mode():
        chosen = F.linear(x, weight)
        with cpu.force_path(cpu.Path.TILED):
            assert torch.equal(F.linear(x, weight), chosen)


def test_a_cpu_whose_one_call_differs_computes_in_tiles_and_says_so_once(monkeypatch, caplog):
    x, weight = numbers(50, 123, dtype=torch.float32), numbers(77, 123, dtype=torch.float32)
    with batch_invariant_mode(), cpu.force_path(cpu.Path.TILED):
        tiled = F.linear(x, weight)
    monkeypatch.setattr(cpu, "direct_path_holds", lambda *args: False)
    with batch_invariant_mode(), caplog.at_level(logging.WARNING):
        found = [F.linear(x, weight) for _ in range(3)]
    assert all(torch.equal(tiled, f) for f in found)
    assert [record.getMessage() for record in caplog.records if "(rows, 123) by (123, 77)" in record.getMessage()] == [
        "this CPU's matrix product of (rows, 123) by (123, 77) in torch.float32 depends on the number of rows with "
        f"{torch.get_num_threads()} threads: computing it in tiles of 16 rows, slower and with the same bits everywhere"
    ]


def is_on() -> bool:
    x, weight = torch.ones(1, 8), torch.ones(8, 8)
    with torch.profiler.profile() as profile:
        x @ weight
    # Ours pads one row to a tile.
    return any(event.key == "aten::zeros" for event in profile.key_averages())


def test_nests_and_ends_with_the_outermost_after_an_exception_too():
    assert not is_on()
    with pytest.raises(KeyError):
        with batch_invariant_mode():
            with batch_invariant_mode():
                assert is_on()
            assert is_on()
            raise KeyError
    assert not is_on()
    with batch_invariant_mode():
        assert is_on()
    assert not is_on()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_torchs_own_and_repeat(dtype):
    model = nn.Sequential(nn.Linear(43, 80), nn.SiLU(), nn.RMSNorm(80), nn.Linear(80, 7, bias=False)).to(dtype)
    x = numbers(5, 9, 43, dtype=dtype)

    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [param.grad.clone() for param in model.parameters()]

    expected = gradients(copy.deepcopy(model).double(), x.double())
    with batch_invariant_mode():
        found, again = gradients(model, x), gradients(model, x)
    for f, a, e in zip(found, again, expected, strict=True):
        assert torch.equal(f, a)
        assert (f - e).norm() / e.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -87.5, 88.0, -1e4, 1e4, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_at_the_ends(value, dtype):
    x = torch.full((17,), value, dtype=dtype)
    with batch_invariant_mode():
        found = F.silu(x)
    torch.testing.assert_close(found, F.silu(x), equal_nan=True, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-30)


def test_what_is_not_covered_is_refused_by_name():
    check_supported(nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.RMSNorm(2)), "b": nn.Embedding(2, 2)}))
    with pytest.raises(ValueError, match=r'a\.1 \(LayerNorm\); \[parity\] check = "off"'):
        check_supported(nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))}))
    with pytest.raises(ValueError, match=r"a\.weight in torch.float16"):
        check_supported(nn.ModuleDict({"a": nn.Linear(2, 2, dtype=torch.float16)}))
    quantised = type("Float8Linear", (nn.Linear,), {})
    with pytest.raises(ValueError, match=r"w \(Float8Linear\)"):
        check_supported(nn.ModuleDict({"w": quantised(2, 2)}))
