# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the checkpoint, its arithmetic and a resume can work."""

import json
import logging
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.checks import check_supported
from torchtitan.experiments.rl.unified.families.base import check_checkpoint_fits, policy_train_spec
from torchtitan.experiments.rl.unified.families.qwen3 import to_compat
from torchtitan.experiments.rl.unified.record.checkpoints import check_model, find_start

logger = logging.getLogger(__name__)


def check_checkpoint(config: JobConfig) -> None:
    """The checkpoint directory exists and holds a model of the flavor.

    Raises:
        ValueError: says what is missing or names the fields that differ.
    """
    path = Path(config.model.hf_assets_path)
    if not path.is_dir():
        raise ValueError(f"no checkpoint directory {path} ([model] hf_assets_path): see scripts/download_hf_assets.py")
    flavors = policy_train_spec(config.model.name).model_args
    if config.model.flavor not in flavors:
        raise ValueError(f"[model] flavor {config.model.flavor!r}: {config.model.name} has {', '.join(flavors)}")
    check_checkpoint_fits(path / "config.json", flavors[config.model.flavor])
    if quantisation := json.loads((path / "config.json").read_text()).get("quantization_config"):
        raise ValueError(
            f"{path} is quantised ({quantisation.get('quant_method', quantisation)}): a policy that is trained and "
            "updated in place cannot be; download the unquantised checkpoint"
        )
    if config.checkpoint.enable:
        check_resume(config)


def check_resume(config: JobConfig) -> None:
    """`[checkpoint]` can work here, and what the job would go on from is a checkpoint of its model.

    Raises:
        ValueError: says which setting to change, or what differs.
    """
    settings = config.checkpoint
    if settings.async_mode == "async_with_pinned_mem" and this_device().in_host_memory:
        raise ValueError('[checkpoint] async_mode "async_with_pinned_mem" needs an accelerator; here use "async"')
    if settings.keep_latest_k == 1:
        raise ValueError("[checkpoint] keep_latest_k 1 would leave none while one is written; use 2 or more, or 0: all")
    if settings.interval < 1:
        raise ValueError(f"[checkpoint] interval {settings.interval}: it is a number of steps, at least 1")
    if settings.last_save_in_hf and not settings.last_save_model_only:
        raise ValueError("[checkpoint] last_save_in_hf holds weights alone: set last_save_model_only = true too")
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


def check_arithmetic(config: JobConfig) -> None:
    """What the job asks for can be computed batch-invariantly, unless parity is off.

    Raises:
        ValueError: names the module, head size or setting that is not covered.
    """
    degrees, device = config.parallelism, this_device()
    for key in ("context_parallel_degree", "pipeline_parallel_degree", "expert_parallel_degree"):
        if getattr(degrees, key) > 1:
            raise ValueError(f"[parallelism] {key} = {getattr(degrees, key)}: policies here have no such split; use 1")
    spec = policy_train_spec(config.model.name)
    args = spec.model_args[config.model.flavor]
    for section in ("parallelism", "generator"):
        degree = getattr(config, section).tensor_parallel_degree
        if args.n_heads % degree or args.n_kv_heads % degree:
            raise ValueError(
                f"[{section}] tensor_parallel_degree = {degree} does not divide the model's {args.n_heads} heads and "
                f"{args.n_kv_heads} key/value heads"
            )
    training = config.training
    if training.mixed_precision_param != training.dtype and degrees.data_parallel_shard_degree <= 1:
        raise ValueError(
            f"[training] dtype {training.dtype} with mixed_precision_param {training.mixed_precision_param} takes FSDP "
            "([parallelism] data_parallel_shard_degree above 1); without it make the two equal"
        )
    if not 0 < config.parity.stale_share <= 1:
        raise ValueError(f"[parity] stale_share = {config.parity.stale_share}: it must be above 0 and at most 1, all")
    if config.parity.check == "off":
        return
    if config.generator.dtype != training.mixed_precision_param:
        raise ValueError(
            f"[generator] dtype {config.generator.dtype} is not what the trainer computes in, [training] "
            f'mixed_precision_param {training.mixed_precision_param}; [parity] check = "off" allows it'
        )
    if config.generator.tensor_parallel_degree != degrees.tensor_parallel_degree:
        raise ValueError(
            f"[generator] tensor_parallel_degree {config.generator.tensor_parallel_degree} and [parallelism] "
            f"tensor_parallel_degree {degrees.tensor_parallel_degree} sum in different orders; make them equal, or set "
            '[parity] check = "off"'
        )
    if (
        config.rl.mode == "vllm_compat"
        and degrees.tensor_parallel_degree > 1
        and not device.tensor_parallel_vllm_compat
    ):
        raise ValueError('[rl] mode = "vllm_compat" is not tensor parallel on a GPU; use mode = "unified"')
    if config.model.converters or config.compile.enable:
        setting = "[model] converters" if config.model.converters else "[compile] enable"
        raise ValueError(f'{setting} changes the arithmetic in the trainer alone; [parity] check = "off" allows it')
    with torch.device("meta"):
        model = spec.model_cls(args)
    check_supported(model)
    try:
        device.check_attention(args.head_dim, args.n_heads, args.n_kv_heads, getattr(torch, config.generator.dtype))
    except ValueError as error:
        raise ValueError(f"{error}; [parity] check = \"off\" runs torch's and vLLM's own attention") from error
    if config.rl.mode == "vllm_compat":
        to_compat(model, degrees.tensor_parallel_degree)
