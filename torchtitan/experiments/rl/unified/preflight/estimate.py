# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a job will do, computed from its config: processes, memory, tokens a step, checkpoints. Nothing is started."""

import os
from dataclasses import dataclass, field

import torch
from torchtitan.experiments.rl.unified.config.checks import cores_of
from torchtitan.experiments.rl.unified.config.control_groups import cores as usable_cores, limits
from torchtitan.experiments.rl.unified.config.derived import (
    data_parallel_degree,
    engines_share_memory,
    past_versions,
    steps_ahead,
    threads_of_rank,
    trainer_ranks,
    versions_kept,
)
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.preflight.model import model_of_job

GIB = 2**30
# Of a process with this job's libraries and no model to speak of: measured, shared pages counted once.
BASE_BYTES = {"controller": int(0.65 * GIB), "trainer": int(0.5 * GIB), "generator": int(0.75 * GIB)}
# Parts that are as large as said only if completions are as long as they may be.
BY_LENGTH = {"activations", "logits"}


@dataclass(frozen=True)
class ProcessGroup:
    """Processes of one kind.

    Attributes:
        name: what they do.
        count: how many there are.
        threads: CPU threads of each.
        memory: bytes of each, by what they hold.
        here: they run on this host.
    """

    name: str
    count: int
    threads: int
    memory: dict[str, int]
    here: bool = True

    @property
    def total(self) -> int:
        """Bytes that they take on this host at most."""
        return self.count * sum(self.memory.values()) * self.here

    @property
    def least(self) -> int:
        """Bytes that they take there however short the completions are."""
        return self.count * sum(size for name, size in self.memory.items() if name not in BY_LENGTH) * self.here


@dataclass(frozen=True)
class JobEstimate:
    """A job before it runs.

    Attributes:
        groups: its processes.
        facts: (name, text) of everything else worth knowing.
        overlap: trainer and generators compute at the same time.
        needs_gpu: the setting that does; empty: none.
        cores: that this machine gives the job.
        memory_bytes: that this machine has, or the limit this process runs under.
        on_host: the models lie in the host's memory, not in an accelerator's.
    """

    groups: list[ProcessGroup]
    facts: list[tuple[str, str]]
    overlap: bool = False
    needs_gpu: str = ""
    cores: int = field(default_factory=usable_cores)
    memory_bytes: int = field(default_factory=lambda: machine_memory())
    on_host: bool = field(default_factory=lambda: this_device().in_host_memory)

    @property
    def total_bytes(self) -> int:
        return sum(group.total for group in self.groups)

    def warnings(self) -> list[str]:
        """What will be slow or tight."""
        found = []
        threads = [group.count * group.threads * group.here for group in self.groups[1:]]
        busiest = sum(threads) if self.overlap else max(threads)
        if busiest > self.cores:
            found.append(f"{busiest} compute threads run at once on {self.cores} cores: they will wait for each other")
        if not self.on_host:
            return found
        if self._least_bytes <= self.memory_bytes and self.total_bytes > 0.85 * self.memory_bytes:
            found.append(
                f"up to {_gib(self.total_bytes)} of memory are needed, this machine has {_gib(self.memory_bytes)} "
                f"({self._shares()}): a smaller [rl] microbatch_tokens or [generator] kv_cache_gib takes less"
            )
        return found

    def refusals(self) -> list[str]:
        """What this machine lacks: memory, even if completions are short, or a GPU."""
        if not self.on_host:
            return []
        found = []
        if self.needs_gpu:
            found.append(f'{self.needs_gpu} needs a GPU, which this machine has not: use "shared_memory"')
        if self._least_bytes > self.memory_bytes:
            found.append(
                f"at least {_gib(self._least_bytes)} of memory are needed, this machine has {_gib(self.memory_bytes)}: "
                f"use fewer ranks, a smaller model or [generator] kv_cache_gib; at most there would be {self._shares()}"
                "; --dry_run prints the parts"
            )
        return found

    @property
    def _least_bytes(self) -> int:
        return sum(group.least for group in self.groups)

    def _shares(self) -> str:
        return ", ".join(f"{g.count} x {g.name} {_gib(g.total // g.count)}" for g in self.groups if g.here)

    def text(self) -> str:
        """The plan as lines to print."""
        lines = []
        for group in self.groups:
            parts = ", ".join(f"{name} {_gib(size)}" for name, size in group.memory.items() if size)
            threads = f"{group.threads} thread" + "s" * (group.threads != 1)
            where = "" if group.here else "on other hosts, "
            each = _gib(sum(group.memory.values()))
            lines.append((f"{group.count} x {group.name}", f"{where}{threads}, {each}: {parts}"))
        where = "" if self.on_host else ", models in accelerator memory"
        lines.append(
            ("memory", f"up to {_gib(self.total_bytes)} of {_gib(self.memory_bytes)}, {self.cores} cores{where}")
        )
        lines = [*self.facts[:1], *lines, *self.facts[1:]]
        return "\n".join(f"{name:<32}{text}" for name, text in lines)


def estimate_job(config: JobConfig) -> JobEstimate:
    """The plan of a checked job.

    Memory is an estimate, on the high side: a full microbatch, completions as long as they may be.
    """
    parameters = count_parameters(config)
    groups = [_controller(), _trainer(config, parameters), *_generators(config, parameters)]
    transport = config.weight_sync.transport
    elsewhere = config.cluster.trainer and config.cluster.generators
    needs_gpu = f'[weight_sync] transport = "{transport}"' if transport.startswith("vllm_") and not elsewhere else ""
    return JobEstimate(groups, _facts(config, parameters), steps_ahead(config) > 0, needs_gpu)


def count_parameters(config: JobConfig) -> int:
    """Parameters of the policy, tied ones once."""
    with torch.device("meta"):
        model = model_of_job(config).build()
    return sum(parameter.numel() for parameter in model.parameters())


def checkpoint_count(config: JobConfig) -> int:
    """How many checkpoints a job writes: every `interval` steps, after the last, and after the first if it says so."""
    settings, last = config.checkpoint, config.training.steps
    if not settings.enable or settings.load_only:
        return 0
    first = settings.enable_first_step_checkpoint and 1 < min(settings.interval, last)
    return -(-last // settings.interval) + first


def machine_memory() -> int:
    """Bytes of memory that this process and its children may use: the machine's, or less if its control group says."""
    return int(min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits("memory")]))


def _controller() -> ProcessGroup:
    return ProcessGroup("controller", 1, 1, {"libraries": BASE_BYTES["controller"]})


def _trainer(config: JobConfig, parameters: int) -> ProcessGroup:
    degrees, training = config.parallelism, config.training
    ranks, tensor_parallel = trainer_ranks(config), degrees.tensor_parallel_degree
    sizes = model_of_job(config).geometry
    master, compute = (getattr(torch, name).itemsize for name in (training.dtype, training.mixed_precision_param))
    shards = max(1, degrees.data_parallel_shard_degree) * tensor_parallel
    stored = parameters * master // shards
    states = {"adam": 2, "adamw": 2}.get(config.optimizer.name.lower(), 1)
    completions = config.rl.prompts_per_step * config.rl.group_size // data_parallel_degree(config)
    tokens = max(min(config.rl.microbatch_tokens, completions * training.seq_len), training.seq_len)
    sampled = min(tokens, completions * config.sampling.max_tokens)
    # What a layer keeps for its backward pass: about 8 vectors of the model's width and 3 of the MLP's a token.
    kept = 1 if config.activation_checkpoint.mode == "full" else 8
    layers = sizes.layers * tokens * (kept * sizes.width + (3 * sizes.hidden if kept > 1 else 0)) * compute
    # Logits of the microbatch, then in fp32 for the sampled tokens: scaled, as log-probs, and the gradient of each.
    logits = sizes.vocabulary * (tokens * compute * 2 + sampled * 4 * 4)
    # The policy leaves the trainer through memory that the generator reads, in the generator's dtype; one version of it
    # may stand in place of the engines' own weights.
    copies = versions_kept(config) - engines_share_memory(config)
    sent = parameters * getattr(torch, config.generator.dtype).itemsize
    return ProcessGroup(
        f"trainer rank ({_layout(config)})",
        ranks,
        _threads(config.trainer.num_threads, config.trainer.cores, ranks),
        {
            "libraries": BASE_BYTES["trainer"],
            "weights": stored,
            "gradients": stored,
            "optimizer": states * stored,
            "reference policy": stored if config.policy_loss.kl_weight else 0,
            "past versions": stored * past_versions(config),
            "activations": layers // tensor_parallel,
            "logits": logits,
            "weights on their way": sent * copies // ranks,
        },
        here=not config.cluster.trainer,
    )


def _generators(config: JobConfig, parameters: int) -> list[ProcessGroup]:
    generator = config.generator
    ranks, engines = generator.tensor_parallel_degree, generator.replicas
    weights = parameters * getattr(torch, generator.dtype).itemsize // ranks
    memory = {
        "libraries": BASE_BYTES["generator"],
        "weights": weights,
        "packed weights": weights if this_device().in_host_memory and config.parity.check != "off" else 0,
        "KV cache": int(generator.kv_cache_gib * GIB),
    }
    threads, here = _threads(generator.num_threads, generator.cores, ranks), not config.cluster.generators
    found = [ProcessGroup("generator rank", ranks * engines, threads, memory, here)]
    if ranks > 1:
        # vLLM runs the ranks of one engine in processes of their own.
        found.append(ProcessGroup("engine", engines, 1, {"libraries": BASE_BYTES["generator"]}, here))
    return found


def _threads(threads: int, cores: str, ranks: int) -> int:
    """CPU threads of each of `ranks` processes that share the cores named ("0-3,8"), or all that there are."""
    if threads or not cores:
        return threads or threads_of_rank(ranks)
    return max(1, len(cores_of(cores)) // ranks)


def _layout(config: JobConfig) -> str:
    degrees = config.parallelism
    replicate, shard = degrees.data_parallel_replicate_degree, max(1, degrees.data_parallel_shard_degree)
    names = {"DDP": replicate * (shard == 1), "HSDP": replicate * (shard > 1), "FSDP": shard}
    names["TP"] = degrees.tensor_parallel_degree
    return ", ".join(f"{name} {degree}" for name, degree in names.items() if degree > 1) or "alone"


def _facts(config: JobConfig, parameters: int) -> list[tuple[str, str]]:
    rl, sampling, saves = config.rl, config.sampling, checkpoint_count(config)
    completions = rl.prompts_per_step * rl.group_size
    prompt = config.training.seq_len - sampling.max_tokens
    device = this_device().name.upper()
    if saves:
        kept = config.checkpoint.keep_latest_k
        size = parameters * getattr(torch, config.training.dtype).itemsize * 3
        often = f"every {config.checkpoint.interval} steps and after the last"
        saved = f"{saves}, {often}, about {_gib(size)} each, " + (f"the newest {kept} kept" if kept else "all kept")
    else:
        saved = "none: the run cannot be resumed or replayed ([checkpoint] enable)"
    return [
        (
            "model",
            f"{model_of_job(config).family.name} {config.model.flavor or 'of ' + config.model.hf_assets_path}, "
            f"{parameters:,} parameters, {rl.mode} mode, on the {device}",
        ),
        ("a step", f"{rl.prompts_per_step} prompts x {rl.group_size} completions = {completions} completions"),
        (
            "tokens sampled",
            f"at most {completions * sampling.max_tokens:,} a step ({sampling.max_tokens} a completion)",
        ),
        (
            "tokens trained on",
            f"at most {completions * config.training.seq_len:,} a step (prompts of up to {prompt} tokens)",
        ),
        ("a microbatch", f"at most {rl.microbatch_tokens:,} tokens of one trainer rank"),
        (
            "steps",
            f"{config.training.steps:,}, generators work {steps_ahead(config)} ahead; parity check: "
            f"{config.parity.check}",
        ),
        ("checkpoints", saved),
        ("outputs", config.job.dump_folder),
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.1f} MiB"
