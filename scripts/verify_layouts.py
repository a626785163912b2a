# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Does a step depend on how the trainer's ranks share batch and model? The same job in every layout, beside one rank.

    python scripts/verify_layouts.py                            five steps in each of six layouts
    python scripts/verify_layouts.py --layouts "TP 2"           one of them
    python scripts/verify_layouts.py --rl.mode vllm_compat      other flags go to the job

The generator runs at the trainer's tensor parallel degree. A row shows the largest relative differences of loss and
gradient norm from those of one rank, over the steps, and the sampled tokens whose log-probs differ between generator
and trainer. Exit status 1 if a difference is above 1e-5, if any token differs, or if a job fails.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from torchtitan.experiments.rl.unified import simple_rl_multiprocess

TOLERANCE = 1e-5
# Replicas, shards, tensor parallel degree.
LAYOUTS = {
    "1 rank": (1, 1, 1),
    "DDP 2": (2, 1, 1),
    "FSDP 2": (1, 2, 1),
    "TP 2": (1, 1, 2),
    "HSDP 2x2": (2, 2, 1),
    "FSDP 2 x TP 2": (1, 2, 2),
}


def run(layout: str, flags: list[str], folder: Path) -> list[dict]:
    """Runs the job in `layout`; returns the metrics of its steps.

    Raises:
        RuntimeError: the job failed; says how.
    """
    replicas, shards, tensor = LAYOUTS[layout]
    command = [sys.executable, simple_rl_multiprocess.__file__, "--job.dump_folder", str(folder)]
    for key, value in {
        "parallelism.data_parallel_replicate_degree": replicas,
        "parallelism.data_parallel_shard_degree": shards,
        "parallelism.tensor_parallel_degree": tensor,
        "generator.tensor_parallel_degree": tensor,
        "evaluation.interval": 0,
    }.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{layout} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(key: str, found: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of metric `key` over the steps."""
    pairs = [(one[key], other[key]) for one, other in zip(found, expected, strict=True)]
    differences = [abs(one - other) / abs(other) if other else abs(one) for one, other in pairs]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated")
    parser.add_argument("--steps", type=int, default=5)
    args, flags = parser.parse_known_args()
    layouts = [name for name in args.layouts.split(",") if name != "1 rank"]
    if unknown := set(layouts) - set(LAYOUTS):
        parser.error(f"no layout {', '.join(sorted(unknown))}: there are {', '.join(LAYOUTS)}")
    # A penalty that weighs something: the reference policy is in every layout, too.
    small = {"training.steps": args.steps, "rl.prompts_per_step": 4, "rl.group_size": 8, "policy_loss.kl_weight": 0.1}
    flags = [text for key, value in small.items() for text in (f"--{key}", str(value))] + flags

    failed, alone = False, []
    print(f"{'layout':14} {'loss':>9} {'grad norm':>9} {'tokens':>8} {'mismatches':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate(["1 rank", *layouts]):
            try:
                metrics = run(layout, flags, Path(folder) / str(number))
            except RuntimeError as error:
                print(error)
                return 1
            alone = alone or metrics
            differences = [largest_difference(key, metrics, alone) for key in ("loss", "grad_norm")]
            tokens, mismatches = (sum(m[key] for m in metrics) for key in ("tokens_compared", "mismatched_tokens"))
            wrong = max(differences) > TOLERANCE or mismatches or tokens != sum(m["tokens_compared"] for m in alone)
            failed |= bool(wrong)
            columns = f"{differences[0]:9.1e} {differences[1]:9.1e} {tokens:8} {mismatches:10}"
            print(f"{layout:14} {columns}{'  WRONG' if wrong else ''}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
