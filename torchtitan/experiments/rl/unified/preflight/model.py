# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the checkpoint, its arithmetic and a resume can work."""

import logging
import math
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.checks import check_supported
from torchtitan.experiments.rl.unified.families import model_of_checkpoint, PolicyModel
from torchtitan.experiments.rl.unified.families.hf_config import read_config
from torchtitan.experiments.rl.unified.families.tensors import check_weights
from torchtitan.experiments.rl.unified.record.checkpoints import check_model, find_start

logger = logging.getLogger(__name__)


def model_of_job(config: JobConfig) -> PolicyModel:
    """The model in `[model] hf_assets_path`; ValueError as of `model_of_checkpoint`."""
    return model_of_checkpoint(config.model.hf_assets_path, config.model.name, config.model.flavor)


def check_checkpoint(config: JobConfig) -> None:
    """The checkpoint directory exists and holds a model that runs here.

    Raises:
        ValueError: says what is missing or names the fields that differ.
    """
    model, path = model_of_job(config), config.model.hf_assets_path
    check_weights(model, path)
    if config.training.seq_len > (longest := read_config(path, model.family.model_types)["max_position_embeddings"]):
        raise ValueError(
            f"[training] seq_len {config.training.seq_len} is beyond the context of the model in {path}: its "
            f"config.json has max_position_embeddings = {longest}"
        )


def check_resume(config: JobConfig) -> None:
    """`[checkpoint]` can work here, and what the job would go on from is a checkpoint of its model.

    Raises:
        ValueError: says which setting to change, or what differs.
    """
    settings = config.checkpoint
    if not settings.enable:
        return
    if settings.async_mode == "async_with_pinned_mem" and this_device().in_host_memory:
        raise ValueError('[checkpoint] async_mode "async_with_pinned_mem" needs an accelerator; here use "async"')
    start = find_start(config)
    for note in start.notes:
        logger.warning(note)
    path = start.saved.path if start.saved else settings.initial_load_path
    if path is None:
        return
    if not Path(path).is_dir():
        raise ValueError(f"[checkpoint] initial_load_path: there is no directory {path}")
    model = model_of_job(config)
    if not (Path(path) / ".metadata").exists():
        try:
            check_weights(model, path)
        except ValueError as error:
            raise ValueError(f"[checkpoint] initial_load_path: {error}") from None
        return
    with torch.device("meta"):
        check_model(Path(path), model.build())


def check_vocabulary(config: JobConfig) -> None:
    """The model's vocabulary and cache fit the settings that count them.

    Raises:
        ValueError: says which is too large or too small.
    """
    sizes = model_of_job(config).geometry
    if config.sampling.top_k > sizes.vocabulary:
        raise ValueError(
            f"[sampling] top_k = {config.sampling.top_k} is above the vocabulary's {sizes.vocabulary} tokens; 0 is off"
        )
    try:
        this_device().check_block_size(config.generator.block_size)
    except ValueError as error:
        raise ValueError(f"[generator] {error}") from None
    engine, blocks = config.generator, math.ceil(config.training.seq_len / config.generator.block_size)
    itemsize, heads = getattr(torch, engine.dtype).itemsize, max(1, sizes.kv_heads // engine.tensor_parallel_degree)
    needed = blocks * engine.block_size * sizes.layers * 2 * heads * sizes.head_size * itemsize / 2**30
    if engine.kv_cache_gib < needed:
        raise ValueError(
            f"[generator] kv_cache_gib = {engine.kv_cache_gib:g} does not hold one sequence of [training] seq_len "
            f"{config.training.seq_len} tokens, which takes {needed:.3g}: raise the one or lower the other"
        )


def check_arithmetic(config: JobConfig) -> None:
    """What the job asks for can be computed batch-invariantly, unless parity is off.

    Raises:
        ValueError: names the module, head size or setting that is not covered.
    """
    degrees, device = config.parallelism, this_device()
    policy = model_of_job(config)
    for section in ("parallelism", "generator"):
        try:
            policy.family.check_parallel(policy.args, getattr(config, section).tensor_parallel_degree)
        except ValueError as error:
            raise ValueError(f"[{section}] {error}") from None
    if config.parity.check == "off":
        return
    if (
        config.rl.mode == "vllm_compat"
        and degrees.tensor_parallel_degree > 1
        and not device.tensor_parallel_vllm_compat
    ):
        raise ValueError('[rl] mode = "vllm_compat" is not tensor parallel on a GPU; use mode = "unified"')
    with torch.device("meta"):
        model = policy.build()
    check_supported(model, policy.family.covered_modules())
    sizes = policy.geometry
    try:
        device.check_attention(sizes.head_size, sizes.heads, sizes.kv_heads, getattr(torch, config.generator.dtype))
    except ValueError as error:
        raise ValueError(f"{error}; [parity] check = \"off\" runs torch's and vLLM's own attention") from error
    if config.rl.mode == "vllm_compat":
        policy.family.to_vllm_arithmetic(model, degrees.tensor_parallel_degree)
