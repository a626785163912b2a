# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a run keeps for replays: tokens to the bit, digests that name what changed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.messages import Request, Trajectory
from torchtitan.experiments.rl.unified.record.replay import (
    checkpoint_digests,
    load_trajectories,
    ReplayFolder,
    save_trajectories,
)


def trajectory(sample: int, version: int) -> Trajectory:
    logprobs = torch.tensor([-0.0, -1e-42, -torch.inf, -1.2345678][: sample + 1])
    request = Request("epoch 1 row 7", sample, list(range(sample + 1)), seed=2**62 + sample)
    return Trajectory(request, list(range(5, 6 + sample)), logprobs, version, "stop", "")


def test_trajectories_come_back_to_the_bit(tmp_path):
    written = [trajectory(sample, version=3) for sample in range(4)]
    save_trajectories(written, tmp_path / "step.safetensors")
    for one, other in zip(written, load_trajectories(tmp_path / "step.safetensors"), strict=True):
        assert torch.equal(one.logprobs.view(torch.int32), other.logprobs.view(torch.int32))
        assert replace(one, logprobs=None) == replace(other, logprobs=None)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def test_every_byte_of_a_checkpoint_belongs_to_an_entry_that_is_named(tmp_path):
    tensors = {
        name: torch.randn(33, generator=torch.Generator().manual_seed(0)) for name in ("w1", "w2", "optimizer.w1")
    }
    dcp.save(tensors, checkpoint_id=tmp_path)
    before = checkpoint_digests(tmp_path)
    assert before.keys() == tensors.keys() | {"the index (.metadata)"}
    file = tmp_path / "__0_0.distcp"
    items = {key.fqn: item for key, item in FileSystemReader(tmp_path).read_metadata().storage_data.items()}
    for place in range(0, file.stat().st_size, 97):
        flip(file, place)
        (name,) = changed(before, checkpoint_digests(tmp_path))
        assert items[name].offset <= place < items[name].offset + items[name].length
        flip(file, place)
    assert checkpoint_digests(tmp_path) == before


def test_every_byte_of_a_safetensors_file_belongs_to_an_entry_that_is_named(tmp_path):
    save_file({"a": torch.arange(5.0), "b": torch.arange(7.0)}, tmp_path / "model.safetensors")
    before = checkpoint_digests(tmp_path)
    file = tmp_path / "model.safetensors"
    flip(file, file.stat().st_size - 1)
    assert changed(before, checkpoint_digests(tmp_path)) == ["b"]


@pytest.fixture
def job(tmp_path):
    flags = ["--job.dump_folder", str(tmp_path), "--checkpoint.enable", "--checkpoint.interval", "2"]
    return load_job_config([*flags, "--training.steps", "9"])


def save_checkpoint(replay: ReplayFolder, version: int) -> None:
    dcp.save({"w": torch.full((3,), float(version))}, checkpoint_id=replay.checkpoint(version))


def test_only_steps_whose_weights_are_kept_are_recorded(job):
    replay = ReplayFolder(job)
    for step in range(1, 6):
        if step % 2 == 0:
            save_checkpoint(replay, step)
        replay.record(step, [trajectory(0, version=step - 1)])
    assert replay.steps() == [1, 3, 5]
    assert replay.checkpoints() == [0, 2, 4] and replay.differences(4) == []
    with pytest.raises(ValueError, match="step 2 .* nothing was recorded for it; these can: 1, 3, 5"):
        replay.trajectories(2)
    replay.rewind(3)
    assert replay.steps() == [1, 3]


def test_what_belongs_to_a_removed_checkpoint_goes_with_it(job):
    replay = ReplayFolder(job)
    save_checkpoint(replay, 2)
    replay.record(3, [trajectory(0, version=2)])
    save_checkpoint(replay, 4)
    for file in replay.checkpoint(2).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="its checkpoint is gone; these can: none"):
        replay.trajectories(3)
    replay.checkpoint(2).rmdir()
    replay.record(5, [trajectory(0, version=4)])
    assert sorted(path.name for path in replay.folder.iterdir()) == [
        "checkpoint-0.json",
        "checkpoint-4.json",
        "step-5.safetensors",
    ]


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path):
    (tmp_path / "step-1.tmp").mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        save_trajectories([trajectory(0, version=1)], tmp_path / "step-1.safetensors")


def test_a_checkpoint_without_digests_or_without_an_index_is_said_so(job):
    replay = ReplayFolder(job)
    save_checkpoint(replay, 2)
    with pytest.raises(ValueError, match="no digests of .*step-2 were recorded"):
        replay.differences(2)
    replay.record_checkpoints()
    assert json.loads((replay.folder / "checkpoint-2.json").read_text()).keys() == {"w", "the index (.metadata)"}
    (replay.checkpoint(2) / ".metadata").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="step-2 cannot be read"):
        replay.differences(2)


def test_a_record_that_was_cut_short_stops_nothing_and_is_said_so(job):
    replay = ReplayFolder(job)
    replay.record(1, [trajectory(0, version=0)])
    for version in (2, 4):
        save_checkpoint(replay, version)
        replay.record(version + 1, [trajectory(1, version=version)])
    file = replay.folder / "step-3.safetensors"
    for size in (0, 7, 60, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))
        assert replay.steps() == [1, 5]
        with pytest.raises(
            ValueError, match="step 3 of .* cannot be replayed, .*step-3.safetensors is damaged; .* 1, 5"
        ):
            replay.trajectories(3)
        replay.record_checkpoints()
    shutil.rmtree(replay.checkpoint(4))
    replay.record_checkpoints()
    assert replay.steps() == [1] and file.exists()
