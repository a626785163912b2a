# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Does vLLM's own model answer as if this package were not installed? Tokens and log-probs of 20 requests, both ways.

    python scripts/verify_stock_vllm.py                             eager, one rank
    python scripts/verify_stock_vllm.py --compiled                  as it comes
    python scripts/verify_stock_vllm.py --tensor-parallel-size 2

Without the package: VLLM_PLUGINS empty, so that vLLM does not load its entry point. Ten requests have a seed, ten have
none and prompts that are prefilled in chunks (stock vLLM on a CPU dies of both at once). Exit status 1 with any
difference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().parents[1] / "tests/assets/qwen3_tiny"
LIMIT_SECONDS = 600
# Tokens of an engine step; the prompts of all seeded requests together are fewer.
CHUNK = 64


def answer(compiled: bool, ranks: int) -> list:
    """Token ids and log-probs of each request, of an engine in this process."""
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=not compiled,
        tensor_parallel_size=ranks,
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=2**26,
    )
    found = []
    for seeded in (True, False):
        length = 5 if seeded else 150
        prompts = [TokensPrompt(prompt_token_ids=[3 + (7 * i + j) % 500 for j in range(length)]) for i in range(10)]
        sampling = [
            SamplingParams(
                temperature=(0.0, 0.7, 1.0)[i % 3],
                top_p=(1.0, 0.9)[i % 2],
                top_k=(0, 50)[i // 5],
                seed=i if seeded else None,
                logprobs=2,
                max_tokens=16,
            )
            for i in range(10)
        ]
        for output in engine.generate(prompts, sampling, use_tqdm=False):
            one = output.outputs[0]
            found.append([list(one.token_ids), [{i: p.logprob for i, p in step.items()} for step in one.logprobs]])
    return json.loads(json.dumps(found))


def answer_elsewhere(installed: bool, flags: list[str]) -> list:
    """The same, of a process that has this package or has not; RuntimeError if it fails."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    # Two ranks are bound to a core each; on a machine of one NUMA node vLLM itself refuses to place them.
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores if "2" in flags else "auto", **settings}
    env.pop("VLLM_PLUGINS", None)
    if not installed:
        env["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        command = [sys.executable, __file__, *flags, "--answer", str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        if not out.exists():
            raise RuntimeError(f"installed = {installed}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="as vLLM comes; without it enforce_eager")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, choices=(1, 2))
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        found = answer(args.compiled, args.tensor_parallel_size)
        args.answer.write_text(json.dumps(found), encoding="utf-8")
        return 0
    with_package, without = (answer_elsewhere(installed, sys.argv[1:]) for installed in (True, False))
    equal = [one == other for one, other in zip(with_package, without, strict=True)]
    tokens = sum(len(ids) for ids, _ in without)
    print(f"{sum(equal)} of {len(equal)} requests equal with this package and without, {tokens} tokens")
    return int(not all(equal))


if __name__ == "__main__":
    sys.exit(main())
