# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How an engine is started."""

import os
from typing import Any, TYPE_CHECKING

from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.generator.plugin import architecture, ENGINE_VARIABLE, PLUGIN
from torchtitan.experiments.rl.unified.generator.worker import PolicyWorker

if TYPE_CHECKING:
    from vllm import LLM


def prepare_process(tensor_parallel_degree: int, batch_invariant: bool, num_threads: int = 0) -> None:
    """Sets what vLLM reads from the environment; call it before vLLM is imported in this process.

    Args:
        tensor_parallel_degree: ranks of the engine.
        batch_invariant: ask vLLM for batch-invariant arithmetic.
        num_threads: CPU threads of a rank; 0 shares this machine's cores among the ranks.
    """
    os.environ[ENGINE_VARIABLE] = "1"
    os.environ["VLLM_BATCH_INVARIANT"] = "1" if batch_invariant else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A list of plugins that vLLM is to load would keep it from this package's; "" is such a list, too.
    if (plugins := os.environ.get("VLLM_PLUGINS")) is not None:
        os.environ["VLLM_PLUGINS"] = f"{plugins},{PLUGIN}" if plugins else PLUGIN
    # Nothing here runs long enough to earn back what torch.compile costs, and compiled code has bits of its own.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.update(this_device().engine_environment(tensor_parallel_degree, num_threads))


def build_engine(
    checkpoint: str,
    *,
    mode: str,
    model_name: str,
    flavor: str,
    max_model_len: int,
    tensor_parallel_degree: int,
    batch_invariant: bool,
    num_threads: int = 0,
    attention_backend: str = "FLASH_ATTN",
    cuda_graphs: bool = True,
    weights: str = "",
    **engine_args: Any,
) -> "LLM":
    """A vLLM engine that runs the policy in `checkpoint`, a directory with config.json and tokenizer.

    `attention_backend` and `cuda_graphs` are for GPUs; a CPU has one backend and no graphs. `weights` is the directory
    that the weights lie in, if it is another; in "unified" alone.
    """
    prepare_process(tensor_parallel_degree, batch_invariant, num_threads)
    from vllm import LLM

    model = model_of_checkpoint(checkpoint, model_name, flavor)
    # Experts wait for the host, which a graph cannot.
    cuda_graphs = cuda_graphs and not model.geometry.routed
    engine_args |= this_device().engine_arguments(attention_backend, cuda_graphs)
    return LLM(
        checkpoint,
        hf_overrides={"architectures": [architecture(mode, model.family.name)]},
        additional_config={"torchtitan": {"name": model_name, "flavor": flavor, "weights": weights}},
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_degree,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{PolicyWorker.__module__}.{PolicyWorker.__qualname__}",
        # No sampling defaults of the checkpoint's generation_config.json; each of its EOS ids ends a completion still.
        generation_config="vllm",
        use_tqdm_on_load=False,
        **engine_args,
    )
