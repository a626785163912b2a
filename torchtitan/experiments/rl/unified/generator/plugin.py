# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`)."""

import ctypes
import multiprocessing
import os
import signal
from pathlib import Path

_PACKAGE = "torchtitan.experiments.rl.unified"

# This plugin's name among vLLM's, in pyproject.toml.
PLUGIN = "torchtitan_rl_unified"
# Set by `build_engine` for the processes of its engine.
ENGINE_VARIABLE = "TORCHTITAN_RL_ENGINE"


def architecture(mode: str, family: str = "") -> str:
    """vLLM's name for the class that generates in `[rl] mode`; `family` is asked for in "vllm_compat" alone."""
    return "TorchTitanForCausalLM" if mode == "unified" else f"VllmCompat_{family}_ForCausalLM"


def register() -> None:
    """Makes vLLM know the policy architectures and, under VLLM_BATCH_INVARIANT=1, compute row-invariantly.

    vLLM may call this more than once in a process; the second call changes nothing.
    """
    from torchtitan.experiments.rl.unified.devices import this_device

    if os.environ.get(ENGINE_VARIABLE) and multiprocessing.parent_process() is not None:
        _die_with_parent()
    _register_architectures()
    this_device().prepare_vllm(os.environ.get("VLLM_BATCH_INVARIANT") == "1")


def _register_architectures() -> None:
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo, ModelRegistry

    class ModelOfThisProcess(_LazyRegisteredModel):
        """Imported when asked for. vLLM would inspect the class in a process of its own, 15 s on two cores."""

        def inspect_model_cls(self) -> _ModelInfo:
            return _ModelInfo.from_model_cls(self.load_model_cls())

    unified = f"{_PACKAGE}.generator.model"
    ModelRegistry.models[architecture("unified")] = ModelOfThisProcess(
        module_name=unified, class_name="TorchTitanForCausalLM"
    )
    # By their files: importing a family would import torchtitan into every process of a stock vLLM, too.
    for file in (Path(__file__).parents[1] / "families").glob("*_vllm.py"):
        name = architecture("vllm_compat", file.stem.removesuffix("_vllm"))
        module = f"{_PACKAGE}.families.{file.stem}"
        ModelRegistry.models[name] = ModelOfThisProcess(module_name=module, class_name="VllmPolicyForCausalLM")


def _die_with_parent() -> None:
    """Processes that an engine of this project starts.

    Symptom: the workers of a tensor parallel generator, and their shared memory, outlive a generator that was killed.
    Cause: vLLM's engine process waits for messages of a parent that is gone.
    Here: the kernel ends each process with the one that started it.
    Goes: when vLLM's processes watch their parents.
    """
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # It died before the call.
        os._exit(1)
