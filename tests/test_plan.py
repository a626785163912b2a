# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The plan of a job: what it says is what the job's configuration means, and an impossible one is refused."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.config.load import load_job_config, REPOSITORY, TRAIN_CONFIGS
from torchtitan.experiments.rl.unified.families import family, policy_train_spec
from torchtitan.experiments.rl.unified.preflight.estimate import checkpoint_count, count_parameters, estimate_job, GIB
from torchtitan.experiments.rl.unified.preflight.machine import check_kernels
from torchtitan.experiments.rl.unified.record.provenance import machine, sha256, versions


def write_large(folder: Path) -> None:
    """A checkpoint of Qwen3-0.6B's shape that takes no space: its weights are a hole in the file."""
    spec = policy_train_spec("qwen3")
    with torch.device("meta"):
        state = spec.model_cls(spec.model_args["0.6B"]).state_dict()
    header, end = {}, 0
    for name, tensor in spec.state_dict_adapter(spec.model_args["0.6B"], None).to_hf(state).items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    for file in (REPOSITORY / "tests/assets/qwen3_tiny").glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(REPOSITORY / "tests/assets/qwen3_tiny/generation_config.json", folder)
    (folder / "config.json").write_text(json.dumps(family("qwen3").to_hf(spec.model_args["0.6B"])))


def test_tied_weights_count_once(tmp_path):
    assert count_parameters(load_job_config([])) == 459_520
    write_large(tmp_path)
    qwen = load_job_config([f"--model.hf_assets_path={tmp_path}"])
    assert count_parameters(qwen) == 596_049_920  # As the checkpoint's card says: 0.6 B.


def test_shards_share_weights_and_replicas_do_not():
    def trainer(*flags: str):
        return estimate_job(load_job_config(list(flags))).groups[1]

    flags = ("--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree")
    ddp, hsdp = trainer(*flags, "1"), trainer(*flags, "2")
    assert (ddp.count, hsdp.count) == (2, 4)
    assert ddp.memory["weights"] == 459_520 * 4 and hsdp.memory["weights"] == ddp.memory["weights"] // 2
    assert ddp.memory["optimizer"] == 2 * ddp.memory["weights"] and ddp.memory["reference policy"] == 0
    assert trainer(*flags, "1", "--policy_loss.kl_weight", "0.1").memory["reference policy"] == ddp.memory["weights"]
    ahead = trainer(*flags, "1", "--trajectory_queue.max_staleness", "3")
    assert ahead.memory["past versions"] == 3 * ddp.memory["weights"] and ddp.memory["past versions"] == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 0),
        (["--checkpoint.enable", "--checkpoint.interval", "4"], 3),
        (["--checkpoint.enable", "--checkpoint.interval", "5"], 2),
        (["--checkpoint.enable", "--checkpoint.interval", "50", "--checkpoint.enable_first_step_checkpoint"], 2),
        (["--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.enable_first_step_checkpoint"], 10),
        (["--checkpoint.enable", "--checkpoint.load_only"], 0),
    ],
)
def test_checkpoints_are_foretold(flags, expected):
    assert checkpoint_count(load_job_config(["--training.steps", "10", *flags])) == expected


def test_too_many_threads_and_too_little_memory():
    plan = replace(estimate_job(load_job_config([])), cores=2, memory_bytes=100 * GIB, on_host=True)
    assert plan.warnings() == []
    assert replace(plan, cores=1).warnings() == [
        f"{max(g.count * g.threads for g in plan.groups[1:])} compute threads run at once on 1 cores: they will wait "
        "for each other"
    ]
    tight = replace(plan, memory_bytes=int(plan.total_bytes * 1.1)).warnings()
    assert (
        len(tight) == 1 and "up to 2" in tight[0] and "(1 x controller 0.65 GiB, 2 x trainer rank (DDP 2)" in tight[0]
    )
    # Short completions might do: a warning, until not even they would.
    least = sum(group.least for group in plan.groups)
    assert least < plan.total_bytes and len(replace(plan, memory_bytes=least).warnings()) == 1
    assert plan.refusals() == replace(plan, memory_bytes=least).refusals() == []
    [refusal] = replace(plan, memory_bytes=least - 1).refusals()
    assert "of memory are needed, this machine has" in refusal
    [refusal] = replace(plan, memory_bytes=GIB).refusals()
    assert "this machine has 1.00 GiB: use fewer ranks" in refusal


def test_a_dry_run_starts_nothing(tmp_path, capsys, monkeypatch):
    check_kernels(load_job_config([]))  # Asks the compiler for its version, once.
    monkeypatch.setattr(subprocess, "Popen", None)
    folder = tmp_path / "run"
    status = simple_rl_multiprocess.main(["--dry_run", "--job.dump_folder", str(folder), "--rl.group_size", "4"])
    said = capsys.readouterr().out
    assert status == 0, said
    for text in (
        "459,520 parameters",
        "2 x trainer rank (DDP 2)",
        "16 prompts x 4 completions = 64",
        "at most 4,096 a step",
        "a completion ends               at '<|im_end|>', '<|endoftext|>', or after 64 tokens",
    ):
        assert text in said
    assert not folder.exists()


GPU_CONFIGS = ["qwen3_0.6b_unified", "qwen3_0.6b_vllm_compat", "qwen3_0.6b_4gpu", "qwen3_0.6b_fsdp2_tp2"]


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_the_gpu_configs_dry_run_on_any_machine(name, tmp_path, capsys):
    write_large(tmp_path)
    flags = ["--model.hf_assets_path", str(tmp_path), "--training.dataset", "gsm8k_tiny"]
    config = TRAIN_CONFIGS / f"{name}.toml"
    status = simple_rl_multiprocess.main(["--dry_run", "--job.config_file", str(config), *flags])
    said = capsys.readouterr()
    assert "596,049,920 parameters" in said.out
    # What the job itself would say here.
    errors = said.err.splitlines()
    assert status == (1 if errors else 0)
    assert all("needs a GPU" in error or "of memory are needed" in error for error in errors)
    assert errors or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the models are not in the host's memory")
@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--generator.kv_cache_gib", "1e6"], "at least 1000"),
        (
            ["--weight_sync.transport", "vllm_ipc", "--parallelism.data_parallel_replicate_degree", "1"],
            '[weight_sync] transport = "vllm_ipc" needs a GPU, which this machine has not: use "shared_memory"',
        ),
        (["--weight_sync.transport", "vllm_nccl"], '[weight_sync] transport = "vllm_nccl" needs a GPU'),
    ],
)
def test_a_job_that_this_machine_cannot_run_is_refused_before_it_starts(flags, complaint, tmp_path, capsys):
    folder = tmp_path / "run"
    status = simple_rl_multiprocess.main(["--job.dump_folder", str(folder), *flags])
    error = capsys.readouterr().err.strip()
    assert status == 1 and error.startswith(f"error: {complaint}") and "\n" not in error
    assert not folder.exists()


def test_provenance_names_what_decides_the_bits(tmp_path):
    assert {
        "python",
        "torch",
        "torchtitan",
        "torchmonarch",
        "transformers",
        "torchtitan-rl-unified",
    } <= versions().keys()
    assert {"cpu", "cpu_flags", "cores", "cpu_capability"} <= machine().keys()
    (tmp_path / "b").write_bytes(b"abc")
    assert sha256([tmp_path / "b"]) == {"b": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
