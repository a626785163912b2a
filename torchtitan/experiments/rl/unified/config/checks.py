# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What contradicts itself among the keys of a job config, or cannot teach the policy anything. Loads no torch."""

import datetime
import os
import tempfile
from collections.abc import Callable, Iterator, Set
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .idle import idle_keys
from .variables import environment_problems


def contradictions(config: Any, failed: Set[str] = frozenset()) -> list[str]:
    """A line for each thing that is wrong.

    Args:
        config: a job config; each of its keys is fine by itself, but for
        failed: paths of keys that are not: what looks at one of them is left out.
    """
    problems: list[str] = []
    for check, reads in CHECKS.items():
        if not any(path.startswith(reads) for path in failed):
            problems.extend(check(config))
    return problems


def warnings(config: Any) -> list[str]:
    """A line for each thing that is allowed and hardly meant."""
    found, scheduler, steps = list(idle_keys(config)), config.lr_scheduler, config.training.steps
    if config.optimizer.lr == 0:
        found.append("[optimizer] lr = 0: the policy stays as it is")
    if 0 < steps <= config.trajectory_queue.max_staleness:
        found.append(
            f"[trajectory_queue] max_staleness {config.trajectory_queue.max_staleness} is not below [training] steps "
            f"{steps}: every batch is sampled under the first policy"
        )
    if (total := scheduler.total_steps or steps) < scheduler.warmup_steps:
        found.append(f"[lr_scheduler] warmup_steps {scheduler.warmup_steps} is cut to the schedule's {total} steps")
    cut = min(scheduler.warmup_steps, total)
    if scheduler.decay_ratio is not None and (decay := round(total * scheduler.decay_ratio)) > total - cut:
        found.append(
            f"[lr_scheduler] decay_ratio {scheduler.decay_ratio:g} is {decay} of {total} steps, of which warmup_steps "
            f"leaves {total - cut}: the learning rate falls in those"
        )
    return found


def cores_of(text: str) -> list[int]:
    """The CPU cores that a key such as "0-3,8" names; [] for any.

    Raises:
        ValueError: it names none.
    """
    cores: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ValueError(f'{part.strip()!r} is no core or range of cores; they look like "0-3,8"')
        if int(last or first) > 2**16:
            raise ValueError(f"there is no core {last or first}")
        cores += range(int(first), int(last or first) + 1)
    return cores


def not_writable(folder: str | Path) -> str:
    """Why `folder`, which need not be there yet, cannot be written in; empty: it can. Leaves nothing behind."""
    folder = Path(folder).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".probe"):
            return ""
    except OSError as error:
        return f"{folder} cannot be written in: {existing}: {error.strerror}"


def _outputs(config: Any) -> Iterator[str]:
    if not config.job.dump_folder:
        yield '[job] dump_folder is empty: name a folder for what the run leaves, such as "outputs/first"'
    elif problem := not_writable(config.job.dump_folder):
        yield f"[job] dump_folder {problem}"
    for section, key in (("checkpoint", "folder"), ("metrics", "save_tb_folder"), ("comm", "save_traces_folder")):
        name = Path(getattr(getattr(config, section), key))
        if name.is_absolute() or not name.parts or ".." in name.parts:
            yield f"[{section}] {key} = {str(name)!r}: it must be the name of a folder inside of [job] dump_folder"


def _batch(config: Any) -> Iterator[str]:
    degrees = config.parallelism
    # As trainer ranks share it: a shard degree of -1 is 1 here.
    degree = degrees.data_parallel_replicate_degree * max(1, degrees.data_parallel_shard_degree)
    batch = config.rl.prompts_per_step * config.rl.group_size
    if batch % degree:
        yield (
            f"{batch} completions a step ([rl] prompts_per_step {config.rl.prompts_per_step} x group_size "
            f"{config.rl.group_size}) cannot be shared equally by {degree} data-parallel trainer ranks "
            "([parallelism] data_parallel_*_degree): make the one a multiple of the other"
        )


def _replicated(config: Any) -> Iterator[str]:
    degrees = config.parallelism
    tensor, replicas = degrees.tensor_parallel_degree, degrees.data_parallel_replicate_degree
    if tensor > 1 and replicas > 1 and degrees.data_parallel_shard_degree <= 1:
        yield (
            f"[parallelism] data_parallel_replicate_degree {replicas} (DDP) does not go with tensor_parallel_degree "
            f"{tensor}: set data_parallel_replicate_degree = 1, and data_parallel_shard_degree = {replicas} (FSDP) for "
            "as many data-parallel ranks"
        )


def _room(config: Any) -> Iterator[str]:
    if config.training.seq_len <= config.sampling.max_tokens:
        yield (
            f"context too short: [training] seq_len {config.training.seq_len} leaves no room for a prompt before "
            f"[sampling] max_tokens {config.sampling.max_tokens}; raise the one or lower the other"
        )


def _stop(config: Any) -> Iterator[str]:
    if "" in config.sampling.stop:
        yield "[sampling] stop has an empty string, which every completion would end at: leave it out"


def _date(config: Any) -> Iterator[str]:
    try:
        datetime.date.fromisoformat(config.data.date or "2000-01-01")
    except ValueError as error:
        yield f'[data] date = {config.data.date!r}: {error}; a day is written "{datetime.date.today()}"'


def _columns(config: Any) -> Iterator[str]:
    if config.data.question_column == config.data.answer_column:
        yield (
            f"[data] question_column and answer_column are both {config.data.answer_column!r}: the prompt would give "
            "the answer away"
        )


def _learnable(config: Any) -> Iterator[str]:
    sampling = config.sampling
    if config.rl.group_size > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        setting = "temperature 0" if sampling.temperature == 0 else "top_k 1"
        yield (
            f"[sampling] {setting} makes the {config.rl.group_size} completions of a prompt equal ([rl] group_size): "
            "none is better than another, and nothing is learned. Set temperature above 0, and top_k to 0 or above 1"
        )


def _rewards(config: Any) -> Iterator[str]:
    if not any(config.reward.weights.values()):
        yield "[reward.weights] gives no reward a weight: nothing is learned; name one, such as gsm8k = 1.0"


def _evaluation(config: Any) -> Iterator[str]:
    evaluation = config.evaluation
    if not evaluation.interval:
        return
    if not evaluation.k or not all(k <= evaluation.samples for k in evaluation.k):
        yield (
            f"[evaluation] k = {evaluation.k} with samples = {evaluation.samples}: pass@k takes at least k samples "
            "of each problem"
        )
    if evaluation.samples > 1 and not evaluation.temperature:
        yield (
            f"[evaluation] samples = {evaluation.samples} at temperature 0 would all be the same; raise the "
            "temperature or take 1 sample"
        )


def _schedule(config: Any) -> Iterator[str]:
    total = config.lr_scheduler.total_steps
    if total is not None and total < config.training.steps:
        yield (
            f"[lr_scheduler] total_steps {total} is below [training] steps {config.training.steps}: past its end the "
            "schedule has no learning rate; raise it or leave it out"
        )


def _optimizer(config: Any) -> Iterator[str]:
    if config.optimizer.name not in ("Adam", "AdamW"):
        yield f"[optimizer] name {config.optimizer.name!r}: torchtitan has 'Adam' and 'AdamW'"


def _checkpoint(config: Any) -> Iterator[str]:
    settings = config.checkpoint
    if settings.enable and settings.last_save_in_hf and not settings.last_save_model_only:
        yield "[checkpoint] last_save_in_hf holds weights alone: set last_save_model_only = true too"
    if settings.export_dtype != "float32" and not (settings.enable and settings.last_save_model_only):
        yield (
            f"[checkpoint] export_dtype {settings.export_dtype} is that of a last checkpoint of weights alone: set "
            "enable and last_save_model_only = true, or leave it out"
        )
    if settings.load_step != -1 and not settings.enable:
        yield f"[checkpoint] load_step {settings.load_step} takes enable = true: without it nothing is looked for"


def _recomputation(config: Any) -> Iterator[str]:
    settings = config.activation_checkpoint
    if settings.mode == "memory_budget":
        yield '[activation_checkpoint] mode = "memory_budget" takes torch.compile; use "selective", "full" or "none"'
    option = settings.selective_ac_option
    if option != "op" and not (option.isdecimal() and int(option) > 0):
        yield f'[activation_checkpoint] selective_ac_option = {option!r}: it is "op", or "n" for every nth layer'
    if settings.determinism_check not in ("default", "none"):
        yield f'[activation_checkpoint] determinism_check = {settings.determinism_check!r}: it is "default" or "none"'


def _engine(config: Any) -> Iterator[str]:
    engine = config.generator
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        yield (
            f"[generator] max_num_batched_tokens {engine.max_num_batched_tokens} is below max_num_seqs "
            f"{engine.max_num_seqs}: each request takes a token of an engine step; raise the one or lower the other"
        )


def _cores(config: Any) -> Iterator[str]:
    for section, elsewhere in (("trainer", config.cluster.trainer), ("generator", config.cluster.generators)):
        text = getattr(config, section).cores
        try:
            named = cores_of(text)
        except ValueError as error:
            yield f"[{section}] cores = {text!r}: {error}"
            continue
        if not elsewhere and (missing := set(named) - (here := os.sched_getaffinity(0))):
            yield (
                f"[{section}] cores = {text!r}: this process may not run on {', '.join(map(str, sorted(missing)))}; "
                f"it has {', '.join(map(str, sorted(here)))}"
            )


def _same_arithmetic(config: Any) -> Iterator[str]:
    training, degrees, engine = config.training, config.parallelism, config.generator
    if config.parity.check == "off":
        return
    if engine.dtype != training.mixed_precision_param:
        yield (
            f"[generator] dtype {engine.dtype} is not what the trainer computes in, [training] "
            f'mixed_precision_param {training.mixed_precision_param}; [parity] check = "off" allows it'
        )
    if engine.tensor_parallel_degree != degrees.tensor_parallel_degree:
        yield (
            f"[generator] tensor_parallel_degree {engine.tensor_parallel_degree} and [parallelism] "
            f"tensor_parallel_degree {degrees.tensor_parallel_degree} sum in different orders; make them equal, or set "
            '[parity] check = "off"'
        )
    if os.environ.get("VLLM_BATCH_INVARIANT") == "0":
        yield 'VLLM_BATCH_INVARIANT=0 contradicts [parity] check; unset it or set check = "off"'


def _environment(config: Any) -> Iterator[str]:
    yield from environment_problems()


def _wandb(config: Any) -> Iterator[str]:
    if config.metrics.enable_wandb and find_spec("wandb") is None:
        yield "[metrics] enable_wandb: there is no package wandb; install it (pip install wandb) or turn it off"


# The keys and sections that each of them reads.
CHECKS: dict[Callable[[Any], Iterator[str]], tuple[str, ...]] = {
    _outputs: ("job.dump_folder", "checkpoint.folder", "metrics.save_tb_folder", "comm.save_traces_folder"),
    _batch: ("rl.prompts_per_step", "rl.group_size", "parallelism.data_parallel"),
    _replicated: ("parallelism",),
    _room: ("training.seq_len", "sampling.max_tokens"),
    _stop: ("sampling.stop",),
    _date: ("data.date",),
    _columns: ("data.question_column", "data.answer_column"),
    _learnable: ("rl.group_size", "sampling.temperature", "sampling.top_k"),
    _rewards: ("reward.weights",),
    _evaluation: ("evaluation",),
    _schedule: ("lr_scheduler.total_steps", "training.steps"),
    _optimizer: ("optimizer.name",),
    _checkpoint: ("checkpoint",),
    _recomputation: ("activation_checkpoint",),
    _engine: ("generator.max_num",),
    _cores: ("trainer.cores", "generator.cores", "cluster"),
    _same_arithmetic: (
        *("training.mixed_precision_param", "generator.dtype", "parity.check"),
        *("parallelism.tensor_parallel", "generator.tensor_parallel"),
    ),
    _environment: (),
    _wandb: ("metrics.enable_wandb",),
}
