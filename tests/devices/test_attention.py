# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rows of the attention kernel are equal however they are computed; gradients agree with float64."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils import cpp_extension
from torch.utils.checkpoint import checkpoint
from torchtitan.experiments.rl.unified.devices.attention import packed_attention
from torchtitan.experiments.rl.unified.devices.build import load_library
from torchtitan.experiments.rl.unified.devices.cpu.attention import HEAD_SIZES, paged_attention

DTYPES = [torch.float32, torch.bfloat16]
HEADS = 4


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make_qkv(
    tokens: int, head_size: int, kv_heads: int, dtype: torch.dtype, heads: int = HEADS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(tokens, h, head_size).to(dtype) for h in (heads, kv_heads, kv_heads))


def starts_of(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def prefill(qkv: tuple[torch.Tensor, ...], lengths: list[int]) -> torch.Tensor:
    return packed_attention(*qkv, starts_of(lengths), qkv[0].shape[-1] ** -0.5)


def engine(
    qkv: tuple[torch.Tensor, ...], lengths: list[int], schedule: list[list[int]], block_size: int
) -> torch.Tensor:
    """Computes the packed sequences as a serving engine would; returns their rows in packed order.

    schedule[i][s] is how many tokens of sequence s step i takes (less where it ends). Blocks come in random order from
    a cache full of NaN.
    """
    q, k, v = qkv
    starts = starts_of(lengths).tolist()
    columns = -(-max(lengths) // block_size)
    table = torch.randperm(len(lengths) * columns + 3)[: len(lengths) * columns].view(len(lengths), columns).int()
    cache = torch.full((table.numel() + 3, k.shape[1], block_size, 2 * q.shape[2]), float("nan"), dtype=q.dtype)
    done = [0] * len(lengths)
    out = torch.full_like(q, float("nan"))
    for step in schedule:
        taken = [(s, min(n, lengths[s] - done[s])) for s, n in enumerate(step) if min(n, lengths[s] - done[s]) > 0]
        if not taken:
            continue
        positions = [torch.arange(done[s], done[s] + n) for s, n in taken]
        rows = torch.cat([starts[s] + p for (s, _), p in zip(taken, positions, strict=True)])
        slots = [
            table[s, p // block_size].long() * block_size + p % block_size
            for (s, _), p in zip(taken, positions, strict=True)
        ]
        for s, n in taken:
            done[s] += n
        step_out = torch.empty(len(rows), *q.shape[1:], dtype=q.dtype)
        paged_attention(
            q[rows],
            k[rows],
            v[rows],
            cache,
            starts_of([n for _, n in taken]),
            torch.tensor([done[s] for s, _ in taken], dtype=torch.int32),
            table[[s for s, _ in taken]],
            torch.cat(slots),
            q.shape[2] ** -0.5,
            step_out,
        )
        out[rows] = step_out
    assert done == lengths
    return out


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    parts = []
    for q_s, k_s, v_s in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = (x.transpose(0, 1) for x in (q_s, k_s, v_s))
        parts.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_size", [64, 128])
def test_decode_equals_prefill_at_long_contexts(head_size: int, kv_heads: int, dtype: torch.dtype) -> None:
    lengths = [5000, 1500]
    qkv = make_qkv(sum(lengths), head_size, kv_heads, dtype)
    expected = prefill(qkv, lengths)
    schedule = [[1021, 3], [3971, 1490]] + [[1, 1]] * 8
    assert torch.equal(engine(qkv, lengths, schedule, block_size=128), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 96, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_schedule_and_block_table_gives_the_same_rows(threads: int, block_size: int, dtype: torch.dtype) -> None:
    lengths = [1, 31, 32, 33, 64, 65, 130, 200]
    qkv = make_qkv(sum(lengths), 64, 2, dtype)
    expected = prefill(qkv, lengths)
    torch.set_num_threads(threads)
    everything_at_once = [lengths]
    decode_only = [[1] * len(lengths)] * max(lengths)
    odd_chunks = [[7, 1, 32, 33, 64, 0, 100, 13]] * 40 + [[1, 1, 1, 1, 1, 9, 1, 1]] * 8
    for schedule in (everything_at_once, decode_only, odd_chunks):
        assert torch.equal(engine(qkv, lengths, schedule, block_size), expected)
    assert torch.equal(prefill(qkv, lengths), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_head_size_and_number_of_rows(head_size: int, dtype: torch.dtype) -> None:
    for heads, kv_heads in ((8, 1), (6, 2), (5, 5)):
        lengths = [*range(1, 8), 70]
        qkv = make_qkv(sum(lengths), head_size, kv_heads, dtype, heads)
        out = prefill(qkv, lengths)
        assert torch.equal(engine(qkv, lengths, [[1] * len(lengths)] * 70, 32), out)
        exact = reference(*(x.double() for x in qkv), lengths)
        assert relative_error(out, exact) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    lengths = [50, 300, 1]
    qkv = make_qkv(sum(lengths), 64, 2, dtype)
    together = prefill(qkv, lengths)
    alone = prefill(tuple(x[50:350] for x in qkv), [300])
    assert torch.equal(together[50:350], alone)
    for x in qkv:
        x[:50] = float("nan")
    assert torch.equal(prefill(qkv, lengths)[50:], together[50:])


def test_the_comparison_can_fail() -> None:
    """torch's own attention gives a row other bits when it is computed alone."""
    q, k, v = (x.transpose(0, 1) for x in make_qkv(1000, 64, HEADS, torch.float32))
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    last = F.scaled_dot_product_attention(q[:, -1:], k, v)
    assert not torch.equal(full[:, -1:], last)


def test_negative_slots_are_not_written() -> None:
    q, k, v = make_qkv(3, 32, 2, torch.float32)
    cache = torch.zeros(1, 2, 32, 64)
    paged_attention(
        q, k, v, cache, starts_of([3]), torch.tensor([3], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([0, -1, 2]), 1.0, torch.empty_like(q),
    )  # fmt: skip
    keys, values = cache.view(2, 2, 32 * 32).unbind(1)
    assert torch.equal(keys.view(2, 32, 32)[:, :, :3].permute(2, 0, 1), k * torch.tensor([1, 0, 1])[:, None, None])
    assert torch.equal(values.view(2, 32, 32)[:, :3].transpose(0, 1), v * torch.tensor([1, 0, 1])[:, None, None])
    assert cache.count_nonzero() == 2 * 2 * 2 * 32


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("head_size, heads, kv_heads", [(64, 4, 4), (80, 4, 2), (128, 4, 1), (32, 200, 1)])
def test_gradients(head_size: int, heads: int, kv_heads: int, dtype: torch.dtype, bound: float) -> None:
    lengths = [1, 33, 300, 64, 7]
    inputs = [x.requires_grad_() for x in make_qkv(sum(lengths), head_size, kv_heads, dtype, heads)]
    out = prefill(inputs, lengths)
    dout = torch.randn_like(out)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(reference(*exact_inputs, lengths), exact_inputs, dout.double())
    grads = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    for grad, exact_grad, x in zip(grads, exact, inputs, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape
        assert relative_error(grad, exact_grad) <= bound
    torch.set_num_threads(1)
    again = torch.autograd.grad(out, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_checkpointing_and_compile_change_nothing(dtype: torch.dtype) -> None:
    lengths = [40, 100]
    fused = torch.randn(140, 8, 64).to(dtype).requires_grad_()

    def attend(x: torch.Tensor) -> torch.Tensor:
        return prefill(x.split([4, 2, 2], dim=1), lengths)

    def run(function) -> tuple[torch.Tensor, torch.Tensor]:
        out = function(fused)
        return out, torch.autograd.grad(out, fused, torch.ones(()).to(dtype).expand_as(out))[0]

    expected = run(lambda x: prefill([part.contiguous() for part in x.split([4, 2, 2], dim=1)], lengths))
    checkpointed = run(lambda x: checkpoint(attend, x, use_reentrant=False))
    compiled = run(torch.compile(attend, backend="aot_eager", fullgraph=True))
    for out, grad in (run(attend), checkpointed, compiled):
        assert torch.equal(out, expected[0]) and torch.equal(grad, expected[1])
    with torch.no_grad():
        assert torch.equal(attend(fused), expected[0])


def test_bad_input_is_named() -> None:
    q, k, v = make_qkv(8, 64, 2, torch.float32)
    with pytest.raises(ValueError, match="no kernel for head size 48"):
        prefill(make_qkv(8, 48, 2, torch.float32), [8])
    with pytest.raises(ValueError, match="float16"):
        prefill(make_qkv(8, 64, 2, torch.float16), [8])
    with pytest.raises(ValueError, match="differ in dtype"):
        prefill((q, k.bfloat16(), v), [8])
    with pytest.raises(ValueError, match="not a multiple of 3"):
        prefill(make_qkv(8, 64, 3, torch.float32), [8])
    for cu_seqlens in ([0, 7], [1, 8], [0, 5, 3, 8], [0, 9]):
        with pytest.raises(ValueError, match="cu_seqlens must be int32.* end at 8 tokens"):
            packed_attention(q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="cu_seqlens must be int32"):
        packed_attention(q, k, v, torch.tensor([0, 8]), 1.0)


def test_kernels_come_from_a_folder_that_nobody_else_can_write_to(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "torchtitan_rl_unified"
    folder.mkdir(0o700)
    for mode in (0o720, 0o702):
        folder.chmod(mode)
        with pytest.raises(RuntimeError, match=f"{folder} has compiled kernels, and others than you can write to it"):
            load_library.__wrapped__("attention")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(RuntimeError, match="/proc/none.*; XDG_CACHE_HOME names another place"):
        load_library.__wrapped__("attention")


@pytest.mark.slow
def test_a_missing_compiler_is_one_clear_error(tmp_path) -> None:
    code = "from torchtitan.experiments.rl.unified.devices.build import load_library; load_library('attention')"
    env = {**os.environ, "CXX": str(tmp_path / "none"), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: attention.cpp needs a C++ compiler")


@pytest.mark.slow
def test_torch_may_lie_under_a_path_with_a_space(tmp_path) -> None:
    (tmp_path / "a place").mkdir()
    (tmp_path / "a place" / "lib").symlink_to(cpp_extension.TORCH_LIB_PATH)
    code = (
        f"from torch.utils import cpp_extension; cpp_extension.TORCH_LIB_PATH = {str(tmp_path / 'a place/lib')!r}\n"
        "from torchtitan.experiments.rl.unified.devices.build import load_library; load_library('attention')"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "a cache")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=tmp_path)


@pytest.mark.slow
def test_processes_that_build_at_once_all_get_the_library_and_a_damaged_one_is_built_again(tmp_path) -> None:
    code = "from torchtitan.experiments.rl.unified.devices.build import load_library; load_library('attention')"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    kept = set()
    for damage in ("none", "cut", "zeroed", "no compiler"):
        for library in tmp_path.rglob("*.so"):
            if damage == "cut":  # Touching what is not there of a mapped file would be SIGBUS.
                os.truncate(library, 20000)
            # A whole file of other content, where inductor's own copy was not.
            if damage == "zeroed" and library.parent.name == "torchtitan_rl_unified":
                library.write_bytes(bytes(library.stat().st_size))
        env |= {"CXX": str(tmp_path / "none")} if damage == "no compiler" else {}
        running = [subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path) for _ in range(2)]
        assert [process.wait() for process in running] == [0, 0], damage
        (library,) = (tmp_path / "torchtitan_rl_unified").glob("attention-*.so")
        kept.add((library.name, library.stat().st_size))
    assert len(kept) == 1
