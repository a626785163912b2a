# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A mixture of experts whose rows do not depend on their neighbours, for any family with TorchTitan's MoE.

T tokens, E experts of which each token visits K, C the model's width, H an expert's.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torchtitan.models.moe import moe


class RowInvariantMoE(moe.MoE):
    """TorchTitan's MoE in one order: router in fp32, ties to the lower expert, outputs summed from the likeliest on.

    An expert multiplies the rows that chose it, so its product has another number of rows in every batch, and must be
    a row-invariant one. What a token's experts say is added in the order of their scores: no row depends on where
    others went, and trainer and generator choose alike without telling each other.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output (..., C) of `x` (..., C)."""
        x_TC = x.flatten(0, -2)
        scores_TK, experts_TK = self._route(x_TC)
        chosen = experts_TK.flatten()
        order = chosen.argsort(stable=True)
        rows = x_TC[order // self.router.top_k].split(
            torch.bincount(chosen, minlength=self.experts.num_experts).tolist()
        )
        experts = zip(rows, self.experts.w1.unbind(), self.experts.w2.unbind(), self.experts.w3.unbind(), strict=True)
        outputs = [_expert(*expert) for expert in experts if len(expert[0])]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        outputs_TKC = torch.cat(outputs)[back].unflatten(0, (-1, self.router.top_k)).float()
        total_TC = outputs_TKC[:, 0] * scores_TK[:, :1]
        for k in range(1, self.router.top_k):
            total_TC = total_TC + outputs_TKC[:, k] * scores_TK[:, k : k + 1]
        return total_TC.to(x.dtype).view(x.shape)

    def _route(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 scores (T, K) of the chosen experts, likeliest first, and their numbers."""
        logits_TE = F.linear(x_TC.float(), self.router.gate.weight.float())
        scores_TE, experts_TE = logits_TE.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        scores_TK, experts_TK = scores_TE[:, : self.router.top_k], experts_TE[:, : self.router.top_k]
        if self.router.route_norm:
            total_T1 = scores_TK[:, :1]
            for k in range(1, self.router.top_k):  # One order of sums; a reduction has as many as it has shapes.
                total_T1 = total_T1 + scores_TK[:, k : k + 1]
            scores_TK = scores_TK / total_T1
        return scores_TK, experts_TK


def _expert(x_NC: torch.Tensor, w1_HC: torch.Tensor, w2_CH: torch.Tensor, w3_HC: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x_NC, w1_HC)) * F.linear(x_NC, w3_HC), w2_CH)


def check_moe(args: moe.MoEArgs) -> None:
    """Raises ValueError for what `RowInvariantMoE` does not compute."""
    refused = {
        "shared experts": args.num_shared_experts > 0,
        f"router scores by {args.score_func}": args.score_func != "softmax",
        "scores before experts": args.score_before_experts,
        "groups of experts": args.num_expert_groups is not None,
        "a router with bias": args.gate_bias,
        "a factor on the scores": args.route_scale != 1.0,
    }
    if odd := [name for name, used in refused.items() if used]:
        raise ValueError(f"mixtures of experts here have no {', '.join(odd)}")


def make_row_invariant(model: nn.Module) -> None:
    """Gives every MoE of the model the arithmetic of this module, in place."""
    for module in model.modules():
        if type(module) is moe.MoE:
            module.__class__ = RowInvariantMoE
