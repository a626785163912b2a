# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What can be known to be wrong with a job before a process is spawned."""

import json
import logging
import math
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.batch_invariant import check_supported
from torchtitan.experiments.rl.unified.batch_invariant.attention import check_attention
from torchtitan.experiments.rl.unified.checkpoint import check_model, find_start
from torchtitan.experiments.rl.unified.infra.process import data_parallel_degree
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.loss import policy_loss
from torchtitan.experiments.rl.unified.model.compat import to_compat
from torchtitan.experiments.rl.unified.model.policy import policy_train_spec
from torchtitan.experiments.rl.unified.model.spec import check_checkpoint_fits
from torchtitan.experiments.rl.unified.rollout.datasets import PromptDataset
from torchtitan.experiments.rl.unified.rollout.rewards import Rewards

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
    if settings.async_mode == "async_with_pinned_mem" and not torch.accelerator.is_available():
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


def check_batch(config: JobConfig) -> None:
    """The step's batch can be shared by the trainer's ranks, and its loss exists.

    Raises:
        ValueError: says which setting to change.
    """
    batch, degree = config.rl.prompts_per_step * config.rl.group_size, data_parallel_degree(config)
    sizes = f"[rl] prompts_per_step {config.rl.prompts_per_step} x group_size {config.rl.group_size}"
    if batch < 1:
        raise ValueError(f"{sizes}: nothing to train on; both must be at least 1")
    if batch % degree:
        raise ValueError(
            f"{batch} completions a step ({sizes}) cannot be shared equally by {degree} data-parallel trainer ranks "
            f"([parallelism] data_parallel_*_degree): make the one a multiple of the other"
        )
    policy_loss(config.policy_loss)


def check_arithmetic(config: JobConfig) -> None:
    """What the job asks for can be computed batch-invariantly, unless parity is off.

    Raises:
        ValueError: names the module, head size or setting that is not covered.
    """
    degrees = config.parallelism
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
    if config.rl.mode == "vllm_compat" and degrees.tensor_parallel_degree > 1 and torch.cuda.is_available():
        raise ValueError('[rl] mode = "vllm_compat" is not tensor parallel on a GPU; use mode = "unified"')
    if config.model.converters or config.compile.enable:
        setting = "[model] converters" if config.model.converters else "[compile] enable"
        raise ValueError(f'{setting} changes the arithmetic in the trainer alone; [parity] check = "off" allows it')
    with torch.device("meta"):
        model = spec.model_cls(args)
    check_supported(model)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        check_attention(args.head_dim, args.n_heads, args.n_kv_heads, getattr(torch, config.generator.dtype), device)
    except ValueError as error:
        raise ValueError(f"{error}; [parity] check = \"off\" runs torch's and vLLM's own attention") from error
    if config.rl.mode == "vllm_compat":
        to_compat(model, degrees.tensor_parallel_degree)


def check_sampling(config: JobConfig) -> None:
    """The sampling settings mean the same to the engine and to the trainer.

    Raises:
        ValueError: names the setting and its range.
    """
    sampling = config.sampling
    _check_temperature("[sampling]", sampling.temperature)
    if sampling.max_tokens < 1:
        raise ValueError(f"[sampling] max_tokens = {sampling.max_tokens}: a completion has at least 1 token")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"[sampling] top_p = {sampling.top_p}: it must be above 0 and at most 1, which is off")
    if sampling.top_k < 0:
        raise ValueError(f"[sampling] top_k = {sampling.top_k}: it must not be negative; 0 is off")
    if "" in sampling.stop:
        raise ValueError("[sampling] stop has an empty string, which every completion would end at: leave it out")


def check_evaluation(config: JobConfig) -> None:
    """Held-out problems are to be had, and the settings of their evaluation fit each other.

    Raises:
        ValueError: says which setting to change.
    """
    evaluation, training = config.evaluation, config.training
    _check_temperature("[evaluation]", evaluation.temperature)
    if evaluation.interval < 0 or evaluation.problems < 0:
        raise ValueError("[evaluation] interval and problems must not be negative")
    if not evaluation.k or not all(1 <= k <= evaluation.samples for k in evaluation.k):
        raise ValueError(
            f"[evaluation] k = {evaluation.k} with samples = {evaluation.samples}: pass@k takes at least k samples "
            "of each problem, and k at least 1"
        )
    if evaluation.samples > 1 and not evaluation.temperature:
        raise ValueError(
            f"[evaluation] samples = {evaluation.samples} at temperature 0 would all be the same; raise the "
            "temperature or take 1 sample"
        )
    if training.dataset_path and Path(training.dataset_path).is_file() and evaluation.dataset_path is None:
        raise ValueError(
            f"[evaluation] has no problems of its own: the file {training.dataset_path} is what the job trains on; "
            "give held-out rows in [evaluation] dataset_path, or set [evaluation] interval = 0"
        )


def load_prompts(config: JobConfig, held_out: bool = False) -> PromptDataset:
    """The job's prompts, checked to leave room for a completion.

    Args:
        config: the job.
        held_out: the problems to evaluate on, in an order of their own.

    Raises:
        ValueError: for a dataset, tokenizer or context length that cannot work.
    """
    from transformers import AutoTokenizer

    room = config.training.seq_len - config.sampling.max_tokens
    if room < 1:
        raise ValueError(
            f"context too short: [training] seq_len {config.training.seq_len} leaves no room for a prompt before "
            f"[sampling] max_tokens {config.sampling.max_tokens}; raise the one or lower the other"
        )
    try:
        return PromptDataset(
            config.training.dataset,
            (
                config.evaluation.dataset_path or config.training.dataset_path
                if held_out
                else config.training.dataset_path
            ),
            AutoTokenizer.from_pretrained(config.model.hf_assets_path),
            seed=config.evaluation.seed if held_out else config.debug.seed,
            split="test" if held_out else "train",
            question_column=config.data.question_column,
            answer_column=config.data.answer_column,
            max_prompt_tokens=room,
            long_prompts=config.data.overlong_prompts,
            system_prompt=config.data.system_prompt,
            template_kwargs=config.data.template_kwargs,
            special_tokens_in_text=config.data.special_tokens_in_text,
        )
    except ValueError as error:
        if "longer than" in str(error):
            raise ValueError(
                f"context too short: [training] seq_len {config.training.seq_len} less [sampling] max_tokens "
                f"{config.sampling.max_tokens} leaves {room} tokens for a prompt. {error}"
            ) from error
        raise


def load_rewards(config: JobConfig) -> Rewards:
    """The job's rewards; ValueError for one that does not exist."""
    return Rewards(config.reward.weights, timeout_seconds=config.reward.timeout_seconds)


def _check_temperature(section: str, temperature: float) -> None:
    # vLLM raises anything between to 0.01, which would be another distribution than the trainer's.
    if not (temperature == 0 or 0.01 <= temperature < math.inf):
        raise ValueError(f"{section} temperature = {temperature}: it must be 0 (the likeliest token) or at least 0.01")
