# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""On a GPU: a row has the same bits in the engine's kernels and in the trainer's, and gradients agree with float64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.experiments.rl.unified.devices.attention import packed_attention
from torchtitan.experiments.rl.unified.devices.cuda import DEVICE
from torchtitan.experiments.rl.unified.devices.cuda.packed import HEAD_SIZES, LEAST_QUERIES
from torchtitan.experiments.rl.unified.devices.mode import backward_arithmetic, batch_invariant_mode

needs_gpu = pytest.mark.gpu

# (K, N) of Qwen3-0.6B's products: q, k and v, the attention's output, gate and up, down; and of its logits.
PRODUCTS = [(1024, 2048), (1024, 1024), (2048, 1024), (1024, 3072), (3072, 1024), (1024, 151936)]
ROW_COUNTS = [*range(1, 71), 96, 128, 200, 257, 384, 512, 1000]
# Norm of the difference over the norm, against float64.
GRADIENT_ERROR = 1e-2


@pytest.fixture
def mode() -> Iterator[None]:
    torch.manual_seed(0)
    with batch_invariant_mode():
        yield


def qkv_of(tokens: int, head_size: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(tokens, h, head_size, device="cuda").bfloat16() for h in (heads, kv_heads, kv_heads))


def starts_of(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().cuda()


def engine_rows(qkv, lengths: list[int], steps: list[list[int]], block_size: int) -> torch.Tensor:
    """vLLM's paged FlashAttention over steps that compute so many new tokens of each sequence; rows in packed order."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query, key, value = qkv
    blocks = -(-max(lengths) // block_size)
    table = torch.randperm(len(lengths) * blocks, device="cuda", dtype=torch.int32).view(len(lengths), blocks)
    caches = [torch.randn(table.numel(), block_size, *key.shape[1:], device="cuda").bfloat16() for _ in range(2)]
    starts = starts_of(lengths).tolist()
    for sequence, length in enumerate(lengths):
        positions = torch.arange(length, device="cuda")
        slots = table[sequence][positions // block_size].long(), positions % block_size
        for cache, x in zip(caches, (key, value), strict=True):
            cache[slots] = x[starts[sequence] :][:length]
    out, done = torch.full_like(query, torch.nan), [0] * len(lengths)
    for new in steps:
        running = [i for i, count in enumerate(new) if count]
        rows = torch.cat([torch.arange(starts[i] + done[i], starts[i] + done[i] + new[i]) for i in running]).cuda()
        done = [d + count for d, count in zip(done, new, strict=True)]
        out[rows] = flash_attn_varlen_func(
            query[rows],
            *caches,
            max_seqlen_q=max(LEAST_QUERIES, *new),
            cu_seqlens_q=starts_of([new[i] for i in running]),
            max_seqlen_k=max(done),
            seqused_k=torch.tensor([done[i] for i in running], dtype=torch.int32, device="cuda"),
            block_table=table[running],
            softmax_scale=query.shape[-1] ** -0.5,
            causal=True,
            window_size=[-1, -1],
            num_splits=1,
            fa_version=3,
        )
    return out


@needs_gpu
@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (16, 8), (8, 1)])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rows_decoded_prefilled_and_chunked_are_the_packed_rows(mode, head_size, heads, kv_heads):
    lengths = [1, 2, 33, 127, 128, 129, 640, 1500, 4000]
    qkv = qkv_of(sum(lengths), head_size, heads, kv_heads)
    packed = packed_attention(*qkv, starts_of(lengths), head_size**-0.5)
    prefill = [lengths]
    chunks = [[max(0, min(300, length - 300 * step)) for length in lengths] for step in range(14)]
    last = [[length - 1 for length in lengths], [1] * len(lengths)]
    for block_size in (16, 32):
        for name, steps in {"prefill": prefill, "chunks": chunks, "decode": last}.items():
            assert torch.equal(engine_rows(qkv, lengths, steps, block_size), packed), (name, block_size)


@needs_gpu
def test_every_context_length_is_decoded_as_it_is_packed(mode):
    for head_size in HEAD_SIZES:
        qkv = qkv_of(600, head_size, 4, 2)
        packed = packed_attention(*qkv, starts_of([600]), head_size**-0.5)
        assert torch.equal(engine_rows(qkv, [600], [[1]] * 600, 32), packed), head_size


@needs_gpu
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_attention_gradients_agree_with_float64_and_repeat(head_size):
    torch.manual_seed(0)
    lengths = [1, 60, 129, 300]
    leaves = [x.requires_grad_() for x in qkv_of(sum(lengths), head_size, 8, 2)]
    grad = torch.randn(sum(lengths), 8, head_size, device="cuda").bfloat16()
    out = packed_attention(*leaves, starts_of(lengths), head_size**-0.5, max(lengths))
    grads, again = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for _ in range(2))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    pieces = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True, enable_gqa=True)
        for part in zip(*(x.split(lengths) for x in exact), strict=True)
    ]
    exact_out = torch.cat([x.transpose(0, 1) for x in pieces])
    exact_grads = torch.autograd.grad(exact_out, exact, grad.double())
    assert (out - exact_out).norm() < GRADIENT_ERROR * exact_out.norm()
    for one, two, wanted in zip(grads, again, exact_grads, strict=True):
        assert torch.equal(one, two)
        assert (one - wanted).norm() < GRADIENT_ERROR * wanted.norm()


@needs_gpu
@pytest.mark.parametrize("kernel", ["torch", "vllm"])
def test_rows_of_a_product_do_not_depend_on_the_others(mode, kernel):
    from vllm.model_executor.determinism.batch_invariant import linear_batch_invariant

    linear = F.linear if kernel == "torch" else linear_batch_invariant
    for k, n in PRODUCTS:
        x = torch.randn(max(ROW_COUNTS), k, device="cuda").bfloat16()
        weight = torch.randn(n, k, device="cuda").bfloat16()
        rows = linear(x, weight)
        different = [count for count in ROW_COUNTS if not torch.equal(linear(x[-count:], weight), rows[-count:])]
        assert not different, f"{k} x {n}: {different} rows differ"


@needs_gpu
def test_rows_of_the_other_operations_do_not_depend_on_the_others(mode):
    from torchtitan.experiments.rl.unified.devices.cuda import linear as compat_cuda
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    def cut(x: torch.Tensor, k: int | None, p: float | None) -> torch.Tensor:
        k, p = (None if limit is None else torch.full((len(x),), limit, device="cuda") for limit in (k, p))
        return apply_top_k_top_p(x.float() * 3, k, p)

    weight = torch.rand(1024, device="cuda").bfloat16() + 0.5
    norm = nn.RMSNorm(1024, device="cuda", dtype=torch.bfloat16)
    operations = {
        "RMSNorm": lambda x: norm(x),
        "SiLU": F.silu,
        "top-p": lambda x: cut(x, None, 0.9),
        "top-k": lambda x: cut(x, 50, None),
        "top-k and top-p": lambda x: cut(x, 500, 0.7),
        "log_softmax": lambda x: x.float().log_softmax(-1),
        "vLLM's RMSNorm": lambda x: compat_cuda.add_rms_norm(x, None, weight, 1e-6),
        "vLLM's RMSNorm with addition": lambda x: compat_cuda.add_rms_norm(x, x.flip(-1), weight, 1e-6),
        "vLLM's SiLU": lambda x: compat_cuda.SiluAndMul.apply(*x.chunk(2, dim=-1)),
    }
    x = torch.randn(1000, 1024, device="cuda").bfloat16()
    for name, operation in operations.items():
        rows = operation(x)
        assert all(torch.equal(operation(x[-count:]), rows[-count:]) for count in ROW_COUNTS), name


@needs_gpu
def test_gradients_of_vllms_operations_agree_with_float64():
    from torchtitan.experiments.rl.unified.devices.cuda import linear as compat_cuda

    x, gate, up = (torch.randn(100, 256, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    weight = torch.randn(64, 256, device="cuda").bfloat16().requires_grad_()
    for computed, exact, inputs in (
        (compat_cuda.Linear.apply, lambda x, w: x @ w.t(), (x, weight)),
        (compat_cuda.SiluAndMul.apply, lambda g, u: F.silu(g) * u, (gate, up)),
    ):
        out = computed(*inputs)
        doubles = [v.detach().double().requires_grad_() for v in inputs]
        wanted = exact(*doubles)
        grad = torch.randn_like(out)
        assert (out - wanted).norm() < GRADIENT_ERROR * wanted.norm()
        pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, doubles, grad.double()))
        assert all((one - two).norm() < GRADIENT_ERROR * two.norm() for one, two in pairs)


@needs_gpu
def test_products_of_a_backward_pass_repeat_and_leave_those_of_the_forward_alone(mode):
    for k, n in PRODUCTS:
        x, weight = torch.randn(1000, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
        rows = F.linear(x, weight)
        with backward_arithmetic():
            one, two = (F.linear(x, weight) for _ in range(2))
        assert torch.equal(one, two) and (one - rows).norm() < GRADIENT_ERROR * rows.norm()
        # Where a split sum would show: few rows, many terms.
        assert torch.equal(F.linear(x[:3], weight), rows[:3])


@needs_gpu
def test_leaving_the_mode_gives_torch_its_kernels_back():
    x = torch.randn(64, 5000, device="cuda")
    before, blas = x.log_softmax(-1), torch.backends.cuda.preferred_blas_library()
    with batch_invariant_mode():
        inside = x.log_softmax(-1)
    assert torch.equal(x.log_softmax(-1), before) and not torch.equal(inside, before)
    assert torch.backends.cuda.preferred_blas_library() == blas


def test_a_gpu_refuses_what_its_attention_lacks():
    with pytest.raises(ValueError, match="head size 96 on cuda"):
        DEVICE.check_attention(96, 8, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="not in torch.float32"):
        DEVICE.check_attention(128, 8, 8, torch.float32)
