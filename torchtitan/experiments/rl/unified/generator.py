# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The policy's generator: vLLM's engine in this process, with weights that can be replaced in place."""

import functools
import os
import pickle
from typing import Any, TYPE_CHECKING

import torch
from torchtitan.experiments.rl.unified.infra.process import give_back_memory, threads_of_rank
from torchtitan.experiments.rl.unified.infra.weight_transport import (
    build_transport,
    ReceivedWeights,
    Receiver,
    WeightTransferError,
    WeightUpdate,
)
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.model.placement import check_arrived, not_placed
from torchtitan.experiments.rl.unified.rollout.trajectory import Request, Trajectory

if TYPE_CHECKING:
    from vllm import LLM


class Generator:
    """One vLLM engine that samples completions from the policy.

    Construct it in a process that has not imported vLLM: the engine reads its environment at import.

    Args:
        job_config: the job.
    """

    def __init__(self, job_config: JobConfig) -> None:
        self.config = job_config
        # -1: the checkpoint's; None: an update failed half way.
        self.policy_version: int | None = -1
        self.transport = build_transport(job_config)
        generator = job_config.generator
        self.engine = build_engine(
            job_config.model.hf_assets_path,
            mode=job_config.rl.mode,
            model_name=job_config.model.name,
            flavor=job_config.model.flavor,
            max_model_len=job_config.training.seq_len,
            tensor_parallel_degree=generator.tensor_parallel_degree,
            batch_invariant=job_config.parity.check != "off",
            num_threads=generator.num_threads or threads_of_rank(_ranks_on_host(job_config)),
            attention_backend=generator.attention_backend or "FLASH_ATTN",
            cuda_graphs=generator.cuda_graphs,
            dtype=generator.dtype,
            kv_cache_memory_bytes=int(generator.kv_cache_gib * 2**30),
            block_size=generator.block_size,
            max_num_seqs=generator.max_num_seqs,
            max_num_batched_tokens=generator.max_num_batched_tokens,
            enable_prefix_caching=generator.enable_prefix_caching,
        )

    def generate(self, requests: list[Request]) -> list[Trajectory]:
        """Samples one completion for each request, in the requests' order.

        Raises:
            WeightTransferError: a weight update failed half way, or the sender overwrote weights that were in use.
        """
        if self.policy_version is None:
            raise WeightTransferError(
                "the engine's weights are a mix of versions after a failed update: start it again"
            )
        from vllm import SamplingParams, TokensPrompt

        settings = [request.sampling or self.config.sampling for request in requests]
        outputs = self.engine.generate(
            [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests],
            [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_tokens,
                    stop=sampling.stop,
                    seed=request.seed,
                    logprobs=0,
                )
                for request, sampling in zip(requests, settings, strict=True)
            ],
            use_tqdm=False,
        )
        self._ask_ranks("check_policy_weights")
        return [self._trajectory(request, output.outputs[0]) for request, output in zip(requests, outputs, strict=True)]

    def update_weights(self, update: WeightUpdate) -> int:
        """Replaces the engine's weights in place and drops its prefix cache; returns the version it now runs.

        All or nothing: no rank changes before every rank has checked every tensor, and the engine's own memory is read
        back afterwards. Where the update lasts, an engine of one rank on a CPU computes from the sender's memory.

        Raises:
            WeightTransferError: what is wrong with which tensor. The engine still runs its old version; only if the
                failure came after the first copy does it refuse to generate.
        """
        fetched = self.transport.fetch(update)
        # As bytes: the engine's messages know no dataclasses.
        self._ask_ranks("stage_policy_weights", pickle.dumps(fetched))
        self.policy_version = None
        self._ask_ranks("commit_policy_weights")
        if not self.engine.reset_prefix_cache():
            raise RuntimeError(
                f"requests ran during the update to version {update.version}: their prefix cache is stale"
            )
        self.policy_version = update.version
        return self.policy_version

    def close(self) -> None:
        """Frees what this end of the weight transport holds."""
        self.transport.close()

    def _ask_ranks(self, method: str, *args: Any) -> None:
        """Calls a method of PolicyWorker on every rank of the engine; raises the first complaint."""
        complaints = self.engine.collective_rpc(method, timeout=self.config.trainer.timeout_seconds, args=args)
        for rank, complaint in enumerate(complaints):
            if complaint:
                raise WeightTransferError(f"generator rank {rank}: {complaint}")

    def _trajectory(self, request: Request, completion) -> Trajectory:
        ids = list(completion.token_ids)
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        return Trajectory(
            request=request,
            completion_ids=ids,
            logprobs=torch.tensor(logprobs, dtype=torch.float32),
            policy_version=self.policy_version,
            finish_reason=completion.finish_reason,
            text=completion.text,
        )


def _ranks_on_host(job_config: JobConfig) -> int:
    generator, hosts = job_config.generator, max(1, len(job_config.cluster.generators))
    return generator.tensor_parallel_degree * -(-generator.replicas // hosts)


class PolicyWorker:
    """What this experiment adds to vLLM's workers (engine argument `worker_extension_cls`).

    Methods return what went wrong, empty if nothing did: an exception would lose its class on the way.

    Attributes:
        weights_in_place: those of the last update if the engine computes from the sender's memory, else None.
    """

    weights_in_place: ReceivedWeights | None = None

    def stage_policy_weights(self, update: bytes) -> str:
        """Checks a pickled WeightUpdate, every byte of it, and changes nothing."""
        try:
            self.staged_weights = self.policy_receiver.receive(pickle.loads(update))
            _check_fits(self.model_runner.get_model(), self.staged_weights.update)
        except WeightTransferError as error:
            return str(error)
        return ""

    def commit_policy_weights(self) -> str:
        """Gives the engine's model what was staged, and reads it back from there."""
        model = self.model_runner.get_model()
        staged, self.staged_weights = self.staged_weights, None
        try:
            model.update_weights(staged.items(), lasting=staged.update.lasting)
            staged.check_still_there()
            self.weights_in_place = staged if check_arrived(model.placements(), staged) else None
        except WeightTransferError as error:
            return str(error)
        if self.weights_in_place is not None:
            give_back_memory()
        return ""

    def check_policy_weights(self) -> str:
        """Looks whether the weights were there to the end, if the engine computes from the sender's memory."""
        try:
            if self.weights_in_place is not None:
                self.weights_in_place.check_still_there()
        except WeightTransferError as error:
            return f"overwritten while in use: {error}"
        return ""

    @functools.cached_property
    def policy_receiver(self) -> Receiver:
        return Receiver(lambda handle: handle.open(self.vllm_config, self.device))


def _check_fits(model: torch.nn.Module, update: WeightUpdate) -> None:
    """The update brings each weight of the engine's model, in its shape and dtype, and no other."""
    placements = model.placements()
    given = {entry.spec.name: entry.spec for entry in update.entries}
    if placements.keys() != given.keys():
        raise WeightTransferError(
            f"weights of version {update.version} are not those of the engine's model: "
            f"{sorted(placements.keys() ^ given.keys())} do not match"
        )
    for name, placement in placements.items():
        expected, found = (placement.local.dtype, placement.shape), (given[name].dtype, given[name].shape)
        if expected != found:
            raise WeightTransferError(
                f"weights of version {update.version}: {name} came as {found}, the engine has {expected}"
            )
    if unreached := not_placed(model, placements):
        raise WeightTransferError(f"no weight update reaches {unreached} of the engine's model")


def prepare_process(tensor_parallel_degree: int, batch_invariant: bool, num_threads: int = 0) -> None:
    """Sets what vLLM reads from the environment; call it before vLLM is imported in this process.

    Args:
        tensor_parallel_degree: ranks of the engine.
        batch_invariant: ask vLLM for batch-invariant arithmetic.
        num_threads: CPU threads of a rank; 0 shares this machine's cores among the ranks.
    """
    os.environ["VLLM_BATCH_INVARIANT"] = "1" if batch_invariant else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Nothing here runs long enough to earn back what torch.compile costs, and compiled code has bits of its own.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if torch.cuda.is_available():
        # The other runner takes log-probs with kernels of its own, from logits divided by an approximate division.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        if tensor_parallel_degree == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "0"
        return
    if tensor_parallel_degree == 1:
        # The engine stays in this process: its threads are this process's.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads or threads_of_rank(1)))
    else:
        # vLLM would bind ranks to NUMA nodes, of which a small machine has one.
        cores = sorted(os.sched_getaffinity(0))
        share = num_threads or threads_of_rank(tensor_parallel_degree)
        ranks = [cores[(rank * share) % len(cores) :][:share] for rank in range(tensor_parallel_degree)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, rank)) for rank in ranks))


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
    **engine_args: Any,
) -> "LLM":
    """A vLLM engine that runs the policy in `checkpoint`, a directory in Hugging Face layout.

    `attention_backend` and `cuda_graphs` are for GPUs; a CPU has one backend and no graphs.
    """
    prepare_process(tensor_parallel_degree, batch_invariant, num_threads)
    from torchtitan.experiments.rl.unified.model.plugin import ARCHITECTURES
    from vllm import LLM

    engine_args["enforce_eager"] = not (cuda_graphs and torch.cuda.is_available())
    if torch.cuda.is_available():
        engine_args["attention_backend"] = attention_backend
        # The KV cache has its size from the job; vLLM only asks that this share of the memory is free.
        engine_args["gpu_memory_utilization"] = 0.05
        if cuda_graphs:
            engine_args["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return LLM(
        checkpoint,
        hf_overrides={"architectures": [ARCHITECTURES[mode]]},
        additional_config={"torchtitan": {"name": model_name, "flavor": flavor}},
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_degree,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{PolicyWorker.__module__}.{PolicyWorker.__qualname__}",
        # No sampling defaults of the checkpoint's generation_config.json; each of its EOS ids ends a completion still.
        generation_config="vllm",
        use_tqdm_on_load=False,
        **engine_args,
    )
