# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Does the default job learn? Several seeds, held-out pass rate before and after, reward curves with their spread.

    python scripts/learning_proof.py [--seeds 5] [--out outputs/learning_proof] [job flags]

Each run exports its last weights in Hugging Face layout; the pass rate is the share of held-out gsm8k_tiny problems
that one completion each solves, sampled (temperature 1) and greedy, measured with transformers. Prints a table and
writes `reward.png`: mean over the seeds, and the band from the lowest to the highest.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from make_tiny_checkpoint import ASSETS, evaluate
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.record.checkpoints import list_saved

RUN_LIMIT_SECONDS = 1800
TEMPERATURES = (1.0, 0.0)


def run(folder: Path, seed: int, flags: list[str]) -> Path:
    """The default job with `seed`; returns its export.

    Raises:
        RuntimeError: it failed.
    """
    export = ["--checkpoint.enable", "--checkpoint.interval=1000000", "--checkpoint.last_save_in_hf"]
    command = [sys.executable, simple_rl_multiprocess.__file__, f"--job.dump_folder={folder}", f"--debug.seed={seed}"]
    status = subprocess.run([*command, *export, *flags], timeout=RUN_LIMIT_SECONDS).returncode
    saved = [saved.path for saved in list_saved(folder / "checkpoint") if saved.kind == "hugging_face"]
    if status or not saved:
        raise RuntimeError(f"seed {seed}: exit status {status}, exports {saved}; {folder}")
    return saved[-1]


def pass_rates(checkpoint: Path, problems: int) -> list[float]:
    """Held-out pass rate at each of TEMPERATURES."""
    return [evaluate(checkpoint, ASSETS / "gsm8k_tiny", problems, temperature) for temperature in TEMPERATURES]


def draw(rewards: list[list[float]], path: Path) -> None:
    """Mean reward over steps: mean over the runs, and the band between the lowest and the highest of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_step = list(zip(*rewards, strict=True))
    steps = range(1, len(by_step) + 1)
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.fill_between(
        steps, [min(r) for r in by_step], [max(r) for r in by_step], alpha=0.25, label="lowest to highest"
    )
    axes.plot(steps, [sum(r) / len(r) for r in by_step], label=f"mean of {len(rewards)} seeds")
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/learning_proof"))
    parser.add_argument("--problems", type=int, default=500, help="held-out problems to evaluate on")
    args, flags = parser.parse_known_args()
    before = pass_rates(ASSETS / "qwen3_tiny", args.problems)
    rewards, after = [], []
    for seed in range(args.seeds):
        folder = args.out / f"seed-{seed}"
        export = run(folder, seed, flags)
        rewards.append([json.loads(row)["reward_mean"] for row in (folder / "metrics.jsonl").read_text().splitlines()])
        after.append(pass_rates(export, args.problems))
    draw(rewards, args.out / "reward.png")
    print("| seed | reward, first 10 steps -> last 10 | pass@1 sampled, before -> after | greedy, before -> after |")
    print("| --- | --- | --- | --- |")
    for seed, (reward, rates) in enumerate(zip(rewards, after, strict=True)):
        first, last = (sum(part) / len(part) for part in (reward[:10], reward[-10:]))
        sampled, greedy = (f"{old:.3f} -> {new:.3f}" for old, new in zip(before, rates, strict=True))
        print(f"| {seed} | {first:.3f} -> {last:.3f} | {sampled} | {greedy} |")
    means = [sum(rates) / len(rates) for rates in zip(*after, strict=True)]
    sampled, greedy = (f"{old:.3f} -> {new:.3f}" for old, new in zip(before, means, strict=True))
    print(f"| mean | | {sampled} | {greedy} |")


if __name__ == "__main__":
    main()
