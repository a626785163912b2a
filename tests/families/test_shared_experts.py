# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Experts that ranks share arrive from Hugging Face's files, and get back to them, whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import find_weights, load_matched
from torchtitan.experiments.rl.unified.isolation import free_port

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import write_checkpoint  # noqa: E402

# A rank of the trainer: loads the checkpoint, writes what it would send, then saves step 1, and step 2 for export.
RANK = """
import sys
import torch
from safetensors.torch import save_file
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
prepare_environment()
this_device().prepare_trainer()
from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer
torch.set_num_threads(1)
sent, *flags = sys.argv[1:]
trainer = RLTrainer(load_job_config(flags))
trainer.load()
weights = {name: tensor.clone() for name, tensor in trainer.policy_weights(torch.float32)}
if torch.distributed.get_rank() == 0:
    save_file(weights, sent)
for trainer.step in (1, 2):
    trainer.save({})
trainer.close()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        (3, ["data_parallel_replicate_degree=1", "data_parallel_shard_degree=3"]),  # 3, 3 and 2 of 8 experts
        (4, ["data_parallel_replicate_degree=2", "data_parallel_shard_degree=2"]),
    ],
    ids=["FSDP 3", "HSDP 2x2"],
)
def test_shared_experts_are_those_of_the_file(ranks, degrees, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", "qwen3_moe")
    flags = [f"--model.hf_assets_path={checkpoint}", f"--job.dump_folder={tmp_path / 'run'}", "--training.steps=2"]
    flags += ["--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.last_save_in_hf"]
    flags += ["--metrics.no_enable_tensorboard", *(f"--parallelism.{degree}" for degree in degrees)]
    command = [sys.executable, "-c", RANK, str(tmp_path / "sent.safetensors"), *flags]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        environment = {**os.environ, **shared, **own}
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert not any(process.returncode for process in running), errors

    stored = load_file(checkpoint / "model.safetensors")
    model = model_of_checkpoint(str(checkpoint))
    expected = model.train_spec().state_dict_adapter(model.args, None).from_hf(dict(stored))
    sent = load_file(tmp_path / "sent.safetensors")
    assert len(expected["layers.0.moe.experts.w1"]) == 8 and sent.keys() == expected.keys()
    assert not [name for name, tensor in sent.items() if not torch.equal(tensor, expected[name])]
    for step, names in (("step-1", expected), ("step-2", stored)):
        saved = dict(load_matched(*find_weights(model, tmp_path / "run/checkpoint" / step)))
        assert saved.keys() == names.keys(), step
        assert not [name for name, tensor in saved.items() if not torch.equal(tensor, names[name])], step
