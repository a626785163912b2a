# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The policy's trainer: torchtitan's Trainer, fed with packed trajectories and given a policy loss."""

import contextlib
import copy
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.experiments.rl.unified.batch_invariant import batch_invariant_mode
from torchtitan.experiments.rl.unified.infra.parallelize import parallelize_policy
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.logprobs import sampling_logprobs
from torchtitan.experiments.rl.unified.loss import policy_loss
from torchtitan.experiments.rl.unified.model.policy import policy_train_spec
from torchtitan.experiments.rl.unified.parity import compare, ParityError, ParityReport
from torchtitan.experiments.rl.unified.rollout.packing import Microbatch, pack, plan
from torchtitan.experiments.rl.unified.rollout.trajectory import Trajectory
from torchtitan.models.attention import VarlenMetadata
from torchtitan.protocols import train_spec
from torchtitan.train import Trainer


@dataclass(frozen=True)
class StepResult:
    """What one rank knows after a step: its own tokens' parity, and the global loss figures.

    Attributes:
        step: optimizer steps taken, the version of the weights now.
        loss: global loss sum over the step's token count.
        grad_norm: before clipping.
        lr: the learning rate the step was taken with.
        parity: of this rank's tokens; empty on all but the first of the ranks that share them (tensor parallel).
        checkpoint_due: `save` is to be called before the next step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    parity: ParityReport
    checkpoint_due: bool


class StepMetrics(MetricsProcessor):
    """torchtitan's metrics processor, keeping the last step's figures for whoever drives the trainer."""

    last: dict[str, float]

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None) -> None:
        self.last = {"loss": float(global_avg_loss), "grad_norm": float(grad_norm), "lr": float(extra_metrics["lr"])}
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()


class RLTrainer(Trainer):
    """torchtitan's Trainer for a policy.

    `train_step` is upstream's: accumulation over microbatches, clipping, optimizer, schedule, metrics. A microbatch
    here is a pack of trajectories, and its loss is the policy loss over their sampled tokens.

    Args:
        job_config: the job; `model.name` is looked up among the TrainSpecs.
    """

    def __init__(self, job_config: JobConfig) -> None:
        job_config = copy.deepcopy(job_config)
        job_config.model.name = _register_policy(job_config.model.name)
        # The first weights are the checkpoint's in Hugging Face layout; without [checkpoint] enable nothing is saved.
        job_config.checkpoint.initial_load_in_hf = True
        if not job_config.checkpoint.enable:
            job_config.checkpoint.enable = job_config.checkpoint.load_only = True
        super().__init__(job_config)
        # Mixed precision must cast the same tensors in trainer and generator; autocast would choose op by op.
        self.maybe_enable_amp = contextlib.nullcontext()
        config = job_config.policy_loss
        self.policy_loss = policy_loss(config.name, config.clip_low, config.clip_high)
        self.parity = ParityReport()
        self.task_state: dict[str, Any] = {}
        self._trajectories: list[Trajectory] = []
        # DDP averages gradients; a sum over the step's tokens wants their sum.
        averages = self.parallel_dims.dp_replicate_enabled and not self.parallel_dims.fsdp_enabled
        self.gradient_scale = self.parallel_dims.dp_replicate if averages else 1

    def load(self) -> None:
        """Loads the newest checkpoint of the run, or the weights that training starts from."""
        self.checkpointer.load(step=self.job_config.checkpoint.load_step)

    def state_dict(self) -> dict[str, Any]:
        """Upstream's train state, and where the task stood after the step."""
        return {**super().state_dict(), "task": json.dumps(self.task_state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.task_state = json.loads(state_dict["task"])

    def step_on(self, trajectories: list[Trajectory], advantages: torch.Tensor) -> StepResult:
        """Takes one optimizer step on this rank's share of `trajectories`.

        Args:
            trajectories: of the whole step, the same list on every rank.
            advantages: fp32 (trajectories,).

        Raises:
            ParityError: a log-prob differs from the generator's and `[parity] check` is "assert"; no step was taken.
        """
        self._trajectories = trajectories
        self.parity = ParityReport()
        rank, ranks = self._data_rank()
        microbatches = plan(trajectories, ranks, self.job_config.rl.microbatch_tokens)[rank]
        self.step += 1
        self.gc_handler.run(self.step)
        self.gradient_accumulation_steps = len(microbatches)
        packed = (vars(pack(trajectories, advantages, indices)).copy() for indices in microbatches)
        with self._arithmetic():
            self.train_step(self.batch_generator((fields, fields.pop("labels")) for fields in packed))
        shared = self.parallel_dims.tp_enabled and self.parallel_dims.get_mesh("tp").get_local_rank() > 0
        parity = ParityReport() if shared else self.parity
        due = self.checkpointer._should_save(self.step, self._at_last_step())
        return StepResult(self.step, parity=parity, checkpoint_due=due, **self.metrics_processor.last)

    def save(self, task_state: dict[str, Any]) -> None:
        """Saves the checkpoint of this step.

        Args:
            task_state: what the controller needs to go on after this step, JSON-able.
        """
        self.task_state = task_state
        self.checkpointer.save(self.step, last_step=self._at_last_step())

    def forward_backward_step(
        self, *, input_dict: dict[str, Any], labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Adds one microbatch's gradient; returns its loss sum over the step's tokens (upstream's contract)."""
        microbatch = Microbatch(**input_dict, labels=labels)
        sampled_T = labels[0] != IGNORE_INDEX
        logprobs_N = self.logprobs(microbatch)
        generator_N = microbatch.generator_logprobs[0][sampled_T]
        self._check_parity(microbatch, generator_N, logprobs_N.detach(), sampled_T)
        config = self.job_config.policy_loss
        loss_N, _ = self.policy_loss(
            logprobs_N,
            generator_N,
            microbatch.advantages[0][sampled_T],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        weight = global_valid_tokens
        if self.policy_loss.normalization == "constant":
            weight = len(self._trajectories) * self.job_config.sampling.max_tokens
        loss = loss_N.sum() / weight
        (loss * self.gradient_scale).backward()
        return loss.detach()

    def logprobs(self, microbatch: Microbatch) -> torch.Tensor:
        """fp32 log-probs of the microbatch's sampled tokens, in order, under the sampling distribution."""
        lengths = microbatch.cu_seqlens.diff()
        longest = int(lengths.max())
        metadata = VarlenMetadata(microbatch.cu_seqlens, microbatch.cu_seqlens, longest, longest)
        logits = self.model_parts[0](microbatch.tokens, attention_masks=metadata, positions=microbatch.positions)
        sampled_T = microbatch.labels[0] != IGNORE_INDEX
        sampling = self.job_config.sampling
        return sampling_logprobs(
            logits[0][sampled_T], microbatch.labels[0][sampled_T], sampling.temperature, sampling.top_k, sampling.top_p
        )

    def policy_weights(self, dtype: torch.dtype):
        """Yields (name, full tensor in `dtype`) of every parameter, tied ones once. Collective over the trainer."""
        for name, param in self.model_parts[0].named_parameters():
            full = param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
            yield name, full.to(dtype)

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        off = self.job_config.parity.check == "off"
        return contextlib.nullcontext() if off else batch_invariant_mode()

    def _at_last_step(self) -> bool:
        return self.step == self.job_config.training.steps

    def _data_rank(self) -> tuple[int, int]:
        if not self.parallel_dims.dp_enabled:
            return 0, 1
        mesh = self.parallel_dims.get_mesh("batch")
        return mesh.get_local_rank(), mesh.size()

    def _check_parity(
        self, microbatch: Microbatch, generator_N: torch.Tensor, trainer_N: torch.Tensor, sampled_T: torch.Tensor
    ) -> None:
        if self.job_config.parity.check == "off":
            return

        def where(token: int) -> str:
            row = int(sampled_T.nonzero()[token])
            sequence = int(torch.searchsorted(microbatch.cu_seqlens, row, right=True)) - 1
            trajectory = self._trajectories[microbatch.trajectories[sequence]]
            position = int(microbatch.positions[0, row]) + 1
            return (
                f"step {self.step}, prompt {trajectory.request.uid!r} sample {trajectory.request.sample}, "
                f"position {position} (policy version {trajectory.policy_version})"
            )

        report = compare(generator_N, trainer_N, where)
        self.parity += report
        if report.mismatched_tokens and self.job_config.parity.check == "assert":
            raise ParityError(
                f"{report.mismatched_tokens} of {report.tokens_compared} sampled tokens have another log-prob in the "
                f"trainer than in the generator; first at {report.first}. Look for a weight update that did not reach "
                'the generator, or an operation that is not row-invariant; [parity] check = "report" only counts'
            )


def _register_policy(name: str) -> str:
    """Registers the TrainSpec `name` as torchtitan's Trainer is to run it here, and returns its name there."""
    registered = f"{name}_policy"
    if registered not in train_spec._extra_train_specs:
        train_spec.register_train_spec(
            registered,
            dataclasses.replace(
                policy_train_spec(name),
                parallelize_fn=parallelize_policy,
                # Prompts come from the controller; torchtitan's dataloader has nothing to load.
                build_dataloader_fn=None,
                build_metrics_processor_fn=lambda job_config, parallel_dims, _: StepMetrics(job_config, parallel_dims),
            ),
        )
    return registered
