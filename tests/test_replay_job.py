# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A job's record serves others: its steps are checked from its checkpoints, its config gives the same run elsewhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.config.load import REPOSITORY


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=cwd)


def job(folder: Path, *flags: str | Path) -> Path:
    done = run(simple_rl_multiprocess.__file__, "--job.dump_folder", folder, *flags, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def without_times(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    flags = ["--training.steps", "3", "--rl.prompts_per_step", "4", "--rl.group_size", "4"]
    flags += [
        "--evaluation.problems",
        "4",
        "--checkpoint.enable",
        "--checkpoint.interval",
        "1",
        "--checkpoint.no-last_save_model_only",
    ]
    return job(tmp_path_factory.mktemp("first") / "run", *flags)


@pytest.mark.slow
def test_the_resolved_config_gives_the_same_metrics_elsewhere(finished, tmp_path):
    """Proves that config.toml holds all of the job: other folder, other working directory, no flags."""
    resolved = (finished / "config.toml").read_text()
    assert str(REPOSITORY) not in resolved and 'hf_assets_path = "tests/assets/qwen3_tiny"' in resolved
    again = job(tmp_path / "again", "--job.config_file", finished / "config.toml")
    assert without_times(again) == without_times(finished)
    assert len(without_times(again)) == 3


@pytest.mark.slow
def test_a_recorded_step_is_equal_until_one_byte_of_its_checkpoint_changes(finished, tmp_path):
    """Proves that replays see equality in trainer and generator, and that they can fail and say where."""
    folder = tmp_path / "moved"
    shutil.copytree(finished, folder)
    command = [REPOSITORY / "scripts" / "replay.py", folder]
    assert run(*command, cwd=tmp_path).stdout == "steps that can be replayed: 1, 2, 3\n"
    tokens = without_times(folder)[2]["tokens_compared"]
    done = run(*command, "--step", "3", "--generate", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"trainer: {tokens} of {tokens} tokens equal\ngenerator: {tokens} of {tokens} tokens equal\nequal"
        in done.stdout
    )
    assert "every entry as recorded" in done.stdout

    checkpoint, name = folder / "checkpoint" / "step-2", "layers.0.feed_forward.w1.weight"
    items = {key.fqn: item for key, item in FileSystemReader(checkpoint).read_metadata().storage_data.items()}
    with open(checkpoint / items[name].relative_path, "r+b") as file:
        # The highest byte of a little-endian fp32 in the middle of the tensor: its sign and exponent.
        place = items[name].offset + items[name].length // 2 // 4 * 4 + 3
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x80]))
    done = run(*command, "--step", "3", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"1 entries differ from what the run recorded\n  {name}\n" in done.stdout
    assert "tokens differ, first at prompt 'epoch 0 row " in done.stdout and "NOT equal" in done.stdout
