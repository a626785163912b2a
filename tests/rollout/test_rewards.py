# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rewards: each by its numbers, their sum, and users' own that raise, hang or answer nonsense."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified.rollout.rewards import RewardError, RewardInput, Rewards, REWARDS, user

# What a user may write. `backtracks` hangs inside one call of C code that holds the interpreter's lock.
USERS_MODULE = """
import os, re, sys, time

calls = 0

def length(sample):
    global calls
    calls += 1
    print("a user's print must not disturb anything")
    return len(sample.completion) / sample.max_completion_tokens

def right(sample):
    return sample.completion == sample.answer

def process(sample):
    return os.getpid()

def raises(sample):
    if "4" in sample.completion:
        raise ZeroDivisionError("no fours, please")
    return 1.0

def hangs(sample):
    while "4" in sample.completion:
        time.sleep(0.01)
    return 1.0

def backtracks(sample):
    return float(bool(re.match(r"(a+)+$", "a" * 40 + "b")) if "4" in sample.completion else 1)

def hangs_after_its_number(sample):
    with open(sample.completion, "w") as file:
        file.write(f"{os.getpid()}\\n")
    while True:
        pass

async def waits(sample):
    return 1.0

def pair(one, two):
    return 1.0

def leaves(sample):
    os._exit(3)

def exits(sample):
    sys.exit(3)

def returns_nan(sample):
    return float("nan")

def returns_text(sample):
    return "1.0"

def returns_too_much(sample):
    return 10 ** 400

def returns_more_than_fp32(sample):
    return 1e39

def huge(sample):
    return 9e14

def returns_none(sample):
    pass

class Nested:
    value = 1

constant = 3
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_rewards.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "users_rewards"


def sample(completion: str, answer: str = "18", *, tokens: int = 10, truncated: bool = False) -> RewardInput:
    return RewardInput("Question: how many?", completion, answer, tokens, truncated, max_completion_tokens=100)


def score(name: str, *samples: RewardInput, timeout_seconds: float = 30.0) -> list[float]:
    rewards = Rewards({name: 1.0}, timeout_seconds)
    try:
        return [result.total for result in rewards.score(samples)]
    finally:
        rewards.close()


def wait_until(happened, limit_seconds: float = 60.0) -> None:
    end = time.monotonic() + limit_seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def running(process: int) -> bool:
    """Whether it still does anything: one that ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(process: int) -> bool:
    """Whether it ends within some seconds."""
    deadline = time.monotonic() + 10
    while running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(process)


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("9 * 2 = 18\n#### 18", "18", 1.0),
        ("9 * 2 = 18\n#### $18.00", "9*2=<<9*2=18>>18\n#### 18", 1.0),
        ("9 * 2 = 18\n#### 1,800", "1800", 1.0),
        ("9 * 2 = 18\n#### 19", "18", 0.0),
        ("9 * 2 = 18", "18", 0.0),
        ("", "18", 0.0),
        ("#### 3 + 15", "18", 0.0),
    ],
)
def test_gsm8k(completion, answer, reward):
    assert score("gsm8k", sample(completion, answer)) == [reward]


def test_gsm8k_does_not_credit_a_number_that_was_cut_off():
    assert score("gsm8k", sample("#### 12", "12", truncated=True), sample("#### 12\n", "12", truncated=True)) == [0, 1]


def test_gsm8k_names_a_reference_without_a_number():
    with pytest.raises(RewardError, match="'gsm8k' failed on sample 1 of the batch: the reference answer 'Paris'"):
        score("gsm8k", sample("#### 18"), sample("#### 18", "Paris"))


def test_references_without_a_number_are_found_beforehand():
    answers = [("a, line 1", "18"), ("a, line 2", "so\n#### 1,000"), ("a, line 4", "Paris")]
    with pytest.raises(ValueError, match="a, line 4: the reference answer 'Paris'"):
        Rewards({"gsm8k": 1.0}, 1.0).check_answers(answers)
    Rewards({"format": 1.0}, 1.0).check_answers(answers)


@pytest.mark.parametrize(
    "completion, truncated, reward",
    [
        ("9 * 2 = 18\n#### 18", False, 1.0),
        ("9 * 2 = 18\n#### -$1,800.50\n", False, 1.0),
        ("#### 18", False, 1.0),
        ("9 * 2 = 18\n#### 18", True, 0.0),
        ("#### 9\n#### 18", False, 0.0),
        ("#### 18\nThat is all.", False, 0.0),
        ("#### 18 dollars", False, 0.0),
        ("18 #### 18", False, 0.0),
        ("18", False, 0.0),
        ("", False, 0.0),
        ("#### " + "9" * 100_000, False, 0.0),
    ],
)
def test_format(completion, truncated, reward):
    assert score("format", sample(completion, truncated=truncated)) == [reward]


def test_soft_overlong_equals_the_papers_formula():
    limit, cache = 100, 20
    for tokens in range(1, 120):
        if tokens <= limit - cache:
            expected = 0.0
        elif tokens <= limit:
            expected = ((limit - cache) - tokens) / cache
        else:
            expected = -1.0
        assert score("soft_overlong", sample("", tokens=tokens)) == [pytest.approx(expected, abs=1e-12)]


def test_total_is_the_weighted_sum_of_the_parts():
    rewards = Rewards({"gsm8k": 1.0, "format": 0.25, "soft_overlong": 2, "math_verify": 0.0}, 10.0)
    right, wrong = rewards.score([sample("#### 18"), sample("#### 19.", tokens=90)])
    assert right.parts == {"gsm8k": 1.0, "format": 1.0, "soft_overlong": 0.0, "math_verify": 1.0}
    rewards.close()
    assert right.total == 1.25
    assert wrong.parts == {"gsm8k": 0.0, "format": 0.0, "soft_overlong": -0.5, "math_verify": 0.0}
    assert wrong.total == -1.0
    assert Rewards({"gsm8k": 1.0}, 1.0).score([]) == []


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"gsm9k": 1.0}, "'gsm9k' does not exist; choose from gsm8k, math_verify, format, soft_overlong"),
        ({}, "no rewards"),
        ({"gsm8k": float("nan")}, "'gsm8k' = nan: a weight must be a finite number"),
        ({"gsm8k": "1"}, "'gsm8k' = '1': a weight must be a finite number"),
        ({"no_such_module:reward": 1.0}, "'no_such_module:reward' cannot be used: ModuleNotFoundError"),
        ({"users_rewards.missing": 1.0}, "'users_rewards.missing' cannot be used: AttributeError"),
        ({"users_rewards:constant": 1.0}, "constant is int, not a function"),
        ({"users_rewards:waits": 1.0}, "waits is async: a reward returns its number when it is called"),
        ({"users_rewards:pair": 1.0}, r"pair\(one, two\) cannot be called with one sample: missing a required"),
        ({"os:getcwd": 1.0}, r"getcwd\(\) cannot be called with one sample: too many positional"),
        ({"users_rewards:": 1.0}, "'users_rewards:' cannot be used"),
        ({".": 1.0}, "'.' cannot be used"),
    ],
)
def test_bad_settings_are_refused_at_once(users_module, weights, message):
    with pytest.raises(ValueError, match=message):
        Rewards(weights, 1.0)


def test_a_deadline_must_be_one():
    with pytest.raises(ValueError, match="timeout_seconds = 0"):
        Rewards({"gsm8k": 1.0}, 0)


@pytest.mark.parametrize("path", ["users_rewards:length", "users_rewards.length"])
def test_a_users_reward_gets_the_sample_as_it_is(users_module, path):
    assert score(path, sample("abc"), sample("\ud800\x00" * 50_000)) == [0.03, 1000.0]


def test_a_users_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "rewards_here.py").write_text("def one(sample):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    assert score("rewards_here:one", sample("18")) == [1.0]


@pytest.mark.parametrize(
    "code, complaint",
    [
        ("import os; os._exit(0)", r"it ended its process, exit status 0 \(its last words"),
        ("import os; os.kill(os.getpid(), 11)", "it ended its process, killed by signal 11"),
        ("import time; time.sleep(60)", r"importing 'at_import:one' took more than 3.0 s \("),
        ("raise OSError(5, 'x')", r"cannot be used: OSError: \[Errno 5\] x"),
    ],
)
def test_a_module_that_does_not_let_itself_be_imported_is_one_error(tmp_path, monkeypatch, code, complaint):
    monkeypatch.setattr(user, "START_SECONDS", 3.0)
    (tmp_path / "at_import.py").write_text(f"{code}\ndef one(sample):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        Rewards({"at_import:one": 1.0}, 1.0)


def test_of_a_module_that_forks_one_process_answers(tmp_path, monkeypatch, capfd):
    (tmp_path / "forks.py").write_text("import os\nos.fork()\ndef one(sample):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    assert score("forks:one", *[sample("18")] * 20) == [1.0] * 20
    assert capfd.readouterr().err == ""


FORKING = """
import os, subprocess
def forks(sample):
    return 2.0 if os.fork() == 0 else float(sample.completion)
def starts(sample):
    return subprocess.Popen(["sleep", "600"]).pid
"""


def test_what_a_function_starts_ends_with_it_and_a_forked_copy_gives_no_answer(tmp_path, monkeypatch):
    (tmp_path / "forking.py").write_text(FORKING)
    monkeypatch.chdir(tmp_path)
    assert score("forking:forks", *(sample(str(i)) for i in range(20))) == list(range(20))
    rewards = Rewards({"forking:starts": 1.0}, 30.0)
    started = [int(result.total) for result in rewards.score([sample("1")] * 3)]
    assert all(map(running, started))
    rewards.close()
    assert all(map(ended, started))
    # And with a run that is killed: the pipe is closed, and nobody calls close().
    code = (
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "from torchtitan.experiments.rl.unified.rollout.rewards import RewardInput, Rewards\n"
        "rewards = Rewards({'forking:starts': 1.0}, 30.0)\n"
        "print(int(rewards.score([RewardInput('', '', '', 1, False, 1)])[0].total), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9 and ended(int(killed.stdout))


def test_rewards_that_add_up_to_too_much_are_named(users_module):
    two = {"users_rewards:huge": 1.0, "users_rewards.huge": 1.0}
    with pytest.raises(RewardError, match="rewards add up to 1.8e.15, beyond 1e.15, on sample 0 of the batch"):
        Rewards(two, 30.0).score([sample("4")])


def test_a_users_truth_is_a_number(users_module):
    assert score("users_rewards:right", sample("18"), sample("19")) == [1.0, 0.0]


def test_users_rewards_stand_beside_others(users_module):
    rewards = Rewards({"gsm8k": 1.0, "users_rewards:length": 10.0}, 30.0)
    (result,) = rewards.score([sample("#### 18")])
    assert result.parts == {"gsm8k": 1.0, "users_rewards:length": 0.07} and result.total == pytest.approx(1.7)
    assert "users_rewards:length" not in REWARDS and users_module not in sys.modules
    rewards.close()


@pytest.mark.parametrize(
    "function, cause",
    [
        ("raises", "ZeroDivisionError: no fours, please"),
        ("returns_nan", "it returned nan, which is not a finite number"),
        ("returns_too_much", "OverflowError"),
        ("returns_more_than_fp32", "it returned 1e+39, with its weight beyond 1e+15"),
        ("returns_text", "it returned '1.0', which is not a number"),
        ("returns_none", "it returned None, which is not a number"),
        ("exits", "SystemExit: 3"),
        ("leaves", "it ended its process, exit status 3 ("),
    ],
)
def test_a_users_reward_that_fails_is_named_with_the_sample(users_module, function, cause):
    samples = [sample("four is 4 and " + "long " * 50 + "the end")]
    with pytest.raises(RewardError) as caught:
        score(f"users_rewards:{function}", *samples)
    message = str(caught.value)
    assert f"reward 'users_rewards:{function}' failed on sample 0 of the batch: " in message and cause in message
    assert "four is 4" in message and "the end" in message and "[...]" in message and "'18'" in message


def test_the_error_says_where_the_users_code_raised(users_module):
    with pytest.raises(RewardError, match="users_rewards.py.*in raises"):
        score("users_rewards:raises", sample("4"))


@pytest.mark.parametrize("function", ["hangs", "backtracks"])
def test_a_users_reward_that_hangs_is_named_with_the_sample(users_module, function):
    rewards = Rewards({f"users_rewards:{function}": 1.0}, timeout_seconds=1.0)
    start = time.monotonic()
    with pytest.raises(RewardError, match=f"'users_rewards:{function}' failed on sample 1 .* more than 1.0 s"):
        rewards.score([sample("1"), sample("4"), sample("1")])
    assert time.monotonic() - start < 20
    assert [result.total for result in rewards.score([sample("1")])] == [1.0]
    rewards.close()


def test_no_process_is_left_behind(users_module):
    rewards = Rewards({"users_rewards:process": 1.0}, 30.0)
    first, again = (int(result.total) for result in rewards.score([sample("1"), sample("2")]))
    assert first == again != os.getpid() and running(first)
    rewards.close()
    assert not running(first)
    (restarted,) = (int(result.total) for result in rewards.score([sample("1")]))
    assert restarted != first and running(restarted)
    del rewards
    gc.collect()
    assert not running(restarted)


def test_a_hanging_reward_does_not_outlive_a_killed_run(users_module, tmp_path):
    place = tmp_path / "number"
    code = f"""if True:
        from torchtitan.experiments.rl.unified.rollout.rewards import RewardInput, Rewards
        sample = RewardInput("", {str(place)!r}, "", 1, False, 1)
        Rewards({{"users_rewards:hangs_after_its_number": 1.0}}, 3.0).score([sample])
    """
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as run:
        wait_until(lambda: place.exists() and place.read_text().endswith("\n"))
        run.kill()
    process = int(place.read_text())
    assert running(process)
    wait_until(lambda: not running(process))


def test_users_rewards_work_off_the_main_thread(users_module):
    rewards = Rewards({"users_rewards:length": 1.0}, 30.0)
    totals = [[] for _ in range(4)]

    def work(place: list) -> None:
        place.extend(result.total for result in rewards.score([sample("abc")] * 20))

    threads = [threading.Thread(target=work, args=(place,)) for place in totals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == [[0.03] * 20] * 4
    rewards.close()
