# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Checkpoints of torch.distributed.checkpoint: read, and nothing in them run."""

import io
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.experiments.rl.unified import dcp

STATE = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "optimizer": {"betas": (0.9, 0.95), "foreach": None, "lr": torch.tensor(1e-4), "count": {"a": [1, "two", 3.0]}},
    "train_state": {"step": 7},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dcp") / "step-7"
    torch_dcp.save(dict(STATE), checkpoint_id=path, no_dist=True)
    return path


class Call:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_the_index_is_torchs_own(saved):
    assert dcp.read_metadata(saved) == torch_unpickled(saved)
    assert dcp.Reader(saved).read_metadata().state_dict_metadata == torch_unpickled(saved).state_dict_metadata


def torch_unpickled(path: Path):
    return pickle.loads((path / ".metadata").read_bytes())


def test_all_that_was_saved_is_loaded(saved):
    found = dcp.load_everything(saved)
    assert torch.equal(found["weight"], STATE["weight"]) and torch.equal(found["half"], STATE["half"])
    assert found["optimizer"]["betas"] == (0.9, 0.95) and found["optimizer"]["count"] == {"a": [1, "two", 3.0]}
    into = {"half": torch.zeros(5, dtype=torch.bfloat16), "train_state": {"step": 0}}
    dcp.load(into, saved)
    assert torch.equal(into["half"], STATE["half"]) and into["train_state"] == {"step": 7}


def test_an_index_that_calls_something_is_refused_and_nothing_is_called(saved, tmp_path):
    index = pickle.dumps({"state_dict_metadata": Call(tmp_path / "called")})
    (tmp_path / ".metadata").write_bytes(index)
    with pytest.raises(ValueError, match="posix.system is nothing that a checkpoint's index holds"):
        dcp.read_metadata(tmp_path)
    with pytest.raises(BaseException, match="posix.system"):
        dcp.load_everything(tmp_path)
    assert not (tmp_path / "called").exists()
    # The check is worth something: torch's reader does call it.
    with pytest.raises(AttributeError):
        FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "called").exists()


def test_an_entry_that_calls_something_is_refused_and_nothing_is_called(saved, tmp_path):
    torch_dcp.save(
        {"train_state": {"step": Call(tmp_path / "called")}}, checkpoint_id=tmp_path / "step-1", no_dist=True
    )
    for load in (
        lambda: dcp.load_everything(tmp_path / "step-1"),
        lambda: dcp.load({"train_state": {"step": 0}}, tmp_path / "step-1"),
    ):
        with pytest.raises(CheckpointException) as raised:
            load()
        assert isinstance(next(iter(raised.value.failures.values()))[0], pickle.UnpicklingError)
    assert not (tmp_path / "called").exists()


def test_an_index_cannot_name_files_elsewhere(saved, tmp_path):
    for name in ("../secret", "/etc/passwd", "..", ""):
        metadata = dcp.read_metadata(saved)
        for place in metadata.storage_data.values():
            place.relative_path = name
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match="is said to lie in"):
            dcp.read_metadata(tmp_path)


def test_flipped_bits_are_noticed_or_harmless(saved, tmp_path):
    """One error, or an index of the right kinds throughout: no MemoryError, no TypeError, whatever the bit."""
    whole, rng = (saved / ".metadata").read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(300):
        index = bytearray(whole)
        index[rng.randrange(len(index))] ^= 1 << rng.randrange(8)
        (tmp_path / ".metadata").write_bytes(index)
        try:
            metadata = dcp.read_metadata(tmp_path)
        except ValueError as error:
            assert "is unreadable" in str(error) and "\n" not in str(error)
            noticed += 1
        else:
            buffer = io.BytesIO()
            pickle.dump(metadata, buffer)
    assert 100 < noticed < 300


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_cut_index_is_one_error(saved, tmp_path, cut):
    (tmp_path / ".metadata").write_bytes((saved / ".metadata").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"\.metadata is unreadable"):
        dcp.read_metadata(tmp_path)
    with pytest.raises(ValueError, match=r"\.metadata is unreadable"):
        dcp.read_metadata(tmp_path / "none")
