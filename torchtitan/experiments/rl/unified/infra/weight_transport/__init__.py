# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How new weights travel from the trainer to the generators, chosen by `[weight_sync] transport`."""

import os
import socket
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.infra.process import trainer_ranks
from torchtitan.experiments.rl.unified.infra.weight_transport.base import (
    PolicyWeights,
    TensorSpec,
    WeightTransferError,
    WeightTransport,
    WeightUpdate,
)
from torchtitan.experiments.rl.unified.infra.weight_transport.file import FileTransport
from torchtitan.experiments.rl.unified.infra.weight_transport.receiver import ReceivedWeights, Receiver
from torchtitan.experiments.rl.unified.infra.weight_transport.shared_memory import SharedMemoryTransport
from torchtitan.experiments.rl.unified.infra.weight_transport.vllm_ipc import VllmIpcTransport
from torchtitan.experiments.rl.unified.infra.weight_transport.vllm_nccl import check_nccl, VllmNcclTransport
from torchtitan.experiments.rl.unified.job_config import JobConfig

__all__ = [
    "build_transport",
    "check_transport",
    "engines_share_memory",
    "FileTransport",
    "PolicyWeights",
    "ReceivedWeights",
    "Receiver",
    "SharedMemoryTransport",
    "TensorSpec",
    "versions_kept",
    "VllmIpcTransport",
    "VllmNcclTransport",
    "WeightTransferError",
    "WeightTransport",
    "WeightUpdate",
]


def build_transport(config: JobConfig) -> WeightTransport:
    """The job's transport, for either end."""
    slots = versions_kept(config)
    match config.weight_sync.transport:
        case "shared_memory":
            return SharedMemoryTransport(slots)
        case "file":
            return FileTransport(_folder(config), slots)
        case "monarch":
            # Monarch starts threads at import.
            from torchtitan.experiments.rl.unified.infra.weight_transport.monarch import MonarchTransport

            return MonarchTransport(config.trainer.timeout_seconds, slots)
        case "vllm_ipc":
            return VllmIpcTransport(slots)
        case "vllm_nccl":
            ranks = config.generator.tensor_parallel_degree
            return VllmNcclTransport(_trainer_host(config), config.trainer.timeout_seconds, ranks, slots)
    raise ValueError(f"[weight_sync] transport {config.weight_sync.transport!r} does not exist")


def versions_kept(config: JobConfig) -> int:
    """What generators work ahead with, or compute from where it lies, must outlive the sending of the next."""
    return 2 if config.trajectory_queue.max_staleness or engines_share_memory(config) else 1


def engines_share_memory(config: JobConfig) -> bool:
    """Engines compute from the memory that the trainer sent the weights in: there is no copy."""
    whole = config.rl.mode == "unified" and config.generator.tensor_parallel_degree == 1
    return config.weight_sync.transport == "shared_memory" and whole and not torch.cuda.is_available()


def check_transport(config: JobConfig) -> None:
    """The job's hosts can reach each other by its transport.

    Raises:
        ValueError: they cannot; names the transport that can.
    """
    gpus = torch.cuda.device_count()
    hosts = {_host(address) for address in (*config.cluster.trainer, *config.cluster.generators)}
    if not (config.cluster.trainer and config.cluster.generators):
        hosts.add("this host")
    if config.weight_sync.transport == "shared_memory" and len(hosts) > 1:
        raise ValueError(
            f'[weight_sync] transport = "shared_memory" stays on one host; [cluster] has {", ".join(sorted(hosts))}: '
            'use "monarch", or "file" with a folder that all of them mount'
        )
    ranks = trainer_ranks(config), config.generator.tensor_parallel_degree
    if config.weight_sync.transport == "vllm_ipc" and (ranks != (1, 1) or hosts != {"this host"} or gpus > 1):
        raise ValueError(
            f'[weight_sync] transport = "vllm_ipc" is for one GPU that one trainer rank shares with generators of one '
            f"rank; the job has {ranks[0]} and {ranks[1]}, on {', '.join(sorted(hosts))} with {gpus} GPUs: use "
            '"shared_memory", with a GPU for each rank "vllm_nccl", or set CUDA_VISIBLE_DEVICES to one'
        )
    if config.weight_sync.transport == "vllm_nccl" and gpus:
        wanted = ranks[0] + config.generator.replicas * ranks[1]
        if not (config.cluster.trainer or config.cluster.generators) and gpus < wanted:
            raise ValueError(
                f'[weight_sync] transport = "vllm_nccl" wants a GPU for each rank of trainer and generators, {wanted}; '
                f'there are {gpus}: use "vllm_ipc" on a single one, or "shared_memory"'
            )
        try:
            check_nccl()
        except RuntimeError as error:
            raise ValueError(f'[weight_sync] transport = "vllm_nccl": {error}') from error
    if config.weight_sync.transport == "file":
        folder = _folder(config)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"[weight_sync] folder {folder} cannot be made: {existing} is not a folder to write in")


def _folder(config: JobConfig) -> Path:
    return Path(config.weight_sync.folder or Path(config.job.dump_folder) / "weights").absolute()


def _trainer_host(config: JobConfig) -> str:
    """The host of the trainer's rank 0, as generators know it."""
    if config.cluster.trainer:
        return _host_name(config.cluster.trainer[0])
    return socket.gethostname() if config.cluster.generators else "localhost"


def _host_name(address: str) -> str:
    """The host in an address such as "tcp://node1:26600"."""
    return address.rpartition("://")[2].rpartition(":")[0].strip("[]") or address


def _host(address: str) -> str:
    """The host of such an address; one name for all that mean this one."""
    host = _host_name(address)
    local = host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")
    return "this host" if local else host
