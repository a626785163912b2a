# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The policy's trainer: torchtitan's Trainer, fed with packed trajectories and given a policy loss."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torchtitan.distributed import ParallelDims, utils as dist_utils
from torchtitan.experiments.rl.unified.algorithms.losses import policy_loss
from torchtitan.experiments.rl.unified.algorithms.losses.base import kl_k3, tis_weight
from torchtitan.experiments.rl.unified.config.derived import past_versions
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices.mode import backward_arithmetic, batch_invariant_mode
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.messages import ParityReport, StepResult, TokenStats, Trajectory
from torchtitan.experiments.rl.unified.trainer.checkpointing import CheckpointedTrainer
from torchtitan.experiments.rl.unified.trainer.finite import step_figures, stop_unless_finite
from torchtitan.experiments.rl.unified.trainer.kept_weights import KeptWeights, PastVersions
from torchtitan.experiments.rl.unified.trainer.logprobs import SamplingDistribution
from torchtitan.experiments.rl.unified.trainer.packing import assign_microbatches, Microbatch, pack
from torchtitan.experiments.rl.unified.trainer.parallelize import gathered_weights, MasterParallelDims
from torchtitan.experiments.rl.unified.trainer.parity import checked_share, compare_microbatch, stop_at_mismatch
from torchtitan.experiments.rl.unified.trainer.settings import kept_settings
from torchtitan.experiments.rl.unified.trainer.spec import register_policy
from torchtitan.experiments.rl.unified.trainer.verdict import Verdict
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.models.attention import VarlenMetadata


class RLTrainer(CheckpointedTrainer):
    """torchtitan's Trainer for a policy.

    `train_step` is upstream's: accumulation over microbatches, clipping, optimizer, schedule, metrics. A microbatch
    here is a pack of trajectories, and its loss is the policy loss over their sampled tokens.

    Args:
        job_config: the job.
    """

    def __init__(self, job_config: JobConfig) -> None:
        job_config = copy.deepcopy(job_config)
        chosen = job_config.model
        self.policy = model_of_checkpoint(chosen.hf_assets_path, chosen.name, chosen.flavor)
        chosen.name = register_policy(self.policy)
        super().__init__(job_config)
        # Mixed precision must cast the same tensors in trainer and generator; autocast would choose op by op.
        self.maybe_enable_amp = contextlib.nullcontext()
        self.verdict = Verdict()
        self.policy_loss = policy_loss(job_config.policy_loss)
        self.distribution = SamplingDistribution(job_config.sampling)
        self.reference: KeptWeights | None = None
        self.past = PastVersions(self.model_parts[0], past_versions(job_config))
        self.parity, self.stats = ParityReport(), TokenStats()
        self._trajectories: list[Trajectory] = []
        self._advantages = torch.empty(0)
        self._losses: list[torch.Tensor] = []
        self._unfiltered: dict[int, torch.Tensor] = {}
        # DDP averages gradients; a sum over the step's tokens wants their sum.
        averages = self.parallel_dims.dp_replicate_enabled and not self.parallel_dims.fsdp_enabled
        self.gradient_scale = self.parallel_dims.dp_replicate if averages else 1

    def init_distributed(self) -> ParallelDims:
        """Upstream's, and degrees under which the weights may have another dtype than the arithmetic."""
        dims, training = super().init_distributed(), self.job_config.training
        return dims if training.dtype == training.mixed_precision_param else MasterParallelDims(dims)

    def load(self) -> None:
        """Loads the newest whole checkpoint of the run, or the weights that training starts from; and the reference.

        Raises:
            ValueError: there are checkpoints, and none to go on from.
            CheckpointError: what was found cannot be read.
        """
        start, config = self._start(), self.job_config.checkpoint
        initial = config.initial_load_path or self.job_config.model.hf_assets_path
        if self.job_config.policy_loss.kl_weight:
            # Always from the initial weights: a checkpoint of the run holds weights that have moved.
            self._load_from(initial, model_only=True)
            self.reference = KeptWeights(self.model_parts[0])
        # CheckpointManager.load starts from random weights where its folder exists and holds nothing whole.
        with kept_settings(self.optimizers, self.lr_schedulers):
            if start.saved:
                self._load_from(str(start.saved.path), model_only=False)
            else:
                self._load_from(initial, config.initial_load_model_only)

    def step_on(self, trajectories: list[Trajectory], advantages: torch.Tensor) -> StepResult:
        """Takes one optimizer step on this rank's share of `trajectories`.

        Every rank raises the same error, before one waits for another; only one that comes up beside a collective (in
        the model itself, in its backward pass) is that rank's alone.

        Args:
            trajectories: of the whole step, the same list on every rank.
            advantages: fp32 (trajectories,).

        Raises:
            ParityError: a log-prob differs from the generator's and `[parity] check` is "assert"; no step was taken.
            NonFiniteError: the loss or the gradient norm is NaN or infinite; no step was taken, on no rank.
            ValueError: a trajectory is of a policy version that this trainer has not reached.
        """
        with self.verdict.agreed():
            if newer := [t.policy_version for t in trajectories if t.policy_version > self.step]:
                raise ValueError(f"policy version {max(newer)} reached a trainer at version {self.step}")
            rank, ranks = self._data_rank()
            microbatches = assign_microbatches(trajectories, ranks, self.job_config.rl.microbatch_tokens)[rank]
            packed = [pack(trajectories, advantages, indices) for indices in microbatches]
        self._trajectories, self._advantages = trajectories, advantages
        self.parity, self.stats, self._losses, self._unfiltered = ParityReport(), TokenStats(), [], {}
        self.step += 1
        self.gc_handler.run(self.step)
        self.gradient_accumulation_steps = len(microbatches)
        with self._arithmetic():
            self._check_stale(microbatches)
            self.past.keep(self.step - 1)
            rows = (vars(microbatch).copy() for microbatch in self._add_reference(packed))
            self.train_step(self.batch_generator((fields, fields.pop("labels")) for fields in rows))
        shared = self.parallel_dims.tp_enabled and self.parallel_dims.get_mesh("tp").get_local_rank() > 0
        parity, stats = (ParityReport(), TokenStats()) if shared else (self.parity, self.stats)
        due = self.checkpointer._should_save(self.step, self._at_last_step())
        return StepResult(self.step, parity=parity, stats=stats, checkpoint_due=due, **self.metrics_processor.last)

    def forward_backward_step(
        self, *, input_dict: dict[str, Any], labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Adds one microbatch's gradient; returns its loss sum over the step's tokens (upstream's contract).

        Their number is counted from the trajectories: upstream's count has the masked ones too.
        """
        microbatch = Microbatch(**input_dict, labels=labels)
        logits = self._sampled_logits(microbatch)
        with self.verdict.agreed():
            loss = self._loss(microbatch, logits)
        del logits  # The graph needs them no more.
        with self._arithmetic_of_backward():
            (loss * self.gradient_scale).backward()
        self._losses.append(loss.detach())
        if len(self._losses) == self.gradient_accumulation_steps:
            self._leave_out()
            self._check_finite()
        return self._losses[-1]

    def _loss(self, microbatch: Microbatch, logits: torch.Tensor) -> torch.Tensor:
        """The microbatch's part of the loss, its tokens compared and counted."""
        config = self.job_config.policy_loss
        labels_N = microbatch.sampled(microbatch.labels)
        logprobs_N = self.distribution.logprobs(logits, labels_N)
        unfiltered_N = self.distribution.unfiltered(logits, labels_N) if self.distribution.filters else logprobs_N
        generator_N = microbatch.sampled(microbatch.generator_logprobs)
        stale_N = microbatch.sampled(microbatch.policy_versions) < self.step - 1
        self._check_parity(microbatch, logprobs_N.detach(), ~stale_N)
        # What an older policy sampled may lie outside the current one's top-k or top-p: it is not trained on.
        cut_N = stale_N & (logprobs_N == -torch.inf)
        logprobs_N = logprobs_N.masked_fill(cut_N, 0.0)
        now_N = logprobs_N.detach()

        # A batch is used for one update, so the policy to stay close to is the current one. Where that did not sample
        # the tokens, the importance weight makes up for it; where it did, the weight is exactly 1.
        old_N = torch.where(stale_N, now_N, generator_N)
        weight_N = torch.where(stale_N, tis_weight(now_N, generator_N, config.tis_cap), 1.0)
        loss_N, clipped_N = self.policy_loss(logprobs_N, old_N, microbatch.sampled(microbatch.advantages))
        kl_reference = None
        if microbatch.reference_logprobs is not None:
            kl_N = kl_k3(unfiltered_N, microbatch.reference_logprobs)
            kl_reference = float(kl_N.detach().sum())
            loss_N = loss_N + config.kl_weight * kl_N
        trained = torch.tensor([self._is_trained(self._trajectories[i]) for i in microbatch.trajectories])
        trained_T = trained.to(loss_N.device).repeat_interleave(microbatch.cu_seqlens.diff())
        trained_N = microbatch.sampled(trained_T[None])
        kl_N = kl_k3(generator_N, now_N)
        if self.distribution.filters:
            kl_N = torch.where(stale_N, kl_k3(self._sampled_unfiltered(microbatch), unfiltered_N.detach()), kl_N)
        known_N = ~kl_N.isnan()

        self.stats += TokenStats(
            tokens=len(now_N),
            stale_tokens=int(stale_N.sum()),
            truncated_weights=int((stale_N & ~cut_N & (weight_N == config.tis_cap)).sum()),
            clipped_tokens=int(clipped_N.sum()),
            entropy=float(self.distribution.entropy(logits.detach()).sum()),
            kl_generator_trainer=float(kl_N[known_N].sum()),
            kl_reference=kl_reference,
            left_out_tokens=int((cut_N & trained_N).sum()),
            unknown_kl_tokens=int((~known_N).sum()),
        )
        return (loss_N * weight_N)[trained_N & ~cut_N].sum() / self._loss_tokens()

    def logprobs(self, microbatch: Microbatch) -> torch.Tensor:
        """fp32 log-probs of the microbatch's sampled tokens, in order, under the sampling distribution."""
        return self.distribution.logprobs(self._sampled_logits(microbatch), microbatch.sampled(microbatch.labels))

    def policy_weights(self, dtype: torch.dtype) -> PolicyWeights:
        """As `gathered_weights`: every rank must consume its stream."""
        return gathered_weights(self.model_parts[0], dtype)

    def _sampled_logits(self, microbatch: Microbatch) -> torch.Tensor:
        """(sampled tokens, vocab) logits that the microbatch's sampled tokens were drawn from."""
        longest = int(microbatch.cu_seqlens.diff().max())
        metadata = VarlenMetadata(microbatch.cu_seqlens, microbatch.cu_seqlens, longest, longest)
        logits = self.model_parts[0](microbatch.tokens, attention_masks=metadata, positions=microbatch.positions)
        return microbatch.sampled(logits)

    def _unfiltered_logprobs(self, microbatch: Microbatch) -> torch.Tensor:
        return self.distribution.unfiltered(self._sampled_logits(microbatch), microbatch.sampled(microbatch.labels))

    def _sampled_unfiltered(self, microbatch: Microbatch) -> torch.Tensor:
        """Log-probs before the filter under the weights that sampled the tokens; NaN where not computed again."""
        lengths = {i: len(self._trajectories[i].completion_ids) for i in microbatch.trajectories}
        unknown = {i: torch.full((length,), torch.nan, device=self.device) for i, length in lengths.items()}
        return torch.cat([self._unfiltered.get(i, unknown[i]) for i in microbatch.trajectories])

    @torch.no_grad()
    def _add_reference(self, microbatches: Iterable[Microbatch]) -> Iterable[Microbatch]:
        """The microbatches with the reference policy's log-probs, if there is one."""
        if self.reference is None:
            return microbatches
        with self.reference.in_place():
            moved = (microbatch.to(self.device) for microbatch in microbatches)
            return [dataclasses.replace(m, reference_logprobs=self._unfiltered_logprobs(m)) for m in moved]

    @torch.no_grad()
    def _check_stale(self, microbatches: list[list[int]]) -> None:
        """Compares what older versions sampled by one more forward pass under their weights, or counts it as gone."""
        if self.job_config.parity.check == "off":
            return
        versions = [t.policy_version for t in self._trajectories]
        for i in (i for indices in microbatches for i in indices):
            if versions[i] < self.step - 1 and versions[i] not in self.past:
                self.parity += ParityReport(tokens_unverifiable=len(self._trajectories[i].completion_ids))
        kept = [i for i, version in enumerate(versions) if version in self.past]
        checked = checked_share(self.step, self._trajectories, kept, self.job_config.parity.stale_share)
        for version in sorted({versions[i] for i in checked}):
            with self.past.in_place(version):
                for indices in microbatches:
                    mine = [i for i in indices if i in checked and versions[i] == version]
                    # A forward pass may be a collective: a rank with nothing to check takes part with any sequence.
                    packed = pack(self._trajectories, self._advantages, mine or indices[:1]).to(self.device)
                    logits = self._sampled_logits(packed)
                    with self.verdict.agreed():
                        if mine:
                            self._compare_stale(packed, logits)

    def _compare_stale(self, microbatch: Microbatch, logits: torch.Tensor) -> None:
        labels_N = microbatch.sampled(microbatch.labels)
        self._check_parity(microbatch, self.distribution.logprobs(logits, labels_N), labels_N >= 0)
        if self.distribution.filters:
            lengths = [len(self._trajectories[i].completion_ids) for i in microbatch.trajectories]
            unfiltered = self.distribution.unfiltered(logits, labels_N).split(lengths)
            self._unfiltered |= dict(zip(microbatch.trajectories, unfiltered, strict=True))

    def _leave_out(self) -> None:
        """Takes the tokens that were left out of the loss out of its divisor, after the step's last forward pass."""
        if self.policy_loss.normalization == "constant" or not self.distribution.filters:
            return
        mine = torch.tensor(self.stats.left_out_tokens, device=self.device)
        left_out = dist_utils.dist_sum(mine, self.parallel_dims.get_optional_mesh("batch"))
        tokens = self._loss_tokens()
        if left_out:
            for tensor in (*self._losses, *(p.grad for p in self.model_parts[0].parameters() if p.grad is not None)):
                tensor.mul_(tokens / max(1, tokens - left_out))

    def _check_finite(self) -> None:
        """After the step's last backward and before clipping: NaN must not reach the optimizer."""
        mesh = self.parallel_dims.get_optional_mesh("loss")
        figures, folder = step_figures(self._losses, self.model_parts[0], mesh), self.job_config.job.dump_folder
        with self.verdict.agreed():
            stop_unless_finite(figures, folder, self.step, self._trajectories, self._advantages)

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        off = self.job_config.parity.check == "off"
        return contextlib.nullcontext() if off else batch_invariant_mode()

    def _arithmetic_of_backward(self) -> contextlib.AbstractContextManager:
        # What activation checkpointing computes again is to be what was computed before.
        recomputes = self.job_config.activation_checkpoint.mode != "none"
        off = self.job_config.parity.check == "off"
        return contextlib.nullcontext() if off or recomputes else backward_arithmetic()

    def _is_trained(self, trajectory: Trajectory) -> bool:
        """Whether the loss has the trajectory's tokens, and its token count too."""
        return not (trajectory.truncated and self.job_config.rl.truncated_completions == "mask")

    def _loss_tokens(self) -> int:
        """What the step's loss is divided by."""
        if self.policy_loss.normalization == "constant":
            return len(self._trajectories) * self.job_config.sampling.max_tokens
        return max(1, sum(len(t.completion_ids) for t in self._trajectories if self._is_trained(t)))

    def _data_rank(self) -> tuple[int, int]:
        mesh = self.parallel_dims.get_optional_mesh("batch")
        return (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)

    def _check_parity(self, microbatch: Microbatch, trainer_N: torch.Tensor, of_N: torch.Tensor) -> None:
        """Compares the sampled tokens where `of_N`; `trainer_N` is under the weights that sampled them."""
        check = self.job_config.parity.check
        if check == "off":
            return
        report = compare_microbatch(self.step, self._trajectories, microbatch, trainer_N, of_N)
        self.parity += report
        if check == "assert":
            indices, folder = microbatch.trajectories, self.job_config.job.dump_folder
            stop_at_mismatch(report, folder, self.step, self._trajectories, indices, trainer_N)
