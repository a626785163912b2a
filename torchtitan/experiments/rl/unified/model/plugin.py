# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`)."""

# Which architecture of vLLM's registry generates in which `[rl] mode`.
ARCHITECTURES = {"unified": "TorchTitanForCausalLM", "vllm_compat": "VllmCompatQwen3ForCausalLM"}
_CLASSES = {
    "TorchTitanForCausalLM": "torchtitan.experiments.rl.unified.model.titan",
    "VllmCompatQwen3ForCausalLM": "torchtitan.experiments.rl.unified.model.qwen3",
}


def register() -> None:
    """Makes vLLM know the policy architectures and, under VLLM_BATCH_INVARIANT=1, compute row-invariantly.

    vLLM may call this more than once in a process; the second call changes nothing.
    """
    from torchtitan.experiments.rl.unified.infra import vllm_fixes

    vllm_fixes.apply()
    _register_architectures()
    if vllm_fixes.batch_invariant_on_cpu():
        from torchtitan.experiments.rl.unified.batch_invariant.vllm import enable_for_vllm_process
        from torchtitan.experiments.rl.unified.model.vllm_attention import register_attention_backend

        enable_for_vllm_process()
        register_attention_backend()
    elif vllm_fixes.batch_invariant_on_cuda():
        from torchtitan.experiments.rl.unified.batch_invariant.cuda import enable_for_vllm_process
        from torchtitan.experiments.rl.unified.model.vllm_flash import register_flash_backend

        enable_for_vllm_process()
        register_flash_backend()


def _register_architectures() -> None:
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo, ModelRegistry

    class ModelOfThisProcess(_LazyRegisteredModel):
        """Imported when asked for. vLLM would inspect the class in a process of its own, 15 s on two cores."""

        def inspect_model_cls(self) -> _ModelInfo:
            return _ModelInfo.from_model_cls(self.load_model_cls())

    for name, module in _CLASSES.items():
        ModelRegistry.models[name] = ModelOfThisProcess(module_name=module, class_name=name)
