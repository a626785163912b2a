# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a process of this experiment sets before it works."""

import ctypes
import logging
import math
import os
import sys
import warnings

import torch
from torchtitan.experiments.rl.unified.job_config import JobConfig

PACKAGE = "torchtitan.experiments.rl.unified"


class ProcessLost(RuntimeError):
    """A process of the job ended, or did not answer in time."""


class TrainerLost(ProcessLost):
    """It was one of the trainer's."""


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
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def bind_to_cores(cores: str, ranks: int) -> list[dict[str, str]] | None:
    """Monarch's `proc_bind` of `ranks` processes that share the CPU cores in `cores`, such as "0-3,8"; "": any."""
    return [{"cpus": cores}] * ranks if cores else None


def watch_processes() -> None:
    """Tells Monarch how soon to act on a process that died or hangs; call it before Monarch is imported."""
    # Looks for dead processes this often.
    os.environ.setdefault("HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY", "1s")
    # One that dies while it is being looked at never answers.
    os.environ.setdefault("HYPERACTOR_MESH_GET_ACTOR_STATE_MAX_IDLE", "8s")
    # What does not end by itself in this time, twice, is killed.
    os.environ.setdefault("HYPERACTOR_PROCESS_EXIT_TIMEOUT", "3s")


def give_back_memory() -> None:
    """Lets the system have what this process freed: glibc keeps blocks of up to 32 MiB, most tensors of a policy."""
    ctypes.CDLL(None).malloc_trim(0)


def quiet_libraries() -> None:
    """Libraries speak of errors only, in this process and those it starts, unless the user set RL_VERBOSE=1."""
    # Threads that wait for work must not hold the core another process computes on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("RL_VERBOSE") == "1":
        return
    for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    # torchtitan logs to the root logger; vLLM takes its level from the environment, but only once an engine is built.
    for name, level in (("", logging.ERROR), ("vllm", logging.ERROR), (PACKAGE, logging.WARNING)):
        logging.getLogger(name).setLevel(level)


def honour_environment(config: JobConfig) -> None:
    """Applies VLLM_BATCH_INVARIANT and VLLM_ATTENTION_BACKEND as far as this device can; says what is used instead.

    vLLM 0.32 no longer reads the second variable; here it sets `[generator] attention_backend` unless the TOML does.
    """
    backend = os.environ.get("VLLM_ATTENTION_BACKEND")
    if backend and torch.cuda.is_available():
        config.generator.attention_backend = config.generator.attention_backend or backend
    elif backend:
        print(
            f"VLLM_ATTENTION_BACKEND={backend} needs a GPU: on this CPU attention is this package's own kernel, "
            "batch-invariant in trainer and generator",
            file=sys.stderr,
        )
    if os.environ.get("VLLM_BATCH_INVARIANT") == "0" and config.parity.check != "off":
        raise ValueError('VLLM_BATCH_INVARIANT=0 contradicts [parity] check; unset it or set check = "off"')
