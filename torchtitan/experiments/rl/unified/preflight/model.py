# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the checkpoint, its arithmetic and a resume can work."""

import logging
import math
from pathlib import Path

import torch
from torch import nn
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.attention import to_packed
from torchtitan.experiments.rl.unified.devices.checks import check_operations, check_rows
from torchtitan.experiments.rl.unified.families import model_of_checkpoint, PolicyModel
from torchtitan.experiments.rl.unified.families.hf_config import read_config
from torchtitan.experiments.rl.unified.families.tensors import check_weights, find_weights, load_matched
from torchtitan.experiments.rl.unified.record.checkpoints import check_model, find_start
from torchtitan.models.attention import VarlenMetadata

logger = logging.getLogger(__name__)
WEIGHTS_LOOKED_AT = 1 << 20


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
    of_type = dict.fromkeys(model.family.model_types, model.family)
    if config.training.seq_len > (longest := read_config(path, of_type)["max_position_embeddings"]):
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
    if settings.async_mode == "async_with_pinned_mem" and settings.enable and this_device().in_host_memory:
        raise ValueError('[checkpoint] async_mode "async_with_pinned_mem" needs an accelerator; here use "async"')
    path = settings.initial_load_path
    if path and not settings.initial_load_model_only and not (Path(path) / ".metadata").is_file():
        raise ValueError(
            f"[checkpoint] initial_load_model_only = false, but {path} holds weights alone, no optimizer state and no "
            "position: leave it out, or name a checkpoint/step-N that a run has saved whole"
        )
    start = find_start(config)
    for note in start.notes:
        logger.warning(note)
    if start.saved:
        with torch.device("meta"):
            check_model(start.saved.path, model_of_job(config).build())
    # The reference of a KL penalty is read from there again.
    if settings.initial_load_path is not None and (config.policy_loss.kl_weight or not start.saved):
        try:
            check_weights(model_of_job(config), settings.initial_load_path)
        except ValueError as error:
            raise ValueError(f"[checkpoint] initial_load_path: {error}") from None


def lost_updates(config: JobConfig) -> list[str]:
    """A warning where the learning rate moves hardly any weight: Adam's updates are of its size, and bf16 rounds."""
    if config.training.dtype != "bfloat16":
        return []
    saved = find_start(config).saved
    path = saved.path if saved else config.checkpoint.initial_load_path or config.model.hf_assets_path
    checkpoint, names = find_weights(model_of_job(config), path)
    every = max(1, sum(math.prod(checkpoint.tensors[name].shape) for name in names.values()) // WEIGHTS_LOOKED_AT)
    weights = torch.cat([tensor.flatten()[::every].float() for _, tensor in load_matched(checkpoint, names)])
    median = weights.abs().median().item()
    # A bf16 has 8 bits of precision: half of the distance to the next one.
    half_step = math.ldexp(1.0, math.frexp(median)[1] - 9)
    if config.optimizer.lr >= half_step:
        return []
    return [
        f"[optimizer] lr = {config.optimizer.lr:g} is below {half_step:.2g}, half of what tells the median weight "
        f'({median:.2g}) from the next bf16: with [training] dtype = "bfloat16" most updates are rounded away; '
        'dtype = "float32" with mixed_precision_param = "bfloat16" keeps them'
    ]


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
    if config.rl.group_size > 1 and config.sampling.top_p <= 1 / sizes.vocabulary:
        raise ValueError(
            f"[sampling] top_p = {config.sampling.top_p:g} leaves the likeliest of {sizes.vocabulary} tokens alone: "
            f"the {config.rl.group_size} completions of a prompt are equal ([rl] group_size), and nothing is learned"
        )
    try:
        this_device().check_backend(config.generator.attention_backend)
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


def check_recomputation(config: JobConfig) -> None:
    """What `[activation_checkpoint]` counts and names is there in the model.

    Raises:
        ValueError: says what is not.
    """
    settings, policy = config.activation_checkpoint, model_of_job(config)
    if settings.mode != "selective":
        return
    option, layers = settings.selective_ac_option, policy.geometry.layers
    if option != "op" and int(option) > layers:
        raise ValueError(
            f'[activation_checkpoint] selective_ac_option = "{option}" of {layers} layers recomputes none: set mode = '
            f'"none", or a number up to {layers}'
        )
    key = "per_op_sac_force_recompute_mm_shapes_by_fqns"
    if (names := getattr(settings, key)) == getattr(type(settings)(), key):
        return
    with torch.device("meta"):
        modules = dict(policy.build().named_modules())
    for name in names:
        found = [path for path in modules if name in path]
        others = [path for path in found if not isinstance(modules[path], nn.Linear)]
        if others or not found:
            what = f"{others[0]}, which is no linear layer, has" if others else "no linear layer has"
            raise ValueError(f"[activation_checkpoint] {key}: {what} {name!r} in its name")


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
    check_forward(policy, getattr(torch, config.generator.dtype))
    sizes = policy.geometry
    try:
        device.check_attention(sizes.head_size, sizes.heads, sizes.kv_heads, getattr(torch, config.generator.dtype))
    except ValueError as error:
        raise ValueError(f"{error}; [parity] check = \"off\" runs torch's and vLLM's own attention") from error
    if config.rl.mode == "vllm_compat":
        with torch.device("meta"):
            model = policy.build()
        policy.family.to_vllm_arithmetic(model, degrees.tensor_parallel_degree)


def check_forward(policy: PolicyModel, dtype: torch.dtype) -> None:
    """Every operation of the model is known to be row-invariant, and none but its attention, the device's own, takes
    values from one token to another.

    Raises:
        ValueError: names the operation and its module.
    """
    with torch.device("meta"):
        model = PolicyModel(policy.family, policy.family.small(policy.args)).build(max_seq_len=64)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    for weight in model.parameters():  # The buffers' dtype is the model's own business.
        weight.data = torch.zeros_like(weight, dtype=dtype)
    policy.family.replace_attention(model, lambda _: _NoAttention())

    def forward(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([0, tokens.numel()], dtype=torch.int32)
        masks = VarlenMetadata(starts, starts, tokens.numel(), tokens.numel())
        return model(tokens, attention_masks=masks, positions=positions)

    check_operations(forward)
    check_rows(model, forward)


class _NoAttention(nn.Module):
    """In the place of attention: queries as they come, (tokens, heads, head size)."""

    def forward(self, xq, xk, xv, attention_masks=None, scale=None) -> torch.Tensor:
        return to_packed(xq)
