# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The job as a user runs it: real engine, real trainer mesh, real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from torchtitan.experiments.rl.unified import simple_rl_multiprocess

COMMAND = Path(simple_rl_multiprocess.__file__)
SMALL = ["--rl.prompts_per_step", "4", "--rl.group_size", "8"]


def run(command: list[str], folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command, "--job.dump_folder", str(folder), *SMALL, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder.parent,
        env={**os.environ, **environment},
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_original_command_line_runs_and_leaves_its_record(tmp_path):
    """Proves the whole loop: every sampled token equal over three updates, and all that a run leaves behind."""
    folder = tmp_path / "run"
    steps = ["--training.steps", "3", "--rl.log_samples", "1000"]
    variables = {"VLLM_BATCH_INVARIANT": "1", "VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}
    done = run([str(COMMAND)], folder, *steps, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("VLLM_ATTENTION_BACKEND=FLASH_ATTN needs a GPU") == 1

    metrics = lines(folder / "metrics.jsonl")
    samples = lines(folder / "samples.jsonl")
    assert [m["step"] for m in metrics] == [m["policy_version"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        sampled = [s for s in samples if s["step"] == m["step"]]
        assert len(sampled) == 32 and all(s["policy_version"] == m["step"] - 1 for s in sampled)
        assert m["mismatched_tokens"] == 0
        assert m["tokens_compared"] == sum(s["completion_tokens"] for s in sampled)
        assert m["reward_mean"] == pytest.approx(sum(s["reward"] for s in sampled) / 32)
        assert {"loss", "seconds", "grad_norm", "seconds_generate", "seconds_sync"} <= m.keys()
    assert any(m["grad_norm"] > 0 for m in metrics)
    assert tomli.loads((folder / "config.toml").read_text())["rl"]["prompts_per_step"] == 4
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tb").glob("events.out.tfevents.*"))
    assert not list(Path("/dev/shm").glob("torchtitan-rl-*")), "shared memory left behind"


FORGETS_ONE_UPDATE = """
import sys
from torchtitan.experiments.rl.unified.actors import mesh
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

class ForgetsOneUpdate(mesh.Meshes):
    calls = 0

    async def sync_weights(self):
        self.calls += 1
        # The first brings the initial weights; this one follows step 1.
        return 1 if self.calls == 2 else await super().sync_weights()

mesh.Meshes = ForgetsOneUpdate
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_forgotten_weight_update_stops_the_run(tmp_path):
    """Proves that the parity check can fail, and that its error says where."""
    done = run(["-c", FORGETS_ONE_UPDATE], tmp_path / "run", "--training.steps", "4", "--optimizer.lr", "1e-3")
    assert done.returncode == 1
    assert "sampled tokens have another log-prob in the trainer than in the generator" in done.stderr
    assert "first at step 2, prompt 'epoch 0 row " in done.stderr
    assert "position " in done.stderr and ": generator -" in done.stderr and ", trainer -" in done.stderr
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def bad_checkpoint(folder: Path, **changes) -> list[str]:
    from torchtitan.experiments.rl.unified.job_config import REPOSITORY

    copy = folder / "checkpoint"
    copy.mkdir()
    for file in (REPOSITORY / "tests/assets/qwen3_tiny").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return ["--model.hf_assets_path", str(copy)]


def rows(folder: Path, *values: dict) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return ["--training.dataset_path", str(folder / "rows.jsonl")]


BAD_INPUT = {
    "no checkpoint": (lambda t: ["--model.hf_assets_path", str(t / "none")], "no checkpoint directory"),
    "another model": (lambda t: bad_checkpoint(t, hidden_size=64), "hidden_size: 64 in the checkpoint"),
    "no such flavor": (lambda t: ["--model.flavor", "tinny"], "flavor 'tinny': qwen3 has"),
    "no dataset": (lambda t: ["--training.dataset_path", str(t / "none")], "does not exist"),
    "row without answer": (lambda t: rows(t, {"question": "1+1?"}), "row 1 has no 'answer'"),
    "row without question": (lambda t: rows(t, {"q": "1+1?", "answer": "#### 2"}), "row 1 has no 'question'"),
    "unknown dataset": (lambda t: ["--training.dataset", "c4"], "there are gsm8k, gsm8k_tiny"),
    "more ranks than the batch": (
        lambda t: ["--parallelism.data_parallel_replicate_degree", "64"],
        "32 completions a step",
    ),
    "context too short": (lambda t: ["--training.seq_len", "70"], "context too short"),
    "no room at all": (lambda t: ["--training.seq_len", "64"], "leaves no room for a prompt"),
    "no such loss": (lambda t: ["--policy_loss.name", "ppo2"], "'ppo2' does not exist; choose one of: grpo"),
    "no such advantage": (lambda t: ["--advantage.name", "gae"], "'gae' does not exist; choose one of: grpo"),
    "invariance switched off": (lambda t: [], "VLLM_BATCH_INVARIANT=0 contradicts"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_error_before_anything_is_spawned(case, tmp_path, capsys, monkeypatch):
    flags, complaint = BAD_INPUT[case]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0" if case == "invariance switched off" else "1")
    dump_folder = tmp_path / "run"
    status = simple_rl_multiprocess.main(["--job.dump_folder", str(dump_folder), *SMALL, *flags(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert status == 1
    assert error.startswith("error: ") and complaint in error and "\n" not in error
    assert not dump_folder.exists()


def test_bad_input_ends_the_command_without_monarch(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[rl]\ngroup_sise = 4\n")
    script = (
        "import sys; from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main; "
        f"status = main(['--job.config_file', {str(path)!r}]); assert 'monarch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"error: job config {path}: unknown key 'rl.group_sise'; known here: "
        "group_size, log_samples, microbatch_tokens, mode, prompts_per_step"
    ]
