# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What follows from a job config, each fact in one place."""

import math
import socket
from pathlib import Path

from torchtitan.experiments.rl.unified.config.control_groups import cores
from torchtitan.experiments.rl.unified.config.load import JobConfig


def trainer_ranks(config: JobConfig) -> int:
    """Processes of the trainer mesh: the product of `[parallelism]`'s degrees."""
    degrees = config.parallelism
    return data_parallel_degree(config) * math.prod(
        (degrees.tensor_parallel_degree, degrees.context_parallel_degree, degrees.pipeline_parallel_degree)
    )


def data_parallel_degree(config: JobConfig) -> int:
    """Shares that the batch is cut into; a shard degree of -1 is torchtitan's "what is left", here 1."""
    return config.parallelism.data_parallel_replicate_degree * max(1, config.parallelism.data_parallel_shard_degree)


def threads_of_rank(ranks: int) -> int:
    """CPU threads for one of `ranks` processes that share the cores this process may use."""
    return max(1, cores() // ranks)


def steps_ahead(config: JobConfig) -> int:
    """Steps that the generators work ahead of the trainer."""
    return config.trajectory_queue.max_staleness


def past_versions(config: JobConfig) -> int:
    """Older versions of the weights that the trainer keeps, to compare what they sampled."""
    return 0 if config.parity.check == "off" else steps_ahead(config)


def versions_kept(config: JobConfig) -> int:
    """What generators work ahead with, or compute from where it lies, must outlive the sending of the next."""
    return 2 if config.trajectory_queue.max_staleness or engines_share_memory(config) else 1


def engines_share_memory(config: JobConfig) -> bool:
    """Engines on a CPU compute from the memory that the trainer sent the weights in: there is no copy."""
    whole = config.rl.mode == "unified" and config.generator.tensor_parallel_degree == 1
    return config.weight_sync.transport == "shared_memory" and whole


def update_folder(config: JobConfig) -> Path:
    """Where transport "file" writes."""
    return Path(config.weight_sync.folder or Path(config.job.dump_folder) / "weights").absolute()


def on_many_hosts(config: JobConfig) -> bool:
    """Whether `[cluster]` names hosts."""
    return bool(config.cluster.trainer or config.cluster.generators)


def trainer_host(config: JobConfig) -> str:
    """The host of the trainer's rank 0, as generators know it."""
    if config.cluster.trainer:
        return host_name(config.cluster.trainer[0])
    return socket.gethostname() if config.cluster.generators else "localhost"


def host_name(address: str) -> str:
    """The host in an address such as "tcp://node1:26600"."""
    return address.rpartition("://")[2].rpartition(":")[0].strip("[]") or address
