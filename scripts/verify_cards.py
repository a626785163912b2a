# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Does a job hold where its ranks have cards of their own? Twenty steps in each of four layouts, on four GPUs.

    python scripts/verify_cards.py                              Qwen3-0.6B's shape, random weights, tiny data set
    python scripts/verify_cards.py --layouts "FSDP 2 + 2 generators" --steps 5
    python scripts/verify_cards.py --keep DIR                   leaves the runs and the checkpoint in DIR

Prints, by layout: sampled tokens that differ between generator and trainer, which processes the driver saw on each
card, median seconds of a step by phase, and what a weight update moves a second; at the end what a copy from card to
card moves. Exit status 1 if a token differs, if an update changed no weight, or if a job fails.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from chaos_resume import Job
from random_checkpoint import write_random_checkpoint
from torchtitan.experiments.rl.unified.config.load import TRAIN_CONFIGS
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.families.qwen3 import TINY

# Flags over those of qwen3_0.6b_4gpu.toml.
LAYOUTS = {
    "FSDP 4 + 4 generators on its cards": {
        "parallelism.data_parallel_shard_degree": 4,
        "generator.replicas": 4,
        "weight_sync.transport": "shared_memory",
    },
    "FSDP 2 + 2 generators": {},
    "TP 2 + generator TP 2": {
        "parallelism.data_parallel_shard_degree": 1,
        "parallelism.tensor_parallel_degree": 2,
        "generator.tensor_parallel_degree": 2,
        "generator.replicas": 1,
    },
    "HSDP 2x2 + 4 generators on its cards": {
        "parallelism.data_parallel_replicate_degree": 2,
        "generator.replicas": 4,
        "weight_sync.transport": "shared_memory",
    },
}
# A random model answers nothing right: a reward that its completions get more or less of, so that weights move.
JOB = {
    "training.dataset": "gsm8k_tiny",
    "optimizer.lr": 1e-5,
    "sampling.max_tokens": 64,
    "reward.weights": ["scripts.random_checkpoint:letters", 1.0],
    "metrics.no-enable_tensorboard": None,
}
PHASES = ("generate", "train", "sync")


def flags_of(layout: str, model: Path) -> list[str]:
    """The job's command line in a layout."""
    flags = ["--job.config_file", str(TRAIN_CONFIGS / "qwen3_0.6b_4gpu.toml"), "--model.hf_assets_path", str(model)]
    for key, value in {**JOB, **LAYOUTS[layout]}.items():
        words = value if isinstance(value, list) else [] if value is None else [value]
        flags += [f"--{key}", *map(str, words)]
    return flags


def write_model(folder: Path) -> int:
    """Random weights of Qwen3-0.6B's shape; returns their bytes in bf16."""
    shape = policy_train_spec("qwen3").model_args["0.6B"]
    write_random_checkpoint(folder, {name: getattr(shape, name) for name in TINY} | {"max_seq_len": 1024})
    return (folder / "model.safetensors").stat().st_size // 2


def on_cards(job: Job) -> dict[str, set[str]]:
    """Which of the job's processes have memory on each card, as the driver says."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return {}
    rows = [line.split(", ") for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines()]
    named, found = job.processes(), defaultdict(set)
    for card, pid in rows:
        if int(pid) in named:
            found[card].add(re.sub("[^a-z0-9]+", " ", named[int(pid)].lower()).strip())
    return found


def run(layout: str, flags: list[str], folder: Path, limit: float) -> tuple[list[dict], dict[str, set[str]]]:
    """The metrics of a job's steps, and its processes by card.

    Raises:
        RuntimeError: the job failed; says how.
    """
    job, cards = Job(folder, flags, limit), {}
    try:
        if job.wait_until(lambda: job.steps() >= 2, "two steps"):
            cards = on_cards(job)
        status = job.wait()
    finally:
        job.end()
    if status:
        raise RuntimeError(f"{layout} ended with status {status}: {folder.with_suffix('.log').read_text()[-3000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], cards


def link_gb_per_second() -> float:
    """What a copy of 1 GiB from the first card to the second moves."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * source.numel() / start.elapsed_time(end) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=300, help="longest wait for one job, in seconds")
    parser.add_argument("--keep", type=Path, help="folder for checkpoint and runs (default: a temporary one)")
    args, flags = parser.parse_known_args()
    failed, temporary = False, tempfile.TemporaryDirectory()
    folder = args.keep or Path(temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    size = write_model(folder / "model") if not (folder / "model").exists() else 0
    size = size or (folder / "model/model.safetensors").stat().st_size // 2
    if unknown := set(layouts := args.layouts.split(",")) - set(LAYOUTS):
        parser.error(f"no layout {', '.join(sorted(unknown))}: there are {', '.join(LAYOUTS)}")
    for number, layout in enumerate(layouts):
        job = [*flags_of(layout, folder / "model"), "--training.steps", str(args.steps), *flags]
        begun = time.monotonic()
        try:
            metrics, cards = run(layout, job, folder / str(number), args.limit)
        except RuntimeError as error:
            print(error, flush=True)
            failed = True
            continue
        compared, sampled, differ = (
            sum(step[key] for step in metrics) for key in ("tokens_compared", "tokens_sampled", "mismatched_tokens")
        )
        changed = min(step["weights_changed"] for step in metrics)
        median = {p: statistics.median(step[f"seconds_{p}"] for step in metrics[1:]) for p in PHASES}
        failed |= bool(differ or not compared or changed == 0 or len(metrics) < args.steps)
        seconds = time.monotonic() - begun
        print(f"{layout}: {len(metrics)} steps, {differ} differ, compared {compared} of {sampled}, {seconds:.0f} s")
        for card, names in sorted(cards.items()):
            print(f"    {card[:12]}: {', '.join(sorted(names))}")
        phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in median.items())
        rate = f"{size / 1e9:.2f} GB of weights, {size / 1e9 / median['sync']:.2f} GB/s"
        print(f"    median seconds of a step: {phases}; {rate}; at least {changed:.2%} of them changed", flush=True)
    if torch.cuda.device_count() > 1:
        print(f"a copy from card to card: {link_gb_per_second():.0f} GB/s")
    temporary.cleanup()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
