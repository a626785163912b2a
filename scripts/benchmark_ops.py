# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Times the row-invariant matrix products against torch's and vLLM's, in turn, in one process.

Each figure is another's time over ours, the median over rounds: 1 is equal speed, 2 is twice as fast as the other, and
a busy machine slows both. "as is" is torch.nn.functional.linear inside the mode, which packs the weight at each call;
"packed" a weight that was packed before. vLLM's product (onednn_mm) has its weight packed before, too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchtitan.experiments.rl.unified.devices.cpu.linear import isa, linear, PackedWeight
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode

# (inner size, columns) of an 18M Qwen3's linears and of Qwen3-0.6B's; the vocabulary with few rows only.
SHAPES = {
    "18m": [(512, 1024), (512, 512), (512, 3072), (1536, 512)],
    "0.6b": [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)],
    "vocabulary": [(1024, 151936)],
}
MOST_ROWS_OF_VOCABULARY = 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def sides(x: torch.Tensor, weight: torch.Tensor, with_vllm: bool) -> dict[str, Callable[[], object]]:
    packed = PackedWeight(weight)
    calls = {
        "as is": lambda: F.linear(x, weight),
        "packed": lambda: linear(x, packed),
        "torch": lambda: F.linear(x, weight),
    }
    if with_vllm:
        from vllm import _custom_ops

        handle = _custom_ops.create_onednn_mm(weight.t(), 32)
        calls["vllm"] = lambda: _custom_ops.onednn_mm(handle, x, None)
    return calls


def timed(name: str, call: Callable[[], object], repeat: int) -> float:
    if name == "as is":
        with batch_invariant_mode():
            return timed("", call, repeat)
    call()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def compare(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Each side's times, one a round, over rounds that take `seconds` in all, three at least."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeat = {name: max(1, int(2e-3 / timed(name, call, 1))) for name, call in calls.items()}
    deadline = time.perf_counter() + seconds
    while len(times["packed"]) < 3 or time.perf_counter() < deadline:
        for name, call in calls.items():
            times[name].append(timed(name, call, repeat[name]))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 128, 512, 4700])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM's product out")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    others = [("as is", "torch"), ("packed", "torch")] + [("packed", "vllm")] * (not args.no_vllm)
    results = []
    for name, dtype in ((name, DTYPES[name]) for name in args.dtypes):
        print(f"{name}, {isa(dtype)}, {args.threads} threads")
        print(f"{'K x N':>15} {'rows':>5} {'GFLOP/s':>8}", *(f"{other}/{ours:8}" for ours, other in others))
        for k, n in (shape for size in args.sizes for shape in SHAPES[size]):
            weight = torch.randn(n, k).to(dtype)
            for rows in args.rows:
                if n > 100_000 and rows > MOST_ROWS_OF_VOCABULARY:
                    continue
                times = compare(sides(torch.randn(rows, k).to(dtype), weight, not args.no_vllm), args.seconds)
                ratios = [
                    statistics.median(b / a for a, b in zip(times[ours], times[other], strict=True))
                    for ours, other in others
                ]
                speed = 2e-9 * rows * k * n / statistics.median(times["packed"])
                print(f"{k:6} x {n:6} {rows:5} {speed:8.1f}", *(f"{ratio:13.2f}" for ratio in ratios), flush=True)
                results.append(
                    {"dtype": name, "isa": isa(dtype), "k": k, "n": n, "rows": rows, "gflops": speed}
                    | {f"{other} / {ours}": ratio for (ours, other), ratio in zip(others, ratios, strict=True)}
                )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"args": vars(args), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
