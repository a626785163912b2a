# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The policy's trainer: torchtitan's Trainer, fed with packed trajectories and given a policy loss."""

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import MODEL
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims, utils as dist_utils
from torchtitan.experiments.rl.unified import dcp
from torchtitan.experiments.rl.unified.algorithms.losses import policy_loss
from torchtitan.experiments.rl.unified.algorithms.losses.base import kl_k3, tis_weight
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices.mode import backward_arithmetic, batch_invariant_mode
from torchtitan.experiments.rl.unified.errors import CheckpointError, ParityError
from torchtitan.experiments.rl.unified.families import model_of_checkpoint, PolicyModel
from torchtitan.experiments.rl.unified.families.tensors import find_weights, ListedReader
from torchtitan.experiments.rl.unified.messages import ParityReport, StepResult, TensorSpec, TokenStats, Trajectory
from torchtitan.experiments.rl.unified.record.checkpoints import (
    checkpoint_folder,
    complete_export,
    find_start,
    prepare_folder,
    save_error,
    Start,
)
from torchtitan.experiments.rl.unified.trainer.finite import stop_unless_finite
from torchtitan.experiments.rl.unified.trainer.logprobs import sampling_entropy, sampling_logprobs
from torchtitan.experiments.rl.unified.trainer.packing import assign_microbatches, Microbatch, pack
from torchtitan.experiments.rl.unified.trainer.parallelize import MasterParallelDims, parallelize_policy
from torchtitan.experiments.rl.unified.trainer.parity import compare
from torchtitan.experiments.rl.unified.trainer.reference import ReferencePolicy
from torchtitan.experiments.rl.unified.trainer.settings import kept_settings
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.models.attention import VarlenMetadata
from torchtitan.protocols import train_spec
from torchtitan.train import Trainer


class StepMetrics(MetricsProcessor):
    """torchtitan's metrics processor, keeping the last step's figures for whoever drives the trainer."""

    last: dict[str, float]

    def should_log(self, step: int) -> bool:
        return True

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None) -> None:
        self.last = {"loss": float(global_avg_loss), "grad_norm": float(grad_norm), "lr": float(extra_metrics["lr"])}
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()


class RLTrainer(Trainer):
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
        chosen.name = _register_policy(self.policy)
        self.resumes = job_config.checkpoint.enable
        if not job_config.checkpoint.enable:  # The first weights come through the checkpointer; it saves nothing.
            job_config.checkpoint.enable = job_config.checkpoint.load_only = True
        super().__init__(job_config)
        # Mixed precision must cast the same tensors in trainer and generator; autocast would choose op by op.
        self.maybe_enable_amp = contextlib.nullcontext()
        self.policy_loss = policy_loss(job_config.policy_loss)
        self.reference: ReferencePolicy | None = None
        self.parity, self.stats = ParityReport(), TokenStats()
        self.task_state: dict[str, Any] = {}
        self._writing_step = 0
        self._trajectories: list[Trajectory] = []
        self._advantages = torch.empty(0)
        self._losses: list[torch.Tensor] = []
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
            self.reference = ReferencePolicy(self.model_parts[0])
        # CheckpointManager.load starts from random weights where its folder exists and holds nothing whole.
        with kept_settings(self.optimizers, self.lr_schedulers):
            if start.saved:
                self._load_from(str(start.saved.path), model_only=False)
            else:
                self._load_from(initial, config.initial_load_model_only)

    def close(self) -> None:
        """Waits for a checkpoint that is still being written, and ends upstream's threads."""
        self._finish_writing()
        super().close()

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
            NonFiniteError: the loss or the gradient norm is NaN or infinite; no step was taken, on no rank.
            ValueError: a trajectory is of a policy version that this trainer has not reached.
        """
        if newer := [t.policy_version for t in trajectories if t.policy_version > self.step]:
            raise ValueError(f"trajectories of policy version {max(newer)} reached a trainer at version {self.step}")
        self._trajectories, self._advantages = trajectories, advantages
        self.parity, self.stats, self._losses = ParityReport(), TokenStats(), []
        rank, ranks = self._data_rank()
        microbatches = assign_microbatches(trajectories, ranks, self.job_config.rl.microbatch_tokens)[rank]
        self.step += 1
        self.gc_handler.run(self.step)
        self.gradient_accumulation_steps = len(microbatches)
        with self._arithmetic():
            packed = self._add_reference(pack(trajectories, advantages, indices) for indices in microbatches)
            rows = (vars(microbatch).copy() for microbatch in packed)
            self.train_step(self.batch_generator((fields, fields.pop("labels")) for fields in rows))
        shared = self.parallel_dims.tp_enabled and self.parallel_dims.get_mesh("tp").get_local_rank() > 0
        parity, stats = (ParityReport(), TokenStats()) if shared else (self.parity, self.stats)
        due = self.checkpointer._should_save(self.step, self._at_last_step())
        return StepResult(self.step, parity=parity, stats=stats, checkpoint_due=due, **self.metrics_processor.last)

    def save(self, task_state: dict[str, Any]) -> None:
        """Saves the checkpoint of this step. Call it once the step is on record.

        Args:
            task_state: what the controller needs to go on after this step, JSON-able.

        Raises:
            CheckpointError: this one, or the one before, which was still being written, could not be saved.
        """
        self.task_state = task_state
        config, last_step = self.job_config.checkpoint, self._at_last_step()
        self._finish_writing()
        with self._naming_failures(self.step):
            self.checkpointer.save(self.step, last_step)
            self._writing_step = self.step
            if last_step and config.last_save_in_hf and torch.distributed.get_rank() == 0:
                export = checkpoint_folder(self.job_config) / f"step-{self.step}"
                complete_export(export, self.job_config.model.hf_assets_path, config.export_dtype)

    def forward_backward_step(
        self, *, input_dict: dict[str, Any], labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Adds one microbatch's gradient; returns its loss sum over the step's tokens (upstream's contract).

        Their number is counted from the trajectories: upstream's count has the masked ones too.
        """
        microbatch, config = Microbatch(**input_dict, labels=labels), self.job_config.policy_loss
        logits = self._sampled_logits(microbatch)
        logprobs_N = self._sampling_logprobs(logits, microbatch)
        now_N, generator_N = logprobs_N.detach(), microbatch.sampled(microbatch.generator_logprobs)
        stale_N = microbatch.sampled(microbatch.policy_versions) < self.step - 1
        self._check_parity(microbatch, generator_N, now_N, ~stale_N)

        # A batch is used for one update, so the policy to stay close to is the current one. Where that did not sample
        # the tokens, the importance weight makes up for it; where it did, the weight is exactly 1.
        old_N = torch.where(stale_N, now_N, generator_N)
        weight_N = torch.where(stale_N, tis_weight(now_N, generator_N, config.tis_cap), 1.0)
        loss_N, clipped_N = self.policy_loss(logprobs_N, old_N, microbatch.sampled(microbatch.advantages))
        kl_reference = None
        if microbatch.reference_logprobs is not None:
            kl_N = kl_k3(logprobs_N, microbatch.reference_logprobs)
            kl_reference = float(kl_N.detach().sum())
            loss_N = loss_N + config.kl_weight * kl_N
        trained = torch.tensor([self._is_trained(self._trajectories[i]) for i in microbatch.trajectories])
        trained_T = trained.to(loss_N.device).repeat_interleave(microbatch.cu_seqlens.diff())
        loss = (loss_N * weight_N)[microbatch.sampled(trained_T[None])].sum() / self._loss_tokens()

        self.stats += TokenStats(
            tokens=len(now_N),
            stale_tokens=int(stale_N.sum()),
            truncated_weights=int((stale_N & (weight_N == config.tis_cap)).sum()),
            clipped_tokens=int(clipped_N.sum()),
            entropy=float(sampling_entropy(logits.detach(), **self._sampling_filter()).sum()),
            kl_generator_trainer=float(kl_k3(generator_N, now_N).sum()),
            kl_reference=kl_reference,
        )
        del logits  # The graph needs them no more.
        with self._arithmetic_of_backward():
            (loss * self.gradient_scale).backward()
        self._losses.append(loss.detach())
        if len(self._losses) == self.gradient_accumulation_steps:
            self._check_finite()
        return loss.detach()

    def logprobs(self, microbatch: Microbatch) -> torch.Tensor:
        """fp32 log-probs of the microbatch's sampled tokens, in order, under the sampling distribution."""
        return self._sampling_logprobs(self._sampled_logits(microbatch), microbatch)

    def policy_weights(self, dtype: torch.dtype) -> PolicyWeights:
        """Every parameter under its name, tied ones once, to arrive as `dtype`.

        Its stream is collective over the trainer: every rank must consume it. A shard is cast before it is gathered.
        """
        params = {name.replace(_CHECKPOINT_PREFIX, ""): param for name, param in self.model_parts[0].named_parameters()}

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for name, param in params.items():
                yield name, param.detach().to(dtype).full_tensor() if isinstance(param, DTensor) else param.detach()

        return PolicyWeights([TensorSpec(name, dtype, tuple(p.shape)) for name, p in params.items()], stream())

    def _sampled_logits(self, microbatch: Microbatch) -> torch.Tensor:
        """(sampled tokens, vocab) logits that the microbatch's sampled tokens were drawn from."""
        longest = int(microbatch.cu_seqlens.diff().max())
        metadata = VarlenMetadata(microbatch.cu_seqlens, microbatch.cu_seqlens, longest, longest)
        logits = self.model_parts[0](microbatch.tokens, attention_masks=metadata, positions=microbatch.positions)
        return microbatch.sampled(logits)

    def _sampling_logprobs(self, logits: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        return sampling_logprobs(logits, microbatch.sampled(microbatch.labels), **self._sampling_filter())

    def _sampling_filter(self) -> dict[str, Any]:
        sampling = self.job_config.sampling
        return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}

    @torch.no_grad()
    def _add_reference(self, microbatches: Iterable[Microbatch]) -> Iterable[Microbatch]:
        """The microbatches with the reference policy's log-probs, if there is one."""
        if self.reference is None:
            return microbatches
        with self.reference.in_place():
            moved = (microbatch.to(self.device) for microbatch in microbatches)
            return [dataclasses.replace(m, reference_logprobs=self.logprobs(m)) for m in moved]

    def _check_finite(self) -> None:
        """After the step's last backward and before clipping: NaN must not reach the optimizer."""
        loss = torch.stack(self._losses).sum()
        if self.parallel_dims.dp_cp_enabled:
            loss = dist_utils.dist_sum(loss, self.parallel_dims.get_mesh("loss"))
        grads = [param.grad for param in self.model_parts[0].parameters() if param.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        figures = {"loss": float(loss), "grad_norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm)}
        folder = self.job_config.job.dump_folder
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

    def _at_last_step(self) -> bool:
        return self.step == self.job_config.training.steps

    def _load_from(self, path: str, model_only: bool) -> None:
        # torchtitan's own way would take files that the engine does not, and run what a pickle in them asks for.
        model, adapter = self.checkpointer.states[MODEL], self.checkpointer.sd_adapter
        in_dcp = (Path(path) / ".metadata").exists()
        states = self.checkpointer._states_to_load(model_only or not in_dcp)
        try:
            if in_dcp:
                dcp.load(states, path)
            else:
                checkpoint, names = find_weights(self.policy, path)
                states = adapter.to_hf(states) if checkpoint.kind == "hf" else states
                torch_dcp.load(states, storage_reader=ListedReader(checkpoint, names))
                states = adapter.from_hf(states) if checkpoint.kind == "hf" else states
            model.load_state_dict(states)
        except CheckpointException as error:
            raise CheckpointError(f"{path} could not be loaded: {dcp.reason(error)}") from error

    def _start(self) -> Start:
        """Rank 0's answer on every rank; it also clears the folder of what this run will write again."""
        answer: list[Any] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                answer = [find_start(self.job_config) if self.resumes else Start()]
                if self.resumes:
                    prepare_folder(self.job_config, answer[0])
            except (ValueError, OSError) as error:
                answer = [error]
        torch.distributed.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _finish_writing(self) -> None:
        if self.checkpointer.save_future is not None:
            with self._naming_failures(self._writing_step):
                self.checkpointer.save_future.result()

    @contextlib.contextmanager
    def _naming_failures(self, step: int) -> Iterator[None]:
        """CheckpointError for what goes wrong while `step` is saved; DCP's own derives from BaseException alone."""
        try:
            yield
        except (CheckpointException, OSError, RuntimeError) as error:
            raise save_error(error, step, checkpoint_folder(self.job_config)) from error

    def _data_rank(self) -> tuple[int, int]:
        if not self.parallel_dims.dp_enabled:
            return 0, 1
        mesh = self.parallel_dims.get_mesh("batch")
        return mesh.get_local_rank(), mesh.size()

    def _check_parity(
        self, microbatch: Microbatch, generator_N: torch.Tensor, trainer_N: torch.Tensor, current_N: torch.Tensor
    ) -> None:
        """Compares the tokens that the trainer's current weights sampled, those where `current_N`."""
        if self.job_config.parity.check == "off":
            return

        def where(token: int) -> str:
            rows = torch.arange(microbatch.labels.shape[1], device=microbatch.labels.device)[None]
            row = int(microbatch.sampled(rows)[current_N][token])
            sequence = int(torch.searchsorted(microbatch.cu_seqlens, row, right=True)) - 1
            trajectory = self._trajectories[microbatch.trajectories[sequence]]
            position = int(microbatch.positions[0, row]) + 1
            return (
                f"step {self.step}, prompt {trajectory.request.uid!r} sample {trajectory.request.sample}, "
                f"position {position} (policy version {trajectory.policy_version})"
            )

        report = compare(generator_N[current_N], trainer_N[current_N], where)
        self.parity += report
        if report.mismatched_tokens and self.job_config.parity.check == "assert":
            raise ParityError(
                f"{report.mismatched_tokens} of {report.tokens_compared} sampled tokens have another log-prob in the "
                f"trainer than in the generator; first at {report.first}. Look for a weight update that did not reach "
                'the generator, or an operation that is not row-invariant; [parity] check = "report" only counts'
            )


def _register_policy(model: PolicyModel) -> str:
    """Registers the model's TrainSpec as torchtitan's Trainer is to run it here, and returns its name there."""
    train_spec._extra_train_specs["policy"] = dataclasses.replace(
        model.train_spec(),
        parallelize_fn=functools.partial(parallelize_policy, family=model.family),
        # Prompts come from the controller; torchtitan's dataloader has nothing to load.
        build_dataloader_fn=None,
        build_metrics_processor_fn=lambda job_config, parallel_dims, _: StepMetrics(job_config, parallel_dims),
    )
    return "policy"
