# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The policy's generator: vLLM's engine in this process, with weights that can be replaced in place."""

import os
import pickle
from typing import Any, TYPE_CHECKING

import torch
from torchtitan.experiments.rl.unified.infra.process import threads_of_rank
from torchtitan.experiments.rl.unified.infra.weight_transport import build_transport, WeightUpdate
from torchtitan.experiments.rl.unified.job_config import JobConfig
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
        self.policy_version = -1
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
            **({"attention_backend": generator.attention_backend} if generator.attention_backend else {}),
            dtype=generator.dtype,
            kv_cache_memory_bytes=int(generator.kv_cache_gib * 2**30),
            block_size=generator.block_size,
            max_num_seqs=generator.max_num_seqs,
            max_num_batched_tokens=generator.max_num_batched_tokens,
            enable_prefix_caching=generator.enable_prefix_caching,
        )

    def generate(self, requests: list[Request]) -> list[Trajectory]:
        """Samples one completion for each request, in the requests' order."""
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
        return [self._trajectory(request, output.outputs[0]) for request, output in zip(requests, outputs, strict=True)]

    def update_weights(self, update: WeightUpdate) -> int:
        """Replaces the engine's weights in place and drops its prefix cache; returns the version it now runs."""
        # As bytes: the engine's messages know no dataclasses.
        args = (pickle.dumps(update), self.config.weight_sync.transport)
        self.engine.collective_rpc("update_policy_weights", args=args)
        if not self.engine.reset_prefix_cache():
            raise RuntimeError(
                f"requests ran during the update to version {update.version}: their prefix cache is stale"
            )
        self.policy_version = update.version
        return self.policy_version

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
    """What this experiment adds to vLLM's workers (engine argument `worker_extension_cls`)."""

    def update_policy_weights(self, update: bytes, transport: str) -> None:
        """Fetches a pickled WeightUpdate and copies it over the weights; raises before the first copy if damaged."""
        with build_transport(transport).receive(pickle.loads(update)) as weights:
            self.model_runner.get_model().update_weights(weights)


def prepare_process(tensor_parallel_degree: int, batch_invariant: bool, num_threads: int = 0) -> None:
    """Sets what vLLM reads from the environment; call it before vLLM is imported in this process.

    Args:
        tensor_parallel_degree: ranks of the engine.
        batch_invariant: ask vLLM for batch-invariant arithmetic.
        num_threads: CPU threads of a rank; 0 shares this machine's cores among the ranks.
    """
    os.environ["VLLM_BATCH_INVARIANT"] = "1" if batch_invariant else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if torch.cuda.is_available():
        return
    # Nothing here runs long enough to earn back what torch.compile costs, and compiled code has bits of its own.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
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
    **engine_args: Any,
) -> "LLM":
    """A vLLM engine that runs the policy in `checkpoint`, a directory in Hugging Face layout."""
    prepare_process(tensor_parallel_degree, batch_invariant, num_threads)
    from torchtitan.experiments.rl.unified.model.plugin import ARCHITECTURES
    from vllm import LLM

    return LLM(
        checkpoint,
        hf_overrides={"architectures": [ARCHITECTURES[mode]]},
        additional_config={"torchtitan": {"name": model_name, "flavor": flavor}},
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_degree,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{PolicyWorker.__module__}.{PolicyWorker.__qualname__}",
        # No sampling defaults of the checkpoint's generation_config.json; each of its EOS ids ends a completion still.
        generation_config="vllm",
        use_tqdm_on_load=False,
        **engine_args,
    )
