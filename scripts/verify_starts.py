# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Does a job agree with itself at every start? One-step jobs of Qwen3-0.6B's shape, random weights, one after another.

    python scripts/verify_starts.py                                  20 starts in each mode, bf16
    python scripts/verify_starts.py --starts 5 --modes vllm_compat
    RL_CPU_ISA=avx512_bf16 python scripts/verify_starts.py           with other products

A start samples 16 completions of up to 32 tokens and takes a step on them. Exit status 1 if a token differs between
generator and trainer, or if a start fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import write_random_checkpoint
from torchtitan.experiments.rl.unified.config.load import TRAIN_CONFIGS
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.families.qwen3 import TINY

JOB = {
    "training.steps": 1,
    "training.dtype": "bfloat16",
    "training.mixed_precision_param": "bfloat16",
    "generator.dtype": "bfloat16",
    "generator.kv_cache_gib": 1,
    "rl.prompts_per_step": 4,
    "rl.group_size": 4,
    "sampling.max_tokens": 32,
    "evaluation.interval": 0,
    "parallelism.data_parallel_replicate_degree": 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--modes", default="unified,vllm_compat", help="comma-separated")
    parser.add_argument("--flavor", default="0.6B", help="of TorchTitan's Qwen3")
    args, flags = parser.parse_known_args()
    job = [sys.executable, "-m", "torchtitan.experiments.rl.unified.simple_rl_multiprocess"]
    job += ["--job.config_file", str(TRAIN_CONFIGS / "debug_cpu.toml"), "--metrics.no-enable_tensorboard"]
    job += [text for key, value in JOB.items() for text in (f"--{key}", str(value))]
    failed = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        shape = policy_train_spec("qwen3").model_args[args.flavor]
        model = {name: getattr(shape, name) for name in TINY} | {"max_seq_len": 512}
        write_random_checkpoint(Path(folder) / "model", model)
        for mode in args.modes.split(","):
            for start in range(1, args.starts + 1):
                out, begun = Path(folder) / f"{mode}-{start}", time.monotonic()
                paths = ["--model.hf_assets_path", f"{folder}/model", "--job.dump_folder", str(out)]
                run = subprocess.run([*job, *paths, "--rl.mode", mode, *flags], capture_output=True, text=True)
                metrics = out / "metrics.jsonl"
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                step = json.loads(lines[-1]) if lines else {}
                count, differ = step.get("tokens_compared", 0), step.get("mismatched_tokens", 0)
                ended = f"{differ} of {count} tokens differ" if count else run.stderr.strip()[-500:]
                print(f"{mode:12} start {start:2}: {ended}, {time.monotonic() - begun:.0f} s", flush=True)
                failed += bool(run.returncode or differ or not count)
                compared += count
    print(f"{compared} tokens compared, {failed} starts failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
