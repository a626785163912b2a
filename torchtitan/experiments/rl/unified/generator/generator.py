# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The policy's generator: vLLM's engine in this process, with weights that can be replaced in place."""

import functools
import pickle
from typing import Any, TYPE_CHECKING

import torch
from torchtitan.experiments.rl.unified.config.derived import threads_of_rank
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.config.sections import Sampling
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.generator.engine import build_engine
from torchtitan.experiments.rl.unified.messages import Request, Trajectory, WeightUpdate
from torchtitan.experiments.rl.unified.weights.transports import build_transport

if TYPE_CHECKING:
    from vllm import CompletionOutput


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
        self.tokenizer = self.engine.get_tokenizer()
        known = self.tokenizer.added_tokens_decoder
        self._special = {token.content: number for number, token in known.items() if token.special}

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
                    stop_token_ids=[self._special[text] for text in sampling.stop if text in self._special],
                    skip_special_tokens=not sampling.special_tokens_in_text,
                    seed=request.seed,
                    logprobs=0,
                    # No object a token, and no text of one where nothing looks for a stop string in it.
                    flat_logprobs=True,
                    detokenize=bool(sampling.stop),
                )
                for request, sampling in zip(requests, settings, strict=True)
            ],
            use_tqdm=False,
        )
        self._ask_ranks("check_policy_weights")
        sampled = zip(requests, settings, outputs, strict=True)
        return [self._trajectory(request, sampling, output.outputs[0]) for request, sampling, output in sampled]

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

    def _trajectory(self, request: Request, sampling: Sampling, completion: "CompletionOutput") -> Trajectory:
        logprobs = completion.logprobs
        return Trajectory(
            request=request,
            completion_ids=list(completion.token_ids),
            # Of each position the sampled token's comes first.
            logprobs=torch.tensor([logprobs.logprobs[start] for start in logprobs.start_indices], dtype=torch.float32),
            policy_version=self.policy_version,
            finish_reason=completion.finish_reason,
            text=completion.text if sampling.stop else self._text(request, sampling, completion),
        )

    def _text(self, request: Request, sampling: Sampling, completion: "CompletionOutput") -> str:
        """A completion without stop strings in words, as vLLM has it: what it adds to the prompt's end, without EOS and
        without a character that has only begun."""
        ids, end = list(completion.token_ids), request.prompt_ids[-5:]
        ids = ids[:-1] if completion.finish_reason == "stop" else ids
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=not sampling.special_tokens_in_text)
        return decode(end + ids)[len(decode(end)) :].rstrip("\ufffd")


def _ranks_on_host(job_config: JobConfig) -> int:
    generator, hosts = job_config.generator, max(1, len(job_config.cluster.generators))
    return generator.tensor_parallel_degree * -(-generator.replicas // hosts)
