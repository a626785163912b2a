# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What is sent arrives, bit for bit, or is refused with the version and the tensor named."""

import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import TensorSpec
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.experiments.rl.unified.weights.checks import check_transport
from torchtitan.experiments.rl.unified.weights.checksum import checksum, copy_with_checksum, lane_sums, library
from torchtitan.experiments.rl.unified.weights.placement import full_to_param
from torchtitan.experiments.rl.unified.weights.receiver import Receiver
from torchtitan.experiments.rl.unified.weights.transports import build_transport
from torchtitan.experiments.rl.unified.weights.transports.file import FileTransport
from torchtitan.experiments.rl.unified.weights.transports.shared_memory import SharedMemoryTransport
from torchtitan.experiments.rl.unified.weights.transports.vllm_ipc import VllmIpcTransport


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Odd sizes, mixed widths, a transposed one: offsets that a careless layout would misalign."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "a": torch.randn(7, 3, generator=generator),
        "empty": torch.zeros(0),
        "strided": torch.randn(4, 6, generator=generator).T,
        "long": torch.randn(700_001, generator=generator).to(torch.bfloat16),
    }


def weights(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> PolicyWeights:
    specs = [TensorSpec(name, dtype or tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return PolicyWeights(specs, iter(tensors.items()))


@pytest.fixture(params=["shared_memory", "file"])
def make(request, tmp_path):
    """Makes transports of one kind, and closes them."""
    made = []

    def make(slots: int = 1):
        kinds = {"shared_memory": lambda: SharedMemoryTransport(slots), "file": lambda: FileTransport(tmp_path, slots)}
        made.append(kinds[request.param]())
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def assert_arrived(found: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_tensors_arrive_with_their_bits_and_names(make):
    transport, receiver = make(), Receiver()
    for version in range(3):
        update = transport.send(version, weights(tensors(version)))
        assert update.version == version
        received = receiver.receive(transport.fetch(update))
        assert_arrived(received, tensors(version))
        received.check_still_there()


def test_the_sender_casts_on_the_way(make):
    sent = {"w": torch.randn(300, 7)}
    update = make().send(1, weights(sent, torch.bfloat16))
    assert_arrived(Receiver().receive(update), {"w": sent["w"].to(torch.bfloat16)})


def test_other_programs_can_read_the_bytes(make):
    update = make().send(12, weights(tensors()))
    with safe_open(update.location, "pt") as file:
        assert file.metadata()["version"].strip() == "12"
        for name, tensor in tensors().items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_the_stream_is_never_more_than_one_tensor(make):
    sent = []

    def stream():
        for i in range(4):
            assert all(tensor() is None for tensor in sent), "the tensor before is still held"
            tensor = torch.full((3,), float(i))
            sent.append(weakref.ref(tensor))
            yield f"w{i}", tensor
            del tensor

    update = make().send(1, PolicyWeights([TensorSpec(f"w{i}", torch.float32, (3,)) for i in range(4)], stream()))
    assert [float(w[0]) for w in Receiver().receive(update).values()] == [0, 1, 2, 3]


def test_a_stream_that_is_not_what_was_announced_is_refused(make):
    specs = weights(tensors()).specs
    with pytest.raises(ValueError, match=r"empty \(0,\) was announced; what came is strided"):
        make().send(1, PolicyWeights(specs, ((n, t) for n, t in tensors().items() if n != "empty")))
    with pytest.raises(ValueError, match="what came is nothing more"):
        make().send(1, PolicyWeights(specs, iter([])))


def test_a_flipped_byte_is_noticed_and_named(make):
    update = make().send(1, weights(tensors()))
    receiver = Receiver()
    receiver.receive(update)
    for index in (0, 4):
        entry = update.entries[index]
        with open(update.location, "r+b") as file:
            for position in (entry.offset, entry.end - 1):
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 0x10]))
                file.flush()
                with pytest.raises(WeightTransferError, match=f"version 1: {entry.spec.name} arrived damaged"):
                    receiver.receive(update)
                file.seek(position)
                file.write(bytes([byte]))
                file.flush()
    receiver.receive(update)


def test_a_transfer_cut_short_is_noticed_and_named(make):
    update = make().send(7, weights(tensors()))
    receiver = Receiver()
    receiver.receive(update)
    os.truncate(update.location, update.entries[4].offset + 10)
    with pytest.raises(WeightTransferError, match="version 7: long arrived cut short"):
        receiver.receive(update)


def test_a_version_that_was_overwritten_is_not_taken_for_the_new_one(make):
    transport, receiver = make(), Receiver()
    old = transport.send(1, weights(tensors()))
    received = receiver.receive(old)
    new = transport.send(2, weights(tensors()))  # The same bytes: checksums alone would not tell.
    with pytest.raises(WeightTransferError, match="weights of version 1: .* (holds version 2|is gone or did)"):
        receiver.receive(old)
    if isinstance(transport, SharedMemoryTransport):  # A file that is removed stays with those who read it.
        with pytest.raises(WeightTransferError, match="weights of version 1: .* holds version 2"):
            received.check_still_there()
    else:
        assert_arrived(received, tensors())
    with pytest.raises(WeightTransferError, match="version 3: .* holds version 2"):
        receiver.receive(replace(new, version=3))
    assert_arrived(receiver.receive(new), tensors())


def test_a_sender_that_failed_half_way_leaves_nothing_that_could_be_received():
    transport = SharedMemoryTransport()
    update = transport.send(1, weights(tensors()))
    with pytest.raises(ValueError):
        transport.send(2, PolicyWeights(weights(tensors()).specs, iter(list(tensors().items())[:2])))
    with pytest.raises(WeightTransferError, match="has no readable table of contents"):
        Receiver().receive(update)
    transport.close()


def test_two_slots_keep_the_version_in_use(make):
    transport, receiver = make(slots=2), Receiver()
    updates = [transport.send(version, weights(tensors(version))) for version in range(5)]
    for version in (3, 4):
        assert_arrived(receiver.receive(updates[version]), tensors(version))
    for version in (0, 1, 2):
        with pytest.raises(WeightTransferError):
            receiver.receive(updates[version])


def test_a_parameter_becomes_a_view_of_what_lasts_where_kernels_find_it_aligned():
    memory = torch.arange(64, dtype=torch.float32)
    for start, dtype, lasting, shared in [
        (0, torch.float32, True, True),
        (16, torch.float32, True, True),
        (1, torch.float32, True, False),
        (0, torch.bfloat16, True, False),
        (0, torch.float32, False, False),
    ]:
        param = torch.nn.Parameter(torch.zeros(32, dtype=dtype))
        full_to_param(memory[start : start + 32], param, lasting)
        assert torch.equal(param, memory[start : start + 32].to(dtype))
        assert (param.data_ptr() == memory[start:].data_ptr()) == shared


def test_a_sender_that_is_gone_is_named(make):
    transport = make()
    update = transport.send(1, weights(tensors()))
    receiver = Receiver()
    receiver.receive(update)
    transport.close()
    with pytest.raises(WeightTransferError, match="version 1: .* is gone"):
        receiver.receive(update)


def test_memory_is_allocated_once_and_goes_with_a_killed_sender():
    script = (
        "import time, torch; from torchtitan.experiments.rl.unified.messages import TensorSpec; "
        "from torchtitan.experiments.rl.unified.weights.base import PolicyWeights; "
        "from torchtitan.experiments.rl.unified.weights.transports.shared_memory import SharedMemoryTransport; "
        "transport = SharedMemoryTransport(); spec = TensorSpec('a', torch.float32, (3,)); "
        "sent = {transport.send(v, PolicyWeights([spec], [('a', torch.ones(3))])).location for v in (9, 10, 1000000)}; "
        "assert len(sent) == 1, sent; print(*sent, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as sender:
        location = sender.stdout.readline().strip()
        assert Path(location).exists()
        sender.kill()
    assert not Path(location).exists()


def test_files_have_their_name_only_when_complete_and_none_is_left(tmp_path):
    transport, other = FileTransport(tmp_path, slots=2, run="/runs/a"), FileTransport(tmp_path, run="/runs/b")
    for own in ("3.part", "2.safetensors"):
        (tmp_path / f"{transport.prefix}-{own}").write_bytes(b"this run's, when it was killed")
    (tmp_path / "policy-7.safetensors").write_text("the user's")
    other.send(1, weights(tensors()))

    def names() -> list[str]:
        """Of this run's files; the others are there."""
        found = sorted(path.name for path in tmp_path.iterdir())
        own = [name.removeprefix(f"{transport.prefix}-") for name in found if name.startswith(transport.prefix)]
        assert len(found) == len(own) + 2
        return own

    transport.send(1, weights(tensors()))
    with pytest.raises(ValueError):
        transport.send(2, PolicyWeights(weights(tensors()).specs, iter([])))
    assert names() == ["1.safetensors"]
    for version in (2, 3, 3):  # A trainer that went back to its checkpoint sends a version again.
        transport.send(version, weights(tensors()))
    assert names() == ["2.safetensors", "3.safetensors"]
    transport.close()
    assert names() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_a_transfer_error(tmp_path):
    transport = FileTransport(tmp_path)
    (tmp_path / f"{transport.prefix}-1.part").symlink_to("/dev/full")
    transport._make_folder = lambda: None
    with pytest.raises(WeightTransferError, match="version 1: cannot write .*: No space left on device"):
        transport.send(1, weights(tensors()))


@pytest.mark.parametrize("threads", [1, 2])
def test_checksum_sees_changed_bits_moved_words_and_lost_tails(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = torch.randn(3 * 2**18 + 5)
    original = checksum(x)
    for index in (0, 17, 2**18, len(x) - 1):
        for bit in range(0, 32, 5):
            y = x.clone()
            y.view(torch.int32)[index] ^= 1 << bit
            assert checksum(y) != original
    assert checksum(x.roll(16)) != original and checksum(x.roll(2**18)) != original
    assert checksum(x[:-1]) != original and checksum(torch.cat([x, torch.zeros(1)])) != original
    for shift in (0, 1):  # Aligned and not: the copy takes another way.
        to = torch.empty(len(x) + 1)[shift:][: len(x)]
        assert copy_with_checksum(to, x) == original and torch.equal(to, x)
    # The same on every machine: sender and receiver may be two.
    assert checksum(torch.arange(1000, dtype=torch.float32)) == 11072408845273251774
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "size", [0, 1, 63, 64, 65, 1000, 1 << 20, (1 << 20) + 1, 3 * (1 << 20) - 7, 65 * (1 << 20) + 72]
)
def test_torchs_operations_give_the_kernels_checksum(size):
    for data in (
        torch.randint(256, (size,), dtype=torch.uint8),
        torch.randint(256, (size + 1,), dtype=torch.uint8)[1:],
    ):
        sums = lane_sums(data)
        assert library().checksum_of_sums(sums.data_ptr(), size) == checksum(data)


def test_vllms_ipc_engine_is_for_one_gpu_that_all_share():
    flags = ["--weight_sync.transport", "vllm_ipc", "--parallelism.data_parallel_replicate_degree"]
    check_transport(load_job_config([*flags, "1"]))
    with pytest.raises(ValueError, match="the job has 2 and 1, on this host"):
        check_transport(load_job_config([*flags, "2"]))
    with pytest.raises(ValueError, match='use "shared_memory"'):
        check_transport(load_job_config([*flags, "1", "--generator.tensor_parallel_degree", "2"]))


@pytest.mark.gpu
def test_bytes_in_a_gpus_memory_are_checked_where_they_lie():
    sent = {name: tensor.cuda() for name, tensor in tensors().items()}
    assert {name: checksum(t) for name, t in sent.items()} == {name: checksum(t) for name, t in tensors().items()}
    transport = VllmIpcTransport(slots=2)
    opened = []

    def open_here(handle):  # CUDA maps no process's memory into itself.
        opened.append(handle)
        return transport._memory.segments[update.location].buffer

    receiver = Receiver(open_here)
    for version in range(1, 5):
        update = transport.send(version, weights(sent))
        found = receiver.receive(update)
        assert all(tensor.is_cuda for tensor in found.values())
        assert_arrived(found, sent)
    assert len(opened) == 2
    transport._memory.segments[update.location].buffer[update.entries[2].offset - 1] ^= 1
    with pytest.raises(WeightTransferError, match="arrived damaged"):
        receiver.receive(update)


def test_the_job_names_its_transport(tmp_path):
    config = load_job_config(["--weight_sync.transport", "file", "--job.dump_folder", str(tmp_path)])
    assert build_transport(config).folder == tmp_path / "weights"
    config.weight_sync.folder = str(tmp_path / "elsewhere")
    config.trajectory_queue.max_staleness = 3
    transport = build_transport(config)
    assert (transport.folder, transport.slots) == (tmp_path / "elsewhere", 2)
    config.weight_sync.transport = "shared_memory"
    assert isinstance(build_transport(config), SharedMemoryTransport)


def test_a_transport_that_cannot_reach_is_refused(tmp_path):
    config = load_job_config([])
    check_transport(config)
    config.cluster.generators = ["tcp://127.0.0.1:26600", "tcp://[::1]:26601"]
    check_transport(config)
    config.cluster.generators.append("tcp://node1:26600")
    with pytest.raises(ValueError, match=r'"shared_memory" stays on one host; \[cluster\] has node1, this host: use'):
        check_transport(config)
    config.weight_sync.transport = "monarch"
    check_transport(config)
    (tmp_path / "taken").write_text("")
    config.weight_sync.transport, config.weight_sync.folder = "file", str(tmp_path / "taken" / "weights")
    with pytest.raises(ValueError, match="weights cannot be written in: .*taken: Not a directory"):
        check_transport(config)
