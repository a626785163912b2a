# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Times this project's attention against vLLM's CPU op (generation) and torch's SDPA (training) in one process.

A ratio of 1 is equal speed, 2 is twice as fast as the other. Rounds alternate between the two sides, and the ratio is
the median over rounds of the other's time divided by ours, so that a busy machine slows both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchtitan.experiments.rl.unified.devices.attention import packed_attention
from torchtitan.experiments.rl.unified.devices.cpu.attention import paged_attention
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

BLOCK_SIZE = 128  # vLLM's default on a CPU


class PagedCase:
    """One batch in vLLM's terms: `sequences` contexts of `context` tokens, each with `queries` new tokens."""

    def __init__(self, args: argparse.Namespace, head_size: int, dtype: torch.dtype, sequences: int, queries: int):
        self.args, self.dtype, self.queries, self.scale = args, dtype, queries, head_size**-0.5
        tokens = sequences * queries
        self.query = torch.randn(tokens, args.heads, head_size).to(dtype)
        self.key, self.value = torch.randn(2, tokens, args.kv_heads, head_size).to(dtype)
        blocks = -(-args.context // BLOCK_SIZE)
        self.table = torch.randperm(sequences * blocks).view(sequences, blocks).int()
        self.cache = torch.randn(sequences * blocks, args.kv_heads, BLOCK_SIZE, 2 * head_size).to(dtype)
        self.starts = torch.arange(0, tokens + 1, queries, dtype=torch.int32)
        self.lengths = torch.full((sequences,), args.context, dtype=torch.int32)
        positions = torch.arange(args.context - queries, args.context)
        self.slots = (self.table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()
        self.out = torch.empty_like(self.query)
        self.isa = _get_attn_isa(dtype, BLOCK_SIZE, head_size)

    def ours(self) -> None:
        paged_attention(
            self.query, self.key, self.value, self.cache, self.starts, self.lengths, self.table, self.slots,
            self.scale, self.out,
        )  # fmt: skip

    def plan(self) -> None:
        """vLLM plans once a step for all layers, so this is not timed."""
        heads, kv_heads, head_size = self.query.shape[1], self.key.shape[1], self.query.shape[2]
        self.metadata = ops.cpu_attn_get_scheduler_metadata(
            len(self.lengths), heads, kv_heads, head_size, self.lengths, self.dtype, self.starts, True, -1, self.isa,
            self.args.kv_split,
        )  # fmt: skip

    def vllm(self) -> None:
        k, v = self.cache.view(*self.cache.shape[:2], 2 * BLOCK_SIZE, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(self.key, self.value, k, v, self.slots, self.isa)
        ops.cpu_attention_with_kv_cache(
            self.query, k, v, self.out, self.starts, self.lengths, self.scale, True, None, -1, self.table, 0.0,
            self.metadata, None,
        )  # fmt: skip


class PackedCase:
    """Forward and backward of one packed batch; torch's side runs SDPA sequence by sequence."""

    def __init__(self, args: argparse.Namespace, head_size: int, dtype: torch.dtype, length: int):
        self.sequences, self.scale = max(1, args.context // length), head_size**-0.5
        shape = self.sequences, length
        self.query = torch.randn(*shape, args.heads, head_size).to(dtype).requires_grad_()
        self.key, self.value = (
            torch.randn(*shape, args.kv_heads, head_size).to(dtype).requires_grad_() for _ in range(2)
        )
        self.cu_seqlens = torch.arange(0, self.sequences * length + 1, length, dtype=torch.int32)
        self.dout = torch.randn_like(self.query)
        self.inputs = self.query, self.key, self.value

    def ours(self) -> None:
        out = packed_attention(*(x.flatten(0, 1) for x in self.inputs), self.cu_seqlens, self.scale)
        torch.autograd.grad(out, self.inputs, self.dout.flatten(0, 1))

    def torch(self) -> None:
        q, k, v = (x.transpose(1, 2) for x in self.inputs)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        torch.autograd.grad(out.transpose(1, 2), self.inputs, self.dout)


def compare(ours: Callable[[], None], other: Callable[[], None], seconds: float) -> dict[str, float]:
    """Median times in ms, and the median ratio, of rounds that alternate for about `seconds`."""
    ours(), other()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        t0 = time.perf_counter()
        ours()
        t1 = time.perf_counter()
        other()
        times.append((t1 - t0, time.perf_counter() - t1))
    mine, theirs = zip(*times)
    return {
        "ours_ms": 1e3 * statistics.median(mine),
        "other_ms": 1e3 * statistics.median(theirs),
        "ratio": statistics.median(b / a for a, b in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4000, help="tokens in a sequence, or in a packed batch")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="sequences that decode together")
    parser.add_argument("--head_sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    parser.add_argument("--kv_split", action="store_true", help="let vLLM's op split the keys over threads")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    print(f"{'case':42} {'ours ms':>9} {'other ms':>9} {'ratio':>6}")
    for dtype in (torch.bfloat16, torch.float32):
        for head_size in args.head_sizes:
            for name, sequences, queries in (("decode", args.batch, 1), ("prefill", 1, args.context)):
                case = PagedCase(args, head_size, dtype, sequences, queries)
                case.plan()
                report(results, f"{name} {head_size} {dtype} / vLLM", compare(case.ours, case.vllm, args.seconds))
            for length in (args.context, 256):
                case = PackedCase(args, head_size, dtype, length)
                report(
                    results, f"train x{length} {head_size} {dtype} / SDPA", compare(case.ours, case.torch, args.seconds)
                )
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"args": vars(args), "results": results}, f, indent=1)


def report(results: list[dict], name: str, numbers: dict[str, float]) -> None:
    results.append({"case": name, **numbers})
    print(f"{name:42} {numbers['ours_ms']:9.2f} {numbers['other_ms']:9.2f} {numbers['ratio']:6.2f}", flush=True)


if __name__ == "__main__":
    main()
