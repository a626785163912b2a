# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What working ahead is worth: the default job with trainer and generator on a core each, in turn and side by side.

    python scripts/benchmark_async.py [--steps 50] [--rounds 1] [--max-staleness 1]

Prints the wall time of the steps, as a ratio, and how busy the trainer and the generator were.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from torchtitan.experiments.rl.unified import simple_rl_multiprocess


def run(folder: Path, steps: int, max_staleness: int, cores: list[int]) -> list[dict]:
    """Runs the job in `folder`; returns its metrics, a dict a step."""
    flags = {
        "job.dump_folder": folder,
        "training.steps": steps,
        "trajectory_queue.max_staleness": max_staleness,
        # One rank on one core: the two phases then take about as long.
        "parallelism.data_parallel_replicate_degree": 1,
        "trainer.cores": cores[0],
        "generator.cores": cores[1],
    }
    command = [sys.executable, simple_rl_multiprocess.__file__, "--evaluation.interval=0"]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in flags.items())], check=True, capture_output=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-staleness", type=int, default=1)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("error: trainer and generator need a core each, this process may use one")
    for number in range(args.rounds):
        seconds = {}
        for max_staleness in (0, args.max_staleness):
            with tempfile.TemporaryDirectory() as folder:
                metrics = run(Path(folder) / "run", args.steps, max_staleness, cores)
            total = seconds[max_staleness] = sum(m["seconds"] for m in metrics)
            trainer, generator = (
                sum(m.get(f"seconds_{phase}", 0.0) for m in metrics for phase in phases) / total
                for phases in (("train", "save", "sync"), ("generate", "update"))
            )
            print(
                f"round {number + 1}, max_staleness {max_staleness}: {len(metrics)} steps in {total:.1f} s, "
                f"trainer busy {trainer:.0%}, generator busy {generator:.0%}, "
                f"largest staleness {max(m['staleness_max'] for m in metrics)}",
                flush=True,
            )
        print(f"round {number + 1}: {seconds[args.max_staleness] / seconds[0]:.2f} of the synchronous time", flush=True)


if __name__ == "__main__":
    main()
