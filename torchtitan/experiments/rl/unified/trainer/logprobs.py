# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Log-probs of sampled tokens under the sampling distribution, with the arithmetic vLLM's sampler uses."""

from dataclasses import dataclass

import torch
from torchtitan.experiments.rl.unified.config.sections import Sampling
from torchtitan.experiments.rl.unified.devices import device_of


def sampling_logits(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """fp32 (tokens, vocab) logits after temperature, top-k and top-p: what is cut off is -inf.

    Args:
        logits: (tokens, vocab), the model's dtype.
        temperature: 0 is greedy sampling; the logits are then those of the unscaled distribution.
        top_k: 0 is off.
        top_p: 1 is off.

    Source: vllm/v1/sample/sampler.py, `Sampler.sample`.
    """
    logits = logits.float()
    if temperature > 0:
        logits = logits / torch.tensor(temperature, dtype=torch.float32, device=logits.device)
        if top_k or top_p < 1:
            # vLLM's own filter: ties at the threshold must fall the same way.
            from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

            rows = logits.shape[0]
            k = torch.full((rows,), top_k, dtype=torch.int32, device=logits.device) if top_k else None
            p = torch.full((rows,), top_p, dtype=torch.float32, device=logits.device) if top_p < 1 else None
            keep = apply_top_k_top_p(logits.detach().clone(), k, p).isfinite()
            logits = logits.masked_fill(~keep, -torch.inf)
    return logits


def sampling_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """fp32 (tokens,) log-probs of `token_ids`, int64 (tokens,), as vLLM's "processed_logprobs".

    The other arguments are those of `sampling_logits`.
    """
    logits = sampling_logits(logits, temperature, top_k, top_p)
    return logits.log_softmax(dim=-1).gather(-1, token_ids[:, None])[:, 0]


@torch.no_grad()
def sampling_entropy(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """fp32 (tokens,) entropy in nats of the distribution that is sampled from, without gradient.

    Some rows at a time: it takes no second copy of the logits. Arguments are those of `sampling_logits`.
    """
    rows = max(1, device_of(logits).logits_at_once // logits.shape[-1])
    chunks = (sampling_logits(chunk, temperature, top_k, top_p) for chunk in logits.split(rows))
    return torch.cat([torch.special.entr(chunk.softmax(dim=-1)).sum(dim=-1) for chunk in chunks])


@dataclass(frozen=True)
class SamplingDistribution:
    """What the job's completions are sampled from, given logits (tokens, vocab); methods as the functions above."""

    sampling: Sampling

    @property
    def filters(self) -> bool:
        """Some tokens have no probability."""
        return self.sampling.top_k > 0 or self.sampling.top_p < 1

    def logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        sampling = self.sampling
        return sampling_logprobs(logits, token_ids, sampling.temperature, sampling.top_k, sampling.top_p)

    def unfiltered(self, logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probs before top-k and top-p: their divergence from another policy's is finite."""
        return sampling_logprobs(logits, token_ids, self.sampling.temperature)

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        return sampling_entropy(logits, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
