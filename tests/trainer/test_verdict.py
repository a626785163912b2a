# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What one rank fails with, as the others and the controller hear it."""

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torchtitan.experiments.rl.unified.errors import ParityError, ProcessLost, TrainerFailed
from torchtitan.experiments.rl.unified.trainer.verdict import error_to_tell, Verdict


def told(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return error_to_tell(caught, 1)


def test_an_error_is_told_in_its_own_words_or_with_its_class_rank_and_place():
    for error in (ParityError("3 of 4 differ"), ValueError("[rl] group_size = 0")):
        assert type(told(error)) is type(error) and str(told(error)) == str(error)
    failed = told(KeyError("layers.0"))
    assert type(failed) is TrainerFailed
    assert str(failed).startswith("rank 1 of the trainer failed: KeyError: 'layers.0' (test_verdict.py:")
    assert str(failed).endswith(" in told)")


@pytest.mark.parametrize(
    "text, lost",
    [
        ("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:53442: Connection reset by peer. GLHF!", True),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", True),
        ("ncclRemoteError: remote process exited or there was a network error", True),
        ("NCCL Error 5: invalid usage", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_only_a_peer_that_is_gone_is_a_lost_process(text, lost):
    assert type(told(RuntimeError(text))) is (ProcessLost if lost else TrainerFailed)


def rank(number: int, port: int, heard) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=number, world_size=3)
    verdict = Verdict()
    for failing in (set(), {2}, {1, 2}, {0}):
        try:
            with verdict.agreed():
                if number in failing:
                    raise ParityError(f"of rank {number}")
            heard.put((number, ""))
        except ParityError as error:
            heard.put((number, str(error)))


def test_all_ranks_raise_what_the_lowest_failing_one_raised():
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    heard, port = context.Queue(), store.port
    del store
    ranks = [context.Process(target=rank, args=(number, port, heard)) for number in range(3)]
    for process in ranks:
        process.start()
    answers = [heard.get(timeout=120) for _ in range(12)]
    for process in ranks:
        process.join(30)
    for number in range(3):
        of_rank = [text for other, text in answers if other == number]
        assert of_rank == ["", "of rank 2", "of rank 1", "of rank 0"]
