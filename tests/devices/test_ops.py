# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rows of every op on the forward path, in the mode: the same bits among any number of other rows, on any threads."""

import copy
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchtitan.experiments.rl.unified.devices.checks import ELEMENTWISE, ROWWISE
from torchtitan.experiments.rl.unified.devices.cpu.linear import (
    isa,
    ISAS,
    linear as packed_linear,
    PackedWeight,
    use_isa,
)
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


@pytest.fixture(params=ISAS)
def each_isa(request) -> Iterator[str]:
    try:
        use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    use_isa(None)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def linear(dtype: torch.dtype, k: int, n: int, bias: bool = False) -> Op:
    weight, offset = numbers(n, k, dtype=dtype), numbers(n, dtype=dtype) if bias else None
    return lambda x: F.linear(x, weight, offset)


def packed(dtype: torch.dtype, k: int, n: int) -> Op:
    weight = PackedWeight(numbers(n, k, dtype=dtype))
    return lambda x: packed_linear(x, weight)


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
    "packed": packed,
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


OTHERS = {
    "silu and mul, of parts": lambda dtype, width: lambda x: F.silu(x[:, : (width + 1) // 2]) * x[:, width // 2 :],
    "rms_norm": rms_norm,
    "vLLM's rms_norm": native_rms_norm,
    "log_softmax": lambda dtype, width: lambda x: x.float().log_softmax(-1),
    "logsumexp": lambda dtype, width: lambda x: x.float().logsumexp(-1),
    "exp": lambda dtype, width: torch.exp,
    "cos": lambda dtype, width: torch.cos,
    "mul and add": lambda dtype, width: lambda x: x * 1.7 + x.flip(-1),
}


# How preflight's operations are called; a name alone: torch has it with one argument or two.
KNOWN: dict[str, Op] = {
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
    "pow": lambda x: x**2,
    "rsqrt": lambda x: x.float().rsqrt(),
    "sort": lambda x: x.sort(dim=-1, stable=True)[0],
    "where": lambda x: torch.where(x > 0, x, x.flip(-1)),
    "_log_softmax": lambda x: x.log_softmax(-1),
    "_softmax": lambda x: x.softmax(-1),
    "mean": lambda x: x.mean(-1),
    "silu": F.silu,
}


def known(name: str) -> Op:
    if name in KNOWN:
        return KNOWN[name]
    op = getattr(torch, name)
    return op if name in ("abs", "logical_not", "neg", "relu", "sqrt") else lambda x: op(x, x.flip(-1))


def rows_that_differ(op: Op, x: Tensor, counts: list[int]) -> list[tuple[int, int]]:
    """(rows, threads) at which `op` gives some row of `x` other bits than among all of them, one thread."""
    torch.set_num_threads(1)
    expected = op(x)
    found = []
    for count in counts:
        rows = torch.randperm(len(x))[:count]
        for threads in (1, 2, 8) if count in counts[-3:] else (1, 2):
            torch.set_num_threads(threads)
            if not torch.equal(op(x[rows]), expected[rows]):
                found.append((count, threads))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(128, 512), (344, 128), (97, 33), (64, 1), (1, 80), (1030, 70)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_of_products(name, k, n, dtype, each_isa):
    op, x = PRODUCTS[name](dtype, k, n), numbers(ROWS, k, dtype=dtype)
    with batch_invariant_mode():
        assert rows_that_differ(op, x, [*range(1, 71), 128, 257, ROWS]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["linear", "packed"])
def test_rows_of_a_long_batch(name, dtype, each_isa):
    op, x = PRODUCTS[name](dtype, 520, 600), numbers(4700, 520, dtype=dtype)
    with batch_invariant_mode():
        assert rows_that_differ(op, x, [1, 13, 512, 2049, 4700]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_are_computed_alone(dtype, each_isa):
    x, weight = numbers(70, 300, dtype=dtype), numbers(130, 300, dtype=dtype)
    with batch_invariant_mode():
        whole = F.linear(x, weight)
        for n in (1, 15, 16, 17, 64, 100):
            assert torch.equal(F.linear(x, weight[:n]), whole[:, :n])
            assert torch.equal(F.linear(x, weight[n:]), whole[:, n:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(128, 512), (97, 33), (1, 1), (1030, 70)])
def test_a_packed_weight_has_the_same_bits(k, n, dtype, each_isa):
    bias, weight = numbers(n, dtype=dtype), numbers(n, k, dtype=dtype)
    handle = PackedWeight(torch.zeros_like(weight))
    words = handle.words.data_ptr()
    handle.update(weight)
    assert handle.words.data_ptr() == words
    for rows in (0, 1, 5, 64, 300):
        x = numbers(rows, k, dtype=dtype)
        with batch_invariant_mode():
            assert torch.equal(packed_linear(x, handle), F.linear(x, weight))
            assert torch.equal(packed_linear(x[None], handle, bias), F.linear(x[None], weight, bias))
            assert torch.equal(F.linear(x, weight), x @ weight.t().contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(512, 64, 64), (33, 16, 7), (1, 1)])
def test_weights_packed_as_one(sizes, dtype, each_isa):
    x, weights = numbers(20, 97, dtype=dtype), [numbers(2 * n, 97, dtype=dtype)[::2] for n in sizes]
    handle = PackedWeight(*(torch.zeros_like(w) for w in weights))
    handle.update(*weights)
    with batch_invariant_mode():
        for found, weight in zip(packed_linear(x, handle).split(sizes, -1), weights, strict=True):
            assert torch.equal(found, F.linear(x, weight))


def test_what_a_packed_weight_refuses():
    weight = numbers(4, 3, dtype=torch.float32)
    handle = PackedWeight(weight)
    with pytest.raises(ValueError, match=r"weights of \[\(4, 2\)\].*they are \[n, 3\] in torch.float32, 4 rows"):
        handle.update(weight[:, :2])
    with pytest.raises(ValueError, match="not Half"):
        PackedWeight(weight.half())
    with pytest.raises(ValueError, match="one or more matrices"):
        PackedWeight()
    for x in (torch.ones(2, 17), torch.ones(2, 3).bfloat16()):
        with pytest.raises(ValueError, match="don't meet a packed weight of 4 x 3 in torch.float32"):
            packed_linear(x, handle)
    with pytest.raises(ValueError, match="the bias of a packed weight of 4 rows"):
        packed_linear(torch.ones(2, 3), handle, torch.ones(3))
    with pytest.raises(ValueError, match="has no gradient"):
        packed_linear(torch.ones(2, 3, requires_grad=True), handle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_sums_is_the_stated_one(dtype, each_isa):
    if isa(dtype) not in ("avx2", "avx512"):
        pytest.skip("only fused multiply-adds have the same bits on another CPU")
    # Few bits each: the double-precision product and sum are exact, and rounded once to fp32.
    x, weight = (torch.randint(-255, 256, shape) / 2**7 for shape in ((9, 601), (21, 601)))
    expected = torch.zeros(9, 21)
    for k in range(601):
        expected = (expected.double() + x[:, k, None].double() * weight[None, :, k].double()).float()
    with batch_invariant_mode():
        assert torch.equal(F.linear(x.to(dtype), weight.to(dtype)), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 128, 3072])
def test_products_are_as_exact_as_torchs(k, dtype, each_isa):
    x, weight, bias = numbers(50, k, dtype=dtype), numbers(70, k, dtype=dtype), numbers(70, dtype=dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    with batch_invariant_mode():
        found = F.linear(x, weight, bias)
    # A chain of fp32 sums errs by about sqrt(K) roundings.
    scale = 5 if dtype == torch.float32 else 1.01
    assert (found - expected).norm() <= scale * (F.linear(x, weight, bias) - expected).norm() + 1e-7 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2), (0, 1.25), (-1, 0)])
@pytest.mark.parametrize("shape", [(33,), (1, 33), (70, 33), (70, 1), (1,)])
def test_addmm(shape, beta, alpha, dtype):
    x, weight = numbers(70, 97, dtype=dtype), numbers(97, 33, dtype=dtype)
    bias = numbers(*shape, dtype=dtype) if beta else torch.full(shape, torch.nan, dtype=dtype)
    expected = alpha * (x.double() @ weight.double()) + (beta * bias.double() if beta else 0)
    with batch_invariant_mode():
        found = torch.addmm(bias, x, weight, beta=beta, alpha=alpha)
        few = torch.addmm(bias[:1] if len(shape) == 2 else bias, x[:1], weight, beta=beta, alpha=alpha)
    assert torch.equal(few, found[:1])
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert (found - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bad_number_stays_in_its_row_and_column(bad, dtype, each_isa):
    x, weight = numbers(37, 97, dtype=dtype), numbers(33, 97, dtype=dtype)
    with batch_invariant_mode():
        expected = F.linear(x, weight)
        x[20, 0] = x[20, 96] = weight[10, 0] = weight[10, 96] = bad
        found = F.linear(x, weight)
    assert not found[20].isfinite().any() and not found[:, 10].isfinite().any()
    others = torch.ones(37, 33, dtype=torch.bool)
    others[20], others[:, 10] = False, False
    assert torch.equal(found[others], expected[others])


def test_what_is_not_covered_is_torchs():
    with batch_invariant_mode():
        for m, k, n in ((0, 3, 2), (3, 0, 2), (3, 2, 0)):
            assert torch.equal(torch.mm(torch.ones(m, k), torch.ones(k, n)), torch.full((m, n), float(k)))
            found = torch.addmm(torch.ones(n), torch.ones(m, k), torch.ones(k, n))
            assert torch.equal(found, torch.full((m, n), k + 1.0))
        half = numbers(5, 40, dtype=torch.float16)
        found = half @ half.t()
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            torch.mm(torch.ones(2, 3), torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(torch.ones(2, 3), torch.ones(3, 2).bfloat16())
    assert torch.equal(found, half @ half.t())


def digest(threads: int) -> str:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = hashlib.sha256()
    with batch_invariant_mode():
        for dtype in DTYPES:
            for m, k, n in ((1, 520, 600), (7, 97, 33), (300, 1030, 70)):
                product = F.linear(numbers(m, k, dtype=dtype), numbers(n, k, dtype=dtype))
                found.update(product.float().numpy().tobytes())
    return found.hexdigest()


def test_processes_agree():
    code = "import test_ops; print(test_ops.digest(1))"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
    )
    assert child.stdout.strip() == digest(2)


def test_an_instruction_set_is_chosen_by_name(monkeypatch):
    assert isa(torch.float32) in ("avx2", "avx512") and isa(torch.bfloat16) in ISAS
    best = isa(torch.bfloat16)
    try:
        monkeypatch.setenv("RL_CPU_ISA", "avx2")
        use_isa(None)
        assert isa(torch.float32) == isa(torch.bfloat16) == "avx2"
        monkeypatch.setenv("RL_CPU_ISA", "sse")
        with pytest.raises(ValueError, match="RL_CPU_ISA=sse is none of avx2, avx512, avx512_bf16, amx"):
            use_isa(None)
        if best != "amx":
            with pytest.raises(ValueError, match="RL_CPU_ISA=amx: this CPU's best is"):
                use_isa("amx")
    finally:
        monkeypatch.undo()
        use_isa(None)
    assert isa(torch.bfloat16) == best


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 80, 128, 872, 1003])
@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_the_other_ops(name, width, dtype):
    op, x = OTHERS[name](dtype, width), numbers(ROWS, width, dtype=dtype)
    with batch_invariant_mode():
        assert rows_that_differ(op, x, [*range(1, 71), 128, 257, ROWS]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 128, 1003])
@pytest.mark.parametrize("name", [*ELEMENTWISE, *ROWWISE, "pow", "rsqrt"])
def test_rows_of_what_preflight_knows(name, width, dtype):
    x = numbers(ROWS, width, dtype=dtype)
    with batch_invariant_mode():
        assert rows_that_differ(lambda x: known(name)(x).nan_to_num(0.5), x, [1, 3, 31, 70, ROWS]) == []


@pytest.mark.parametrize("name", ["linear", "silu"])
def test_stock_torch_does_not_pass(name):
    op = linear(torch.float32, 344, 128) if name == "linear" else F.silu
    if not rows_that_differ(op, numbers(ROWS, 344 if name == "linear" else 1003, dtype=torch.float32), [*range(1, 71)]):
        pytest.skip(f"this CPU's own {name} is row-invariant")


def is_on() -> bool:
    return "\nCPU (inactive): " in torch._C._dispatch_dump("aten::mm")


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


class Doubled(torch.autograd.Function):
    """A product in a function with a backward of its own: its forward runs without grad mode."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        seen.append(torch.mm(x, weight))
        return 2 * seen[-1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight.t(), 2 * x.t() @ grad, None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_computes_again_has_the_same_bits(use_reentrant, dtype, each_isa):
    x, weight = (numbers(*shape, dtype=dtype).requires_grad_() for shape in ((3, 1031), (1031, 1031)))
    seen: list[Tensor] = []

    def block(x: Tensor) -> Tensor:
        seen.append(F.linear(x, weight))
        with torch.no_grad():
            seen.append(F.linear(x, weight, weight[0]))
        return Doubled.apply(seen[-2], weight, seen) * torch.bmm(x[None], weight[None])[0]

    with batch_invariant_mode():
        # The input of a first block is a result of torch's formulas too, so that one runs while a block is recomputed.
        middle = checkpoint(block, x, use_reentrant=use_reentrant) / 1031
        checkpoint(block, middle, use_reentrant=use_reentrant).sum().backward()
    first, again = seen[:6], seen[9:] + seen[6:9]
    assert len(seen) == 12
    for f, a in zip(first, again, strict=True):
        assert torch.equal(f, a)


def test_derivative_formulas_call_torchs_products():
    x, weight, grad = (numbers(*shape, dtype=torch.float32) for shape in ((1031, 67), (35, 67), (1031, 35)))
    with batch_invariant_mode():
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        found = torch.autograd.grad(F.linear(*inputs), inputs, grad)
        own = grad @ weight, grad.t() @ x
    for f, expected, other in zip(found, (grad @ weight, grad.t() @ x), own, strict=True):
        assert torch.equal(f, expected)
    assert not torch.equal(found[1], own[1])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -87.5, 88.0, -1e4, 1e4, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_at_the_ends(value, dtype):
    x = torch.full((17,), value, dtype=dtype)
    with batch_invariant_mode():
        found = F.silu(x)
    torch.testing.assert_close(found, F.silu(x), equal_nan=True, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1200, 64), (3, 5, 7), (40, 1003), (1, 29, 4, 32)])
def test_rms_norm_and_its_gradients(shape, dtype):
    x, grad = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype)
    weight = numbers(shape[-1], dtype=dtype)

    def computed(*inputs: Tensor) -> list[Tensor]:
        inputs = [i.detach().requires_grad_() for i in inputs]
        out = F.rms_norm(inputs[0], shape[-1:], inputs[1], 1e-6)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    expected = computed(x.double(), weight.double())
    found = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        with batch_invariant_mode():
            found.append(computed(x, weight))
    for one, two, eight, double in zip(*found, expected, strict=True):
        assert torch.equal(one, two) and torch.equal(one, eight)
        assert (one - double).norm() / double.norm() < (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_graph_made_inside_the_mode_is_walked_outside():
    x = numbers(9, 33, dtype=torch.float32).requires_grad_()
    with batch_invariant_mode():
        out = F.rms_norm(x, (33,), torch.ones(33))
    mix = numbers(9, 33, dtype=torch.float32)
    [found] = torch.autograd.grad((out * mix).sum(), x)
    [expected] = torch.autograd.grad((F.rms_norm(x, (33,), torch.ones(33)) * mix).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_norms_without_weight_or_in_other_dtypes_are_torchs():
    x = numbers(9, 4, 33, dtype=torch.float64).requires_grad_()
    for given, shape, weight in ((x, (33,), torch.ones(33).double()), (x, (4, 33), None), (x.float(), (33,), None)):
        expected, mix = F.rms_norm(given, shape, weight, 1e-5), numbers(*given.shape, dtype=given.dtype)
        with batch_invariant_mode():
            found = F.rms_norm(given, shape, weight, 1e-5)
            [grad] = torch.autograd.grad((found * mix).sum(), x, retain_graph=True)
        assert torch.equal(found, expected)
        other = torch.autograd.grad((expected * mix).sum(), x, retain_graph=True)[0]
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)
