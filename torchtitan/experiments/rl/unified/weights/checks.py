# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether a job's hosts can reach each other by its transport."""

import socket

from torchtitan.experiments.rl.unified.config.checks import not_writable
from torchtitan.experiments.rl.unified.config.derived import host_name, trainer_ranks, update_folder
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.weights.transports.vllm_nccl import check_nccl


def check_transport(config: JobConfig) -> None:
    """The job's hosts can reach each other by its transport.

    Raises:
        ValueError: they cannot; names the transport that can.
    """
    gpus = len(this_device().cards())
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
        if problem := not_writable(update_folder(config)):
            raise ValueError(f"[weight_sync] folder {problem}")


def _host(address: str) -> str:
    """The host of such an address; one name for all that mean this one."""
    host = host_name(address)
    local = host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")
    return "this host" if local else host
