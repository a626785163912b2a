# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The environment variables and log levels of a job."""

import atexit
import logging
import multiprocessing
import os
import resource
import sys
import warnings

from torchtitan.experiments.rl.unified.config.load import JobConfig

PACKAGE = "torchtitan.experiments.rl.unified"
# Files and sockets that a process may have open, where the system lets it; many shells say 1024 or less.
_OPEN_FILES = 65536


def prepare_environment() -> None:
    """What every process of a job sets before it imports Monarch, and those it starts inherit.

    Libraries speak of errors only, unless the user set RL_VERBOSE=1.
    """
    defaults = {
        # Threads that wait for work must not hold the core another process computes on; but the next operation comes
        # within microseconds, and waking takes longer: they look for it some tenths of a millisecond long.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "300000",
        # torch and the libraries over it ask for GPUs without initialising CUDA.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # Monarch looks for dead processes this often.
        "HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY": "1s",
        # One that dies while it is being looked at never answers.
        "HYPERACTOR_MESH_GET_ACTOR_STATE_MAX_IDLE": "8s",
        # What does not end by itself in this time, twice, is killed.
        "HYPERACTOR_PROCESS_EXIT_TIMEOUT": "3s",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    if os.environ.get("RL_VERBOSE") == "1":
        return
    for name in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    # torchtitan logs to the root logger; vLLM takes its level from the environment, but only once an engine is built.
    for name, level in (("", logging.ERROR), ("vllm", logging.ERROR), (PACKAGE, logging.WARNING)):
        logging.getLogger(name).setLevel(level)


def exit_at_once() -> None:
    """When this process ends in order, with status 0, it ends there and then.

    What the interpreter and vLLM clear up takes seconds and is memory, which the system takes back. An engine's other
    ranks are children: with them it ends as it used to.
    """

    def leave() -> None:
        if not multiprocessing.active_children():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    atexit.register(leave)


def honour_environment(config: JobConfig, on_gpu: bool) -> None:
    """Applies VLLM_ATTENTION_BACKEND as far as a GPU or a CPU can; says what is used instead.

    vLLM 0.32 no longer reads the second variable; here it sets `[generator] attention_backend` unless the TOML does.
    """
    backend = os.environ.get("VLLM_ATTENTION_BACKEND")
    if backend and on_gpu:
        config.generator.attention_backend = config.generator.attention_backend or backend
    elif backend:
        print(
            f"VLLM_ATTENTION_BACKEND={backend} needs a GPU: on this CPU attention is this package's own kernel, "
            "batch-invariant in trainer and generator",
            file=sys.stderr,
        )
