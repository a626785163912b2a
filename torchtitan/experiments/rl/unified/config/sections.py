# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The TOML sections this folder adds to torchtitan's JobConfig. Needs the standard library alone."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .ranges import COUNT, COUNT_OR_NONE, Range, SECONDS, SEED, TEMPERATURE


@dataclass
class RL:
    mode: Literal["unified", "vllm_compat"] = "unified"
    """Whose model generates: TorchTitan's own inside vLLM, or vLLM's own with the trainer reproducing its arithmetic"""

    prompts_per_step: Annotated[int, COUNT] = 16
    """Prompts of one training step"""

    group_size: Annotated[int, COUNT] = 8
    """Completions sampled for each prompt"""

    microbatch_tokens: Annotated[int, COUNT] = 4096
    """Token budget of one packed microbatch (training.seq_len bounds one sequence, this bounds a batch of them)"""

    truncated_completions: Literal["train", "mask", "zero_reward"] = "train"
    """What to do with completions cut off at sampling.max_tokens: train on them like on others, keep their tokens out
    of the loss and its token count (overlong filtering, DAPO, arXiv:2503.14476), or give them a reward of 0 at most"""

    log_samples: Annotated[int, COUNT_OR_NONE] = 6
    """Completions a step written to samples.jsonl: in turn the best, the worst and a truncated one"""

    record_replay: bool = True
    """With checkpoints: keep what scripts/replay.py checks a step by, in replay/ (8 bytes a sampled token, 4 a prompt
    token, of the first step after each checkpoint)"""


@dataclass
class Data:
    question_column: str = "question"
    """Column of the dataset that holds the problem: text, or a list of messages. "a.b" is the field b of column a"""

    answer_column: str = "answer"
    """Column that holds the reference answer, text or a number; likewise"""

    overlong_prompts: Literal["drop", "error"] = "error"
    """What to do with a prompt that leaves no room for sampling.max_tokens: drop and count it, or stop"""

    system_prompt: str = ""
    """System message before each question; empty: none"""

    template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """More arguments of the tokenizer's chat template, such as Qwen3's enable_thinking"""

    special_tokens_in_text: bool = False
    """The name of a special token in a question or in system_prompt is that token; else it is text, as all the rest"""

    date: str = ""
    """The day that a chat template gets when it asks for today's, such as "2026-11-26"; empty: one that asks is
    refused, as its prompts would be others tomorrow"""


@dataclass
class Sampling:
    temperature: Annotated[float, TEMPERATURE] = 1.0
    """Log-probs on both sides are those of the distribution after temperature, top_k and top_p"""

    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Nucleus sampling; 1 is off"""

    top_k: Annotated[int, COUNT_OR_NONE] = 0
    """Sample from the k likeliest tokens; 0 is off"""

    max_tokens: Annotated[int, COUNT] = 64
    """Longest completion in tokens, EOS included"""

    stop: list[str] = field(default_factory=list)
    """Strings that end a completion, beside every EOS of generation_config.json. Its text ends before them; the tokens
    they were sampled in belong to it, for the loss too. The name of a special token is that token, sampled"""

    special_tokens_in_text: bool = False
    """A completion's text, as rewards and stop strings see it, has the names of the special tokens in it (but for the
    one that ended it); else they are left out"""


@dataclass
class Evaluation:
    interval: Annotated[int, COUNT_OR_NONE] = 0
    """Steps between evaluations on held-out problems; one before the first step and one after the last come with them.
    0: no evaluation"""

    problems: Annotated[int, COUNT_OR_NONE] = 0
    """Problems of an evaluation, always the same; 0: all there are"""

    samples: Annotated[int, COUNT] = 1
    """Completions of each problem"""

    k: Annotated[list[int], COUNT] = field(default_factory=lambda: [1])
    """pass@k is estimated for each of these, none above samples (arXiv:2107.03374)"""

    temperature: Annotated[float, TEMPERATURE] = 0.0
    """Of the completions; 0 takes the likeliest token. What else [sampling] says holds here too"""

    seed: Annotated[int, SEED] = 0
    """Of the choice of problems and of the completions; apart from the training's"""

    reward: str = "gsm8k"
    """A completion passes if this reward, named as in [reward.weights], is at least 1"""

    dataset_path: str | None = None
    """Held-out rows, in place of split "test" of [training] dataset"""


@dataclass
class Generator:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and KV cache in the engine"""

    replicas: Annotated[int, COUNT] = 1
    """Engines that share a step's requests; the bits of a completion do not depend on their number"""

    tensor_parallel_degree: Annotated[int, COUNT] = 1
    """Ranks that share one engine's model"""

    kv_cache_gib: Annotated[float, Range(above=0, most=1e6)] = 0.25
    """KV cache of one rank in GiB"""

    block_size: Annotated[int, COUNT] = 32
    """Tokens of one KV cache block"""

    max_num_seqs: Annotated[int, COUNT] = 128
    """Most requests that run at once"""

    max_num_batched_tokens: Annotated[int, COUNT] = 8192
    """Most tokens of one engine step: the budget of chunked prefill"""

    enable_prefix_caching: bool = True
    """Reuse the KV cache of shared prefixes, within one policy version"""

    num_threads: Annotated[int, Range(0, 4096)] = 0
    """CPU threads of one rank; 0: all the cores this machine has, shared by the ranks"""

    cores: str = ""
    """CPU cores that the engines run on, such as "0-3,8"; empty: any"""

    attention_backend: str = ""
    """vLLM's attention backend on a GPU; empty: FLASH_ATTN"""

    cuda_graphs: bool = True
    """On a GPU: replay decode steps as CUDA graphs instead of launching their kernels one by one"""

    timeout_seconds: Annotated[float, SECONDS] = 600
    """Longest wait for one batch of completions"""


@dataclass
class Reward:
    weights: Annotated[dict[str, float], Range(-1e6, 1e6)] = field(default_factory=lambda: {"gsm8k": 1.0})
    """Rewards by name (or dotted path of a function of yours) and their weights; a sample's reward is the sum"""

    timeout_seconds: Annotated[float, SECONDS] = 10
    """Longest time one sample's reward may take"""


@dataclass
class Advantage:
    name: str = "grpo"
    """Estimator, see advantage.py"""


@dataclass
class PolicyLoss:
    name: str = "grpo"
    """Loss, see loss/"""

    clip_low: Annotated[float, Range(0, 1)] = 0.2
    """Lower clip range of the probability ratio"""

    clip_high: Annotated[float, Range(0)] = 0.2
    """Upper clip range of the probability ratio"""

    kl_weight: Annotated[float, Range(0, 1e6)] = 0.0
    """Weight of the KL divergence (k3) from the frozen initial policy (model.hf_assets_path); 0 is off, at no cost"""

    tis_cap: Annotated[float, Range(above=0)] = 2.0
    """Largest importance weight of a token that an older policy version sampled"""


@dataclass
class Parity:
    check: Literal["off", "report", "assert"] = "assert"
    """Compare every sampled token's log-prob, generator against trainer: not at all, count mismatches, or stop at one.
    "off" also lets the engine and the trainer run without batch-invariant arithmetic."""

    stale_share: Annotated[float, Range(above=0, most=1)] = 1.0
    """Share of the completions of older policy versions (trajectory_queue.max_staleness above 0) that are compared, by
    one more forward pass under the weights that sampled them, which the trainer keeps; above 0, at most 1"""


@dataclass
class WeightSync:
    transport: Literal["shared_memory", "file", "monarch", "vllm_ipc", "vllm_nccl"] = "shared_memory"
    """How new weights reach the generators: memory of this host, files in a folder that all hosts mount, Monarch's
    RDMABuffer (TCP where there is no RDMA), the memory of the one GPU that all share, by vLLM's IPC engine, or from GPU
    to GPU by its NCCL engine"""

    folder: str = ""
    """Transport "file": a folder for this job's weights alone, on a file system that all its hosts mount; empty:
    "weights" in job.dump_folder"""


@dataclass
class Trainer:
    num_threads: Annotated[int, Range(0, 4096)] = 0
    """CPU threads of one rank; 0: all the cores this machine has, shared by the ranks"""

    cores: str = ""
    """CPU cores that the ranks run on, such as "0-3,8"; empty: any"""

    timeout_seconds: Annotated[float, SECONDS] = 600
    """Longest wait for one training step or weight update"""


@dataclass
class TrajectoryQueue:
    max_staleness: Annotated[int, COUNT_OR_NONE] = 0
    """Steps the generators work ahead: batch k is sampled under policy version k - max_staleness; 0: they take turns"""


@dataclass
class Supervision:
    max_restarts: Annotated[int, COUNT_OR_NONE] = 3
    """How often a run starts a lost generator or trainer mesh again before it gives up"""

    start_seconds: Annotated[float, SECONDS] = 600
    """Longest wait for the trainer's ranks to start, and for an engine"""

    grace_seconds: Annotated[float, SECONDS] = 30
    """After SIGTERM or SIGHUP, which end the run as Ctrl-C does, how long until its processes are killed"""


@dataclass
class Cluster:
    trainer: list[str] = field(default_factory=list)
    """Addresses of Monarch workers that run the trainer's ranks, such as "tcp://node1:26600"; empty: this host"""

    generators: list[str] = field(default_factory=list)
    """Addresses of Monarch workers that run the generators, in turn; empty: this host"""

    address: str = "tcp"
    """How those workers reach this process: "tcp" (its host name, any port), or an address like those above"""


@dataclass
class Model:
    """What torchtitan's [model] is here by default."""

    name: str = ""
    """Family of the model; empty: config.json's model_type says it"""

    flavor: str = ""
    """torchtitan's name for the model's shape, to be held against config.json; empty: config.json alone says it"""


@dataclass
class Sections:
    """All of them, by their names in the TOML."""

    rl: RL = field(default_factory=RL)
    data: Data = field(default_factory=Data)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    generator: Generator = field(default_factory=Generator)
    trainer: Trainer = field(default_factory=Trainer)
    trajectory_queue: TrajectoryQueue = field(default_factory=TrajectoryQueue)
    supervision: Supervision = field(default_factory=Supervision)
    cluster: Cluster = field(default_factory=Cluster)
    weight_sync: WeightSync = field(default_factory=WeightSync)
    reward: Reward = field(default_factory=Reward)
    advantage: Advantage = field(default_factory=Advantage)
    policy_loss: PolicyLoss = field(default_factory=PolicyLoss)
    parity: Parity = field(default_factory=Parity)
