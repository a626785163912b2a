# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Which operation is the first whose output differs between trainer and generator. Imported by replay.py."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.experiments.rl.unified.devices.checks import MOVES

# A token: (number of its sequence, position in it).
Row = tuple[int, int]
# An output: (module, what of it), which is its "input", its "output" or an operation in it.
Name = tuple[str, str]


@dataclass
class Trace:
    """Checksums of outputs, by name in the order of computation, then by token.

    `operations` are those of all forward passes in order; `places[name]` of them came before an output's first time.
    """

    outputs: dict[Name, dict[Row, int]] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    places: dict[Name, int] = field(default_factory=dict)

    def between(self, first: Name | None, last: Name) -> str:
        """The operations between two outputs."""
        start = self.places.get(first, 0) if first else 0
        return ", ".join(self.operations[start : self.places[last]]) or "nothing"


class Recorder(TorchDispatchMode):
    """Makes the Trace of a model's forward passes.

    Args:
        model: whose modules' outputs and operations are recorded while this mode is on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace, self.rows, self._own = Trace(), [], False
        self._stack: list[tuple[str, dict[str, int]]] = [("", {})]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _module, args, name=name: self._enter(name, args))
            module.register_forward_hook(self._leave, always_call=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._own and not func.is_view and func._schema.name.removeprefix("aten::").rstrip("_") not in MOVES:
            module, counts = self._stack[-1]
            name = str(func)
            counts[name] = counts.get(name, 0) + 1
            self.trace.operations.append(name)
            self._note((module, f"{name} #{counts[name]}"), out)
        return out

    def _enter(self, name: str, args: tuple) -> None:
        self._stack.append((name, {}))
        self._note((name, "input"), args)

    def _leave(self, _module: nn.Module, _args: Any, out: Any) -> None:
        module, _ = self._stack.pop()
        self._note((module, "output"), out)

    def _note(self, name: Name, out: Any) -> None:
        """The checksum of each token's part of `out`, or of its first part; nothing if it has no row a token."""
        out = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(out, torch.Tensor) or not out.is_floating_point() or not self.rows:
            return
        # A dimension of the batch; a single token's own stays, whose heads come next.
        while out.ndim > 2 and out.shape[0] == 1 < len(self.rows):
            out = out[0]
        if out.ndim < 2 or out.shape[0] < len(self.rows):
            return
        self._own = True
        try:
            sums = checksums(out[: len(self.rows)])
        finally:
            self._own = False
        self.trace.places.setdefault(name, len(self.trace.operations))
        self.trace.outputs.setdefault(name, {}).update(zip(self.rows, sums, strict=True))


def checksums(x: torch.Tensor) -> list[int]:
    """One number for the bits of each row of `x` (rows, ...)."""
    bits = x.detach().reshape(len(x), -1).contiguous().view({2: torch.int16, 4: torch.int32}[x.itemsize]).long()
    factors = (2 * torch.arange(bits.shape[1], device=x.device) + 1) * 0x1E3779B97F4A7C15
    return (bits * factors).sum(dim=1).tolist()


@contextlib.contextmanager
def recorded_engine(model_runner) -> Iterator[Callable[[], Trace]]:
    """Records what an engine's model computes; call what it yields for the Trace, sequences numbered as requested."""
    model = model_runner.get_model()
    original = model.forward
    recorder = Recorder(model)

    def forward(*args, **kwargs):
        starts = model_runner.query_start_loc.np
        positions = kwargs["positions"].tolist()
        requests = model_runner.input_batch.req_ids
        recorder.rows = [
            (int(name.partition("-")[0]), positions[row])
            for i, name in enumerate(requests)
            for row in range(starts[i], starts[i + 1])
        ]
        with recorder:
            return original(*args, **kwargs)

    def trace() -> Trace:
        numbers = sorted({request for rows in recorder.trace.outputs.values() for request, _ in rows})
        place = {number: i for i, number in enumerate(numbers)}
        for name, rows in recorder.trace.outputs.items():
            recorder.trace.outputs[name] = {(place[request], at): value for (request, at), value in rows.items()}
        return recorder.trace

    model.forward = forward
    try:
        yield trace
    finally:
        model.forward = original


def told(name: Name) -> str:
    module, what = name
    return f"{what} {'of' if what in ('input', 'output') else 'in'} {module}"


def first_difference(trainer: Trace, generator: Trace, counterpart: Callable[[str], str]) -> tuple[str, Row | None]:
    """Names the first output that differs, the last equal one before it, what is computed between, and the first token.

    Args:
        counterpart: the generator's name of a module of the trainer's.

    Raises:
        ValueError: no output is in both.
    """
    before, compared = None, 0
    for (module, what), rows in trainer.outputs.items():
        if not module:
            continue  # Logits here; the engine asks for those of some tokens later.
        ours, theirs = (module, what), (counterpart(module), what)
        other = generator.outputs.get(theirs, {})
        common = sorted(rows.keys() & other.keys())
        compared += bool(common)
        differ = [row for row in common if rows[row] != other[row]]
        if differ:
            equal = told(before[0]) if before else "the tokens"
            here = trainer.between(before and before[0], ours), generator.between(before and before[1], theirs)
            text = f"{told(ours)}, {len(differ)} of {len(common)} tokens; the last equal one before it: {equal}"
            return f"{text}; from there to here the trainer computes {here[0]}; the generator {here[1]}", differ[0]
        before = (ours, theirs) if common else before
    if not compared:
        raise ValueError("no output of the trainer's has a counterpart in the generator: nothing was compared")
    return f"none of {compared} outputs differs", None
