# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A job's record serves others: its steps are checked from its checkpoints, its config gives the same run elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.config.load import REPOSITORY

# What a trainer leaves that finds a mismatch in the run's last step, and the command that explains it.
EXPLAIN = """
import sys
import torch
import parity_pair
import replay
from torchtitan.experiments.rl.unified.errors import ParityError
from torchtitan.experiments.rl.unified.messages import ParityReport
from torchtitan.experiments.rl.unified.trainer.parity import stop_at_mismatch

folder, broken = sys.argv[1:]
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
step = replay.ReplayFolder(replay.config_of(replay.Path(folder))).trajectories(3)
indices = list(range(0, len(step), 2))
try:
    logprobs = torch.cat([step[i].logprobs for i in indices])
    stop_at_mismatch(ParityReport(9, 1, 0.1, "some token"), folder, 3, step, indices, logprobs)
except ParityError as error:
    print(error)
torch.distributed.destroy_process_group()
if broken:
    import edits
    parity_pair.EngineProcess.prepare = getattr(edits, broken)
sys.argv = ["replay.py", "--parity", folder + "/parity_step_3.pt"]
sys.exit(replay.main())
"""
# Edits of the generator's process alone.
EDITS = """
import parity_trace
import torch
from torchtitan.experiments.rl.unified.devices.cpu import ops

library, install, init = torch.library.Library("aten", "IMPL"), ops.install, parity_trace.Recorder.__init__

def install_all_but_one():
    install()
    library.impl("silu", lambda x: x * torch.sigmoid(x), "CPU", allow_override=True)

def init_of_another_model(recorder, model):
    model.get_submodule("model.layers.1.attention.k_norm").register_forward_hook(lambda *call: call[-1] * 1.001)
    init(recorder, model)

def one_op_less():
    ops.install = install_all_but_one

def one_norm_scaled():
    parity_trace.Recorder.__init__ = init_of_another_model
"""


def run(*command: str | Path, cwd: Path, path: str = "") -> subprocess.CompletedProcess:
    words, environment = [sys.executable, *map(str, command)], os.environ | ({"PYTHONPATH": path} if path else {})
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


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


@pytest.mark.slow
def test_a_mismatch_is_traced_to_the_operation_that_one_process_computes_otherwise(finished, tmp_path):
    """Proves that the trace finds nothing where nothing differs, and names an operation by itself where one does."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (tmp_path / "edits.py").write_text(EDITS)
    path = f"{REPOSITORY / 'scripts'}:{tmp_path}"
    done = run("-c", EXPLAIN, folder, "", cwd=tmp_path, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = f"python scripts/replay.py --parity {folder / 'parity_step_3.pt'} names the operation"
    assert said in done.stdout and f"weights: {folder}/checkpoint/step-2, those that sampled the tokens" in done.stdout
    assert "16 of 16 completions have the recorded tokens" in done.stdout
    assert int(done.stdout.split("none of ")[1].split(" outputs differ")[0]) > 50

    done = run("-c", EXPLAIN, folder, "one_op_less", cwd=tmp_path, path=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "first that differs: aten.silu.default #1 in layers.0.feed_forward, " in done.stdout
    assert "the last equal one before it: output of layers.0.feed_forward.w1; from there to here the " in done.stdout

    done = run("-c", EXPLAIN, folder, "one_norm_scaled", cwd=tmp_path, path=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "first that differs: output of layers.1.attention.k_norm, " in done.stdout
    assert "the last equal one before it: input of layers.1.attention.k_norm; from there to here the " in done.stdout
    assert "the generator aten.rms_norm.default, aten.mul.Tensor; first at prompt" in done.stdout
