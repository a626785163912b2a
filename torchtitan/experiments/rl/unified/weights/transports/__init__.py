# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How new weights travel from the trainer to the generators, chosen by `[weight_sync] transport`."""

import os

from torchtitan.experiments.rl.unified.config.derived import trainer_host, update_folder, versions_kept
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.weights.base import WeightTransport


def build_transport(config: JobConfig) -> WeightTransport:
    """The job's transport, for either end."""
    slots = versions_kept(config)
    match config.weight_sync.transport:
        case "shared_memory":
            from torchtitan.experiments.rl.unified.weights.transports.shared_memory import SharedMemoryTransport

            return SharedMemoryTransport(slots)
        case "file":
            from torchtitan.experiments.rl.unified.weights.transports.file import FileTransport

            return FileTransport(update_folder(config), slots, os.path.abspath(config.job.dump_folder))
        case "monarch":
            # Monarch starts threads at import.
            from torchtitan.experiments.rl.unified.weights.transports.monarch import MonarchTransport

            return MonarchTransport(config.trainer.timeout_seconds, slots)
        case "vllm_ipc":
            from torchtitan.experiments.rl.unified.weights.transports.vllm_ipc import VllmIpcTransport

            return VllmIpcTransport(slots)
        case "vllm_nccl":
            from torchtitan.experiments.rl.unified.weights.transports.vllm_nccl import VllmNcclTransport

            return VllmNcclTransport(
                trainer_host(config),
                config.trainer.timeout_seconds,
                config.generator.tensor_parallel_degree,
                slots,
            )
    raise ValueError(f"[weight_sync] transport {config.weight_sync.transport!r} does not exist")
