# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.infra.weight_transport import (
    checksum,
    SharedMemoryTransport,
    WeightTransferError,
)


def weights() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("a", torch.randn(7, 3)),
        ("b", torch.randn(5).to(torch.bfloat16)),
        ("empty", torch.zeros(0)),
        ("strided", torch.randn(4, 6).T),
    ]


@pytest.fixture
def transport():
    transport = SharedMemoryTransport()
    yield transport
    transport.close()


def test_tensors_arrive_with_their_bits_names_and_version(transport):
    update = transport.send(3, weights())
    with SharedMemoryTransport().receive(update) as received:
        assert update.version == 3
        for (sent_name, sent), (name, tensor) in zip(weights(), received, strict=True):
            assert name == sent_name and tensor.dtype == sent.dtype and torch.equal(tensor, sent)


def test_a_flipped_byte_is_noticed_and_named(transport):
    update = transport.send(1, weights())
    with open(update.location, "r+b") as segment:
        segment.seek(update.entries[1].offset + 3)
        byte = segment.read(1)[0]
        segment.seek(-1, os.SEEK_CUR)
        segment.write(bytes([byte ^ 0x10]))
    with pytest.raises(WeightTransferError, match="version 1: b arrived damaged"):
        with transport.receive(update):
            pass


def test_a_sender_that_is_gone_is_named(transport):
    update = transport.send(1, weights())
    transport.close()
    with pytest.raises(WeightTransferError, match="is gone"):
        with transport.receive(update):
            pass


def test_one_segment_serves_all_updates_and_none_is_left(transport):
    locations = {transport.send(version, weights()).location for version in range(3)}
    assert len(locations) == 1
    transport.close()
    assert not Path(locations.pop()).exists()


def test_the_memory_goes_with_a_killed_sender():
    script = (
        "import time, torch; from torchtitan.experiments.rl.unified.infra.weight_transport import "
        "SharedMemoryTransport; transport = SharedMemoryTransport(); "
        "print(transport.send(1, [('a', torch.ones(3))]).location, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as sender:
        location = sender.stdout.readline().strip()
        assert Path(location).exists()
        sender.kill()
    assert not Path(location).exists()


def test_checksum_sees_any_changed_bit():
    x = torch.randn(1000)
    original = checksum(x)
    for index in (0, 499, 999):
        for bit in range(32):
            y = x.clone()
            y.view(torch.int32)[index] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            assert checksum(y) != original
