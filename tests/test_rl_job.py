# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The job as a user runs it: real engine, real trainer mesh, real processes."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.config.load import REPOSITORY, TRAIN_CONFIGS

COMMAND = Path(simple_rl_multiprocess.__file__)
SMALL = ["--rl.prompts_per_step", "4", "--rl.group_size", "8", "--evaluation.problems", "4"]


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
        assert {"loss", "seconds", "weights_changed", "grad_norm", "seconds_generate", "seconds_sync"} <= m.keys()
    assert any(m["grad_norm"] > 0 for m in metrics)
    evaluated = [[key for key in ("eval_before_pass@1", "eval_pass@1", "eval_pass@4") if key in m] for m in metrics]
    assert evaluated == [["eval_before_pass@1"], [], ["eval_pass@1", "eval_pass@4"]]
    assert re.search(r"pass@1 +[01]\.\d{3} -> [01]\.\d{3} on held-out problems", done.stdout)
    assert tomli.loads((folder / "config.toml").read_text())["rl"]["prompts_per_step"] == 4
    assert "finished, 3 steps" in (folder / "report.html").read_text()
    assert list((folder / "tb").glob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [1, 4])
def test_working_ahead_leaves_no_token_uncompared(max_staleness, tmp_path):
    """Proves parity under the version that sampled each token, and that a filter of the distribution does no harm."""
    filters = ["--sampling.temperature", "0.7", "--sampling.top_p", "0.9", "--sampling.top_k", "50"]
    flags = ["--trajectory_queue.max_staleness", str(max_staleness), "--training.steps", "7", "--optimizer.lr", "1e-3"]
    done = run([str(COMMAND)], tmp_path / "run", *flags, *filters, "--policy_loss.kl_weight", "0.01")
    assert done.returncode == 0, done.stderr
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["staleness_max"] for m in metrics] == [min(step, max_staleness) for step in range(7)]
    for m in metrics:
        assert m["tokens_compared"] == m["tokens_sampled"] > 0 and m["tokens_unverifiable"] == 0
        assert m["mismatched_tokens"] == 0
        assert all(math.isfinite(value) for value in m.values())
    total = sum(m["tokens_sampled"] for m in metrics)
    assert f"0 sampled tokens differ between generator and trainer, compared {total} of {total}\n" in done.stdout
    assert any(m["kl_generator_trainer"] > 0 for m in metrics[1:])


FORGETS_ONE_UPDATE = """
import dataclasses
import sys
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import generators as generator
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

class ForgetsOneUpdate(generator.Replica):
    updates = 0

    async def update_weights(self, update):
        self.updates += 1
        # The first brings the initial weights; this one follows step 1.
        if self.updates != 2:
            await super().update_weights(update)

    async def generate(self, requests):
        trajectories = await super().generate(requests)
        if LIES:
            trajectories = [dataclasses.replace(t, policy_version=self.updates - 1) for t in trajectories]
        return trajectories

generator.Replica = ForgetsOneUpdate
sys.exit(main(sys.argv[1:]))
"""


ON_A_GPU = [f"--job.config_file={TRAIN_CONFIGS}/debug_cpu.toml", "--parallelism.data_parallel_replicate_degree=1"]
ON_A_GPU += [f"--{key}=bfloat16" for key in ("generator.dtype", "training.dtype", "training.mixed_precision_param")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lies, step, flags",
    [
        (False, 2, []),
        (True, 2, []),
        (True, 3, ["--trajectory_queue.max_staleness", "1", "--weight_sync.transport", "file"]),
        pytest.param(True, 2, ON_A_GPU, id="gpu", marks=pytest.mark.gpu),
    ],
)
def test_a_forgotten_weight_update_stops_the_run(lies, step, flags, tmp_path):
    """Proves that a generator on old weights is noticed: by its version, and by parity if it names the wrong one."""
    script = FORGETS_ONE_UPDATE.replace("LIES", str(lies))
    done = run(["-c", script], tmp_path / "run", "--training.steps", "4", "--optimizer.lr", "1e-3", *flags)
    assert done.returncode == 1
    if lies:
        assert "sampled tokens have another log-prob in the trainer than in the generator" in done.stderr
        assert f"first at step {step}, prompt 'epoch 0 row " in done.stderr
        assert "position " in done.stderr and ": generator -" in done.stderr and ", trainer -" in done.stderr
    else:
        assert "32 of 32 completions were sampled under policy version 0, not 1" in done.stderr
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step))


def bad_checkpoint(folder: Path, **changes) -> list[str]:
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


def no_such_reward(folder: Path) -> list[str]:
    text = (TRAIN_CONFIGS / "debug_cpu.toml").read_text()
    (folder / "job.toml").write_text(f"{text}\n[reward.weights]\ngsm9k = 1.0\n")
    return ["--job.config_file", str(folder / "job.toml")]


def template(folder: Path, text: str) -> str:
    _, copy = bad_checkpoint(folder)
    config = json.loads((Path(copy) / "tokenizer_config.json").read_text())
    (Path(copy) / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}))
    return copy


BAD_INPUT = {
    "no checkpoint": (lambda t: ["--model.hf_assets_path", str(t / "none")], "no checkpoint directory"),
    "another model": (lambda t: bad_checkpoint(t, hidden_size=64), "holds another model than its config.json"),
    "quantised": (
        lambda t: bad_checkpoint(t, quantization_config={"quant_method": "fp8"}),
        "quantization_config = {'quant_method': 'fp8'}",
    ),
    "no such flavor": (lambda t: ["--model.flavor", "tinny"], "flavor 'tinny': qwen3 has"),
    "no rows": (rows, "rows.jsonl has no rows"),
    "no such reward": (no_such_reward, "'gsm9k' does not exist; choose from gsm8k, math_verify"),
    "no held-out rows": (
        lambda t: rows(t, {"question": "1+1?", "answer": "#### 2"}),
        "problems are among those that the job trains on",
    ),
    "a template that raises": (
        lambda t: ["--model.hf_assets_path", template(t, "{{ raise_exception('no system role') }}")],
        "train.jsonl, line 1: no system role",
    ),
    "a template that loses the question": (
        lambda t: ["--model.hf_assets_path", template(t, "Hello")],
        "train.jsonl, line 1: it leaves out the user's message",
    ),
    "a misspelt argument of the template": (
        lambda t: ["--data.template_kwargs", "enable_thinkin", "false"],
        "reads no enable_thinkin; it reads add_generation_prompt, messages",
    ),
    "no dataset": (lambda t: ["--training.dataset_path", str(t / "none")], "there is no file or directory"),
    "row without answer": (lambda t: rows(t, {"question": "1+1?"}), "rows.jsonl, line 1 has no 'answer'"),
    "row without question": (
        lambda t: rows(t, {"q": "1+1?", "answer": "#### 2"}),
        "rows.jsonl, line 1 has no 'question'",
    ),
    "unknown dataset": (lambda t: ["--training.dataset", "c4"], "there is no 'c4', but gsm8k, gsm8k_tiny"),
    "more ranks than the batch": (
        lambda t: ["--parallelism.data_parallel_replicate_degree", "64"],
        "32 completions a step",
    ),
    "context too short": (lambda t: ["--training.seq_len", "70"], "context too short"),
    "no room at all": (lambda t: ["--training.seq_len", "64"], "leaves no room for a prompt"),
    "no such loss": (lambda t: ["--policy_loss.name", "ppo2"], "'ppo2' does not exist; choose one of: grpo"),
    "no such advantage": (lambda t: ["--advantage.name", "gae"], "'gae' does not exist; choose one of: grpo"),
    "tensor parallel on one side": (
        lambda t: ["--parallelism.tensor_parallel_degree", "2"],
        "sum in different orders; make them equal",
    ),
    "heads that do not divide": (
        lambda t: ["--generator.tensor_parallel_degree", "4"],
        "does not divide the model's 4 heads and 2 key/value heads",
    ),
    "pipeline": (lambda t: ["--parallelism.pipeline_parallel_degree", "2"], "policies here have no such split"),
    "not honoured": (lambda t: ["--compile.enable"], "torch.compile would give the trainer's forward pass other bits"),
    "nothing to compare": (lambda t: ["--parity.stale_share", "0"], "stale_share"),
    "another dtype": (lambda t: ["--generator.dtype", "bfloat16"], '[parity] check = "off" allows it'),
    "invariance switched off": (lambda t: [], "VLLM_BATCH_INVARIANT=0 contradicts"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_report_before_anything_is_spawned(case, tmp_path, capsys, monkeypatch):
    flags, complaint = BAD_INPUT[case]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0" if case == "invariance switched off" else "1")
    dump_folder = tmp_path / "run"
    status = simple_rl_multiprocess.main(["--job.dump_folder", str(dump_folder), *SMALL, *flags(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert status == 1
    assert complaint in error and all(line.startswith("error: ") for line in error.splitlines())
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
        f"error: job config {path}: unknown key 'rl.group_sise'; did you mean 'rl.group_size'?",
        *(
            f"error: job config {path}: {key} is not set, and has no default that would be right"
            for key in ("model.hf_assets_path", "training.dataset")
        ),
        "error: [generator] dtype float32 is not what the trainer computes in, [training] mixed_precision_param "
        'bfloat16; [parity] check = "off" allows it',
    ]


ONE_ADVANTAGE_IS_NAN = """
import sys
import torch
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import meshes as mesh
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

class OneAdvantageIsNan(mesh.TrainerMesh):
    calls = 0

    async def step(self, trajectories, advantages):
        self.calls += 1
        if self.calls == 3:
            advantages[5] = torch.nan
        return await super().step(trajectories, advantages)

mesh.TrainerMesh = OneAdvantageIsNan
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_every_rank_and_keeps_the_last_checkpoint(tmp_path):
    """Proves that NaN reaches neither optimizer nor checkpoint on two ranks, and that nothing hangs."""
    flags = ["--training.steps", "5", "--checkpoint.enable", "--checkpoint.interval", "1"]
    done = run(["-c", ONE_ADVANTAGE_IS_NAN], tmp_path / "run", *flags)
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    taken = [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    failed = taken[-1] + 1
    dump = tmp_path / "run" / f"nonfinite_step_{failed}.pt"
    assert f"step {failed} was not taken" in error and str(dump) in error and dump.exists()
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir())
    assert checkpoints == [f"step-{step}" for step in taken]


@pytest.mark.slow
def test_a_killed_job_goes_on_as_if_it_had_not_been_killed(tmp_path):
    """Proves that a checkpoint holds all that the next step reads: weights, optimizer, position in the data.

    With 7 rows and 4 prompts a step, both checkpoints that it can go on from (steps 2 and 4) lie in the middle of an
    epoch, the second and the third. An evaluation that falls on a step is neither lost nor there twice.
    """
    flags = ["--training.steps", "6", "--checkpoint.enable", "--checkpoint.interval", "2"]
    flags += ["--checkpoint.no-last_save_model_only", "--rl.log_samples", "1000", "--evaluation.interval", "3"]
    flags += ["--evaluation.dataset_path", str(REPOSITORY / "tests/assets/gsm8k_tiny/test.jsonl")]
    flags += rows(tmp_path, *({"question": f"What is {n} plus 1?", "answer": f"#### {n + 1}"} for n in range(7)))
    assert run([str(COMMAND)], tmp_path / "whole", *flags).returncode == 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    command = [sys.executable, str(COMMAND), "--job.dump_folder", str(tmp_path / "killed"), *SMALL, *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and job.poll() is None and not (metrics.exists() and len(lines(metrics)) > 2):
            time.sleep(0.05)
        job.kill()
    taken = len(lines(metrics))
    assert 3 <= taken < 6, f"killed after step {taken}: too late to show anything"
    done = run([str(COMMAND)], tmp_path / "killed", *flags)
    assert done.returncode == 0, done.stderr

    def without_times(path: Path) -> list[dict]:
        return [{k: v for k, v in m.items() if "second" not in k} for m in lines(path)]

    assert without_times(metrics) == without_times(tmp_path / "whole" / "metrics.jsonl")
    assert ["eval_pass@1" in m for m in lines(metrics)] == [False, False, True] * 2
    samples, undisturbed = (lines(tmp_path / name / "samples.jsonl") for name in ("killed", "whole"))
    assert samples == undisturbed
    assert {s["prompt_uid"].partition(" row")[0] for s in samples} == {"epoch 0", "epoch 1", "epoch 2", "epoch 3"}
