# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What the policy's trainer adds to torchtitan's checkpoints: where the task stands, and errors in words."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import MODEL
from torchtitan.experiments.rl.unified import dcp
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.errors import CheckpointError
from torchtitan.experiments.rl.unified.families import PolicyModel
from torchtitan.experiments.rl.unified.families.tensors import find_weights, ListedReader
from torchtitan.experiments.rl.unified.record.checkpoints import (
    checkpoint_folder,
    complete_export,
    find_start,
    prepare_folder,
    save_error,
    Start,
)
from torchtitan.train import Trainer


class CheckpointedTrainer(Trainer):
    """torchtitan's Trainer, its checkpoints read and written when it is told to.

    Args:
        job_config: the job; its `[checkpoint] enable` is set afterwards, for the first weights come that way.

    Attributes:
        policy: the model, set before this is constructed.
        task_state: where the task stood after the last step saved or loaded, JSON-able.
    """

    policy: PolicyModel

    def __init__(self, job_config: JobConfig) -> None:
        self.task_state: dict[str, Any] = {}
        self._writing_step = 0
        self.resumes = job_config.checkpoint.enable
        if not job_config.checkpoint.enable:  # The first weights come through the checkpointer; it saves nothing.
            job_config.checkpoint.enable = job_config.checkpoint.load_only = True
        super().__init__(job_config)

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
