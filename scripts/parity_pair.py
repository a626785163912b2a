# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Trainer and generator of one policy, in processes of their own as in a job. Imported by scripts beside it."""

import dataclasses
import gc
import multiprocessing
from collections.abc import Callable

import torch
from parity_trace import recorded_engine, Trace
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.config.sections import Sampling
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.generator.generator import Generator
from torchtitan.experiments.rl.unified.messages import ParityReport, Request, Trajectory, WeightUpdate
from torchtitan.experiments.rl.unified.trainer.packing import pack
from torchtitan.experiments.rl.unified.trainer.parity import compare
from torchtitan.experiments.rl.unified.weights.transports import build_transport

# One process group of one rank, for all the trainers of a process.
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
# vLLM forbids to change the number of threads once an engine runs; this check is about doing just that.
set_num_threads = torch.set_num_threads


class Engine:
    """The generator's process from its inside; one engine after the other."""

    def build(self, flags: list[str]) -> None:
        """Starts the engine of the job with these flags; the one before ends."""
        self.generator = None
        gc.collect()
        torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
        self.generator = Generator(load_job_config(flags))

    def update_weights(self, update: WeightUpdate) -> None:
        self.generator.update_weights(update)

    def generate(self, requests: list[Request], threads: int) -> tuple[list[Trajectory], int]:
        """Completions, and how many requests were thrown out of a full KV cache meanwhile."""
        set_num_threads(threads)
        scheduler = self.generator.engine.llm_engine.engine_core.engine_core.scheduler
        preempt, preempted = scheduler._preempt_request, []
        scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(args), preempt(*args, **kwargs))[1]
        try:
            return self.generator.generate(requests), len(preempted)
        finally:
            scheduler._preempt_request = preempt

    def generate_recorded(self, requests: list[Request]) -> tuple[list[Trajectory], Trace]:
        """Completions, and what the model computed for them."""
        worker = self.generator.engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        with recorded_engine(worker.model_runner) as trace:
            return self.generator.generate(requests), trace()

    def reset_prefix_cache(self) -> None:
        self.generator.engine.reset_prefix_cache()


def serve(connection, prepare: Callable[[], None] | None) -> None:
    """Answers calls of an Engine's methods, (name, arguments), with (error or "", what came of it)."""
    prepare_environment()
    if prepare:
        prepare()
    engine = Engine()
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return  # The other process has ended.
        try:
            connection.send(("", getattr(engine, name)(*args)))
        except Exception as error:
            connection.send((f"{type(error).__name__}: {error}", None))


class EngineProcess:
    """The generator's process from its outside.

    Attributes:
        prepare: called first in the process: a test breaks something there.
    """

    prepare: Callable[[], None] | None = None

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        context.Process(target=serve, args=(there, type(self).prepare), daemon=True).start()
        there.close()

    def ask(self, name: str, *args):
        """Calls a method of the Engine."""
        self._connection.send((name, args))
        error, answer = self._connection.recv()
        if error:
            raise RuntimeError(f"generator: {error}")
        return answer


class Pair:
    """A trainer, in this process, and a generator of one policy.

    Args:
        flags: of the job, as on its command line.
        engine: the generator's process.
    """

    def __init__(self, flags: list[str], engine: EngineProcess) -> None:
        from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer

        self.config, self.engine = load_job_config(flags), engine
        self.trainer = RLTrainer(self.config)
        self.trainer.load()
        engine.ask("build", flags)
        self.preempted = 0
        self.sync()

    def sync(self) -> None:
        """Brings the trainer's weights to the generator as the job does."""
        transport = build_transport(self.config)
        update = transport.send(
            self.trainer.step, self.trainer.policy_weights(getattr(torch, self.config.generator.dtype))
        )
        self.engine.ask("update_weights", update)
        transport.close()

    def sample(self, requests: list[Request], tokens: int, threads: int = 1, **sampling) -> list[Trajectory]:
        """A completion of each request, all in one call of the engine; `sampling` as in the TOML section."""
        settings = Sampling(max_tokens=tokens, **sampling)
        vars(self.trainer.job_config.sampling).update(vars(settings))
        asked = [dataclasses.replace(request, sampling=settings) for request in requests]
        trajectories, self.preempted = self.engine.ask("generate", asked, threads)
        return trajectories

    def check(self, trajectories: list[Trajectory], threads: int = 1) -> ParityReport:
        """Compares with the trainer's log-probs of the same tokens, a few sequences to a pack."""
        set_num_threads(threads)
        report = ParityReport()
        for start in range(0, len(trajectories), 8):
            indices = list(range(start, min(start + 8, len(trajectories))))
            packed = pack(trajectories, torch.zeros(len(trajectories)), indices)
            tensors = {name: x.to(self.trainer.device) for name, x in vars(packed).items() if torch.is_tensor(x)}
            with torch.no_grad(), batch_invariant_mode():
                logprobs = self.trainer.logprobs(dataclasses.replace(packed, **tensors)).cpu()
            sampled = torch.cat([trajectories[i].logprobs for i in indices])
            report += compare(sampled, logprobs, lambda token: f"token {token} of sequences {indices}")
        return report

    def close(self) -> None:
        self.trainer.close()
        del self.trainer
        gc.collect()
        torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
