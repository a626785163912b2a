# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Times each op of a model's forward with the batch-invariant mode on and off, in turn, in one process.

A ratio of 1 is equal speed, 2 is twice as fast as without the mode: the median over rounds of the time off divided by
the time on, so that a busy machine slows both. The first column of numbers is the proof at start-up (docs in
`batch_invariant/cpu.py`), once for each shape of a weight.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torchtitan.experiments.rl.unified.devices.cpu import ops as cpu
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode

# (inner size, columns) of a tiny Qwen3's linears and of Qwen3-0.6B's, without the vocabulary.
LINEARS = {
    "tiny": [(128, 256), (128, 768), (384, 128), (128, 512)],
    "0.6b": [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)],
}
WIDTH = {"tiny": 384, "0.6b": 3072}


def cases(size: str, rows: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], float]]:
    """(name, call, seconds of the proof)"""
    for k, n in LINEARS[size]:
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
        with batch_invariant_mode():
            start = time.perf_counter()
            cpu.direct_path_holds(k, n, dtype, transposed=True)
            proof = time.perf_counter() - start
        yield f"linear {k} x {n}", lambda x=x, weight=weight: F.linear(x, weight), proof
    x = torch.randn(rows, WIDTH[size]).to(dtype)
    yield f"silu {WIDTH[size]}", lambda: F.silu(x), 0.0
    yield f"rms_norm {WIDTH[size]}", lambda: F.rms_norm(x, x.shape[-1:]), 0.0
    yield f"log_softmax {WIDTH[size]}", lambda: x.log_softmax(-1), 0.0


def compare(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Medians of the two times and of their ratio, over rounds that take `seconds` in all."""
    repeat, deadline, times = 1, 0.0, []
    while not times or time.perf_counter() < deadline:
        on = timed(call, repeat, mode=True)
        off = timed(call, repeat, mode=False)
        if repeat == 1 and on < 1e-3:  # the clock and the switch must not count
            repeat = int(2e-3 / on) + 1
            continue
        deadline = deadline or time.perf_counter() + seconds
        times.append((on / repeat, off / repeat))
    on, off = zip(*times)
    return {
        "on_ms": 1e3 * statistics.median(on),
        "off_ms": 1e3 * statistics.median(off),
        "ratio": statistics.median(b / a for a, b in times),
    }


def timed(call: Callable[[], object], repeat: int, mode: bool) -> float:
    if mode:
        with batch_invariant_mode():
            return timed(call, repeat, mode=False)
    call()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(LINEARS), default=list(LINEARS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    print(f"{'case':44} {'proof ms':>9} {'on ms':>9} {'off ms':>9} {'ratio':>6}")
    for size in args.sizes:
        for dtype in (torch.bfloat16, torch.float32):
            for rows in args.rows:
                for name, call, proof in cases(size, rows, dtype):
                    result = {"size": size, "dtype": str(dtype), "rows": rows, "case": name, "proof_ms": 1e3 * proof}
                    result |= compare(call, args.seconds)
                    results.append(result)
                    print(
                        f"{f'{size} {dtype} {rows} rows: {name}':44} {1e3 * proof:9.1f} {result['on_ms']:9.3f} "
                        f"{result['off_ms']:9.3f} {result['ratio']:6.2f}",
                        flush=True,
                    )
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"args": vars(args), "results": results}, f, indent=1)


if __name__ == "__main__":
    main()
