# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the checkpoint, its arithmetic and a resume can work."""

import json
import logging
import math
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.checks import check_supported
from torchtitan.experiments.rl.unified.families.base import check_checkpoint_fits, policy_train_spec
from torchtitan.experiments.rl.unified.families.qwen3 import to_compat
from torchtitan.experiments.rl.unified.record.checkpoints import check_model, find_start

logger = logging.getLogger(__name__)


def check_flavor(config: JobConfig) -> None:
    """The model and its flavor exist.

    Raises:
        ValueError: names those that do.
    """
    flavors = policy_train_spec(config.model.name).model_args
    if config.model.flavor not in flavors:
        raise ValueError(f"[model] flavor {config.model.flavor!r}: {config.model.name} has {', '.join(flavors)}")


def check_checkpoint(config: JobConfig) -> None:
    """The checkpoint directory exists and holds a model of the flavor.

    Raises:
        ValueError: says what is missing or names the fields that differ.
    """
    path = Path(config.model.hf_assets_path)
    if not path.is_dir():
        raise ValueError(f"no checkpoint directory {path} ([model] hf_assets_path): see scripts/download_hf_assets.py")
    flavors = policy_train_spec(config.model.name).model_args
    check_checkpoint_fits(path / "config.json", flavors[config.model.flavor])
    if quantisation := json.loads((path / "config.json").read_text()).get("quantization_config"):
        raise ValueError(
            f"{path} is quantised ({quantisation.get('quant_method', quantisation)}): a policy that is trained and "
            "updated in place cannot be; download the unquantised checkpoint"
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
    spec = policy_train_spec(config.model.name)
    args = spec.model_args[config.model.flavor]
    if not (Path(path) / ".metadata").exists():
        check_checkpoint_fits(Path(path) / "config.json", args)
        return
    with torch.device("meta"):
        check_model(Path(path), spec.model_cls(args))


def check_vocabulary(config: JobConfig) -> None:
    """The model's vocabulary and cache fit the settings that count them.

    Raises:
        ValueError: says which is too large or too small.
    """
    args = policy_train_spec(config.model.name).model_args[config.model.flavor]
    if config.sampling.top_k > args.vocab_size:
        raise ValueError(
            f"[sampling] top_k = {config.sampling.top_k} is above the vocabulary's {args.vocab_size} tokens; 0 is off"
        )
    engine, blocks = config.generator, math.ceil(config.training.seq_len / config.generator.block_size)
    itemsize, heads = getattr(torch, engine.dtype).itemsize, max(1, args.n_kv_heads // engine.tensor_parallel_degree)
    needed = blocks * engine.block_size * args.n_layers * 2 * heads * args.head_dim * itemsize / 2**30
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
    spec = policy_train_spec(config.model.name)
    args = spec.model_args[config.model.flavor]
    for section in ("parallelism", "generator"):
        degree = getattr(config, section).tensor_parallel_degree
        if args.n_heads % degree or args.n_kv_heads % degree:
            raise ValueError(
                f"[{section}] tensor_parallel_degree = {degree} does not divide the model's {args.n_heads} heads and "
                f"{args.n_kv_heads} key/value heads"
            )
    if config.parity.check == "off":
        return
    if (
        config.rl.mode == "vllm_compat"
        and degrees.tensor_parallel_degree > 1
        and not device.tensor_parallel_vllm_compat
    ):
        raise ValueError('[rl] mode = "vllm_compat" is not tensor parallel on a GPU; use mode = "unified"')
    with torch.device("meta"):
        model = spec.model_cls(args)
    check_supported(model)
    try:
        device.check_attention(args.head_dim, args.n_heads, args.n_kv_heads, getattr(torch, config.generator.dtype))
    except ValueError as error:
        raise ValueError(f"{error}; [parity] check = \"off\" runs torch's and vLLM's own attention") from error
    if config.rl.mode == "vllm_compat":
        to_compat(model, degrees.tensor_parallel_degree)
