# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The trainer by itself, on the tiny checkpoint, one rank: what a step computes and when it is refused.

Trajectories are random tokens whose log-probs are the trainer's own, which is what a generator's are.
"""

import dataclasses
import math

import pytest
import torch
from torchtitan.experiments.rl.unified.algorithms.losses import policy_loss
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.errors import NonFiniteError, ParityError
from torchtitan.experiments.rl.unified.messages import ParityReport, Request, Trajectory
from torchtitan.experiments.rl.unified.trainer.packing import pack
from torchtitan.experiments.rl.unified.trainer.parity import checked_share

COUNT = 8
ADVANTAGES = torch.linspace(-1.5, 1.5, COUNT)
# Steps that move the policy enough to tell one version from the next.
FAST = ["--optimizer.lr", "1e-2", "--lr_scheduler.warmup_steps", "0"]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with pytest.MonkeyPatch.context() as patch:
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        for key, value in rank.items():
            patch.setenv(key, value)
        this_device().prepare_trainer()
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture
def build(tmp_path):
    """Builds loaded trainers, which share a dump folder; flags are the command line's."""
    from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer

    trainers = []

    def make(*flags: str) -> RLTrainer:
        flags = ["--metrics.no-enable_tensorboard", "--parallelism.data_parallel_replicate_degree", "1", *flags]
        trainers.append(RLTrainer(load_job_config(["--job.dump_folder", str(tmp_path), *flags])))
        trainers[-1].load()
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()


def logprobs(trainer, trajectories: list[Trajectory]) -> torch.Tensor:
    """Under the trainer's weights, of all sampled tokens, with a graph."""
    with batch_invariant_mode():
        return trainer.logprobs(pack(trajectories, torch.zeros(len(trajectories)), list(range(len(trajectories)))))


def sample(trainer, seed: int = 0) -> list[Trajectory]:
    """Completions of lengths that differ, of the trainer's policy version."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 512, (length,), generator=generator).tolist()

    requests = [Request(f"prompt {i}", 0, ids(3 + 5 * i % 11), seed=i) for i in range(COUNT)]
    completions = [ids(1 + 7 * i % 23) for i in range(COUNT)]
    drafts = [
        Trajectory(request, completion, torch.zeros(len(completion)), trainer.step, "stop", "")
        for request, completion in zip(requests, completions, strict=True)
    ]
    parts = logprobs(trainer, drafts).detach().split([len(completion) for completion in completions])
    return [dataclasses.replace(draft, logprobs=part) for draft, part in zip(drafts, parts, strict=True)]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.policy_weights(torch.float32)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradient(trainer) -> torch.Tensor:
    return torch.cat([param.grad.flatten() for param in trainer.model_parts[0].parameters()])


def norm_of(trainer, loss: torch.Tensor) -> float:
    grads = torch.autograd.grad(loss, list(trainer.model_parts[0].parameters()))
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


def per_token(trajectories: list[Trajectory], values: torch.Tensor) -> torch.Tensor:
    return values.repeat_interleave(torch.tensor([len(t.completion_ids) for t in trajectories]))


@pytest.mark.parametrize("mode", ["unified", "vllm_compat"])
def test_a_step_does_not_depend_on_its_microbatches(build, mode):
    found = []
    for budget in (1, 40, 8192):
        trainer = build("--rl.mode", mode, "--rl.microbatch_tokens", str(budget))
        # The log-probs come from one pack of everything: no mismatch says that every packing gives those bits.
        trajectories = sample(trainer)
        result = trainer.step_on(trajectories, ADVANTAGES)
        assert result.parity.mismatched_tokens == 0
        assert result.parity.tokens_compared == sum(len(t.completion_ids) for t in trajectories)
        found.append((len(trainer._losses), result))
    assert found[0][0] == COUNT and found[-1][0] == 1
    for _, result in found[:-1]:
        for key in ("loss", "grad_norm"):
            assert getattr(result, key) == pytest.approx(getattr(found[-1][1], key), rel=1e-5), key


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "reinforce"])
def test_without_stale_tokens_the_loss_is_the_plain_one_to_the_bit(build, name):
    trainer = build("--policy_loss.name", name)
    trajectories = sample(trainer)
    now_N = logprobs(trainer, trajectories)
    loss_N, _ = policy_loss(trainer.job_config.policy_loss)(now_N, now_N.detach(), per_token(trajectories, ADVANTAGES))
    divisor = COUNT * trainer.job_config.sampling.max_tokens if name == "dr_grpo" else len(now_N)
    result = trainer.step_on(trajectories, ADVANTAGES)
    assert result.loss == float(loss_N.detach().sum() / divisor)
    means = result.stats.means()
    assert means["kl_generator_trainer"] == 0.0 and means["stale_tokens"] == 0.0 and "kl_reference" not in means
    assert 0 < means["entropy"] < math.log(512)
    assert trainer.reference is None


@pytest.mark.parametrize("name", ["grpo", "reinforce"])
def test_stale_tokens_are_weighted_counted_and_compared_under_their_version(build, name):
    trainer = build("--policy_loss.name", name, *FAST, "--trajectory_queue.max_staleness", "1")
    old = sample(trainer)
    trainer.step_on(old, ADVANTAGES)
    mixed = [*old[: COUNT // 2], *sample(trainer, seed=1)[COUNT // 2 :]]

    now_N = logprobs(trainer, mixed)
    stale_N = per_token(mixed, torch.tensor([t.policy_version == 0 for t in mixed]))
    ratio_N = (now_N.detach() - torch.cat([t.logprobs for t in mixed])).exp()
    assert (ratio_N[stale_N] > 2).any() and (ratio_N[stale_N] < 2).any(), "the policy has not moved enough to tell"
    weight_N = ratio_N.clamp(max=2.0).where(stale_N, 1.0)
    weighted_N = -weight_N * per_token(mixed, ADVANTAGES)
    # The clipped surrogate's ratio of the current policy to itself is 1, its gradient that of the log-prob.
    value = (weighted_N * (now_N.detach() if name == "reinforce" else 1.0)).sum() / len(now_N)
    expected_norm = norm_of(trainer, (weighted_N * now_N).sum() / len(now_N))

    result = trainer.step_on(mixed, ADVANTAGES)
    assert result.loss == pytest.approx(float(value), rel=1e-5)
    assert result.grad_norm == pytest.approx(expected_norm, rel=1e-5)
    assert result.parity == ParityReport(tokens_compared=len(stale_N))
    assert result.stats.stale_tokens == int(stale_N.sum())
    assert result.stats.truncated_weights == int((ratio_N[stale_N] > 2).sum())
    assert result.stats.means()["kl_generator_trainer"] > 0


def test_every_token_is_compared_up_to_the_staleness_that_is_allowed(build):
    trainer = build(*FAST, "--trajectory_queue.max_staleness", "2", "--rl.microbatch_tokens", "40")
    batches = [sample(trainer)]
    for step in range(4):
        mixed = [t for batch in batches[-3:] for t in batch[step::3]]
        before = weights(trainer)
        result = trainer.step_on(mixed, torch.linspace(-1, 1, len(mixed)))
        assert result.parity == ParityReport(tokens_compared=sum(len(t.completion_ids) for t in mixed))
        assert not equal(weights(trainer), before)
        batches.append(sample(trainer, seed=step + 1))


def test_a_forgotten_update_is_a_mismatch_of_stale_tokens_too(build, tmp_path):
    trainer = build(*FAST, "--trajectory_queue.max_staleness", "1")
    first = sample(trainer)
    trainer.step_on(first, ADVANTAGES)
    trainer.step_on(sample(trainer), ADVANTAGES)
    before = weights(trainer)
    # The generator says that version 1 sampled them; its weights are those of version 0.
    forgotten = [dataclasses.replace(t, policy_version=1) for t in first]
    with pytest.raises(ParityError, match=r"first at step 3, prompt 'prompt 0' sample 0, position 3 .*version 1\)"):
        trainer.step_on(forgotten, ADVANTAGES)
    assert equal(weights(trainer), before), "the current weights are back in place"
    left = torch.load(tmp_path / "parity_step_3.pt")
    assert [t["completion_ids"] for t in left["trajectories"]] == [t.completion_ids for t in first]
    assert left["threads"] == torch.get_num_threads() and left["machine"]["cpu_flags"]
    assert left["arithmetic"] == this_device().arithmetic() and left["compared"]
    for i, logprobs_T in zip(left["compared"], left["trainer_logprobs"], strict=True):
        assert not torch.equal(left["trajectories"][i]["logprobs"], logprobs_T)


def test_weights_that_are_gone_are_no_comparison_and_are_counted(build):
    trainer = build(*FAST)  # It keeps no version, as a run that has just gone on from a checkpoint.
    old = sample(trainer)
    trainer.step_on(old, ADVANTAGES)
    mixed = [*old[: COUNT // 2], *sample(trainer, seed=1)[COUNT // 2 :]]
    gone, seen = (sum(len(t.completion_ids) for t in part) for part in (mixed[: COUNT // 2], mixed[COUNT // 2 :]))
    assert trainer.step_on(mixed, ADVANTAGES).parity == ParityReport(tokens_compared=seen, tokens_unverifiable=gone)


@pytest.mark.parametrize("share", [0.4, 1e-9])
def test_a_share_of_the_stale_completions_is_compared_and_always_the_same(build, share):
    found = []
    for _ in range(2):
        trainer = build(*FAST, "--trajectory_queue.max_staleness", "1", "--parity.stale_share", str(share))
        old = sample(trainer)
        trainer.step_on(old, ADVANTAGES)
        found.append(trainer.step_on(old, ADVANTAGES).parity)
    checked = checked_share(2, old, range(COUNT), share)
    assert 1 <= len(checked) < COUNT and (share > 0.1 or len(checked) == 1)
    assert found == [ParityReport(tokens_compared=sum(len(old[i].completion_ids) for i in checked))] * 2


def likeliest(trainer) -> list[Trajectory]:
    """Completions of one token, the likeliest one, of the trainer's policy version."""
    drafts = [
        dataclasses.replace(t, completion_ids=t.completion_ids[:1], logprobs=t.logprobs[:1]) for t in sample(trainer)
    ]
    with batch_invariant_mode(), torch.no_grad():
        tokens = trainer._sampled_logits(pack(drafts, ADVANTAGES, list(range(COUNT)))).argmax(dim=-1).tolist()
    drafts = [dataclasses.replace(t, completion_ids=[token]) for t, token in zip(drafts, tokens, strict=True)]
    now_N = logprobs(trainer, drafts).detach()
    return [dataclasses.replace(t, logprobs=now_N[i : i + 1]) for i, t in enumerate(drafts)]


def unfiltered(trainer, trajectories: list[Trajectory]) -> torch.Tensor:
    packed = pack(trajectories, torch.zeros(len(trajectories)), list(range(len(trajectories))))
    with batch_invariant_mode(), torch.no_grad():
        logits = trainer._sampled_logits(packed)
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, packed.sampled(packed.labels)[:, None])[:, 0]


@pytest.mark.parametrize("budget", [1, 8192])
def test_stale_tokens_outside_the_current_filter_leave_the_loss_and_its_divisor(build, budget):
    flags = ["--sampling.top_k", "2", "--trajectory_queue.max_staleness", "1", "--rl.microbatch_tokens", str(budget)]
    trainer = build(*FAST, *flags)
    old = likeliest(trainer)
    then_N = unfiltered(trainer, old)
    trainer.step_on(old, ADVANTAGES)
    now_N, generator_N = logprobs(trainer, old), torch.cat([t.logprobs for t in old])
    kept_N = now_N.detach().isfinite()
    assert 0 < int(kept_N.sum()) < COUNT, "the policy has moved too little or too far to tell"
    now_K = now_N[kept_N]
    weight_K = (now_K.detach() - generator_N[kept_N]).exp().clamp(max=2.0)
    loss = (-weight_K * ADVANTAGES[kept_N] * (now_K - now_K.detach()).exp()).mean()
    kl_N = (unfiltered(trainer, old) - then_N).exp() - 1 - (unfiltered(trainer, old) - then_N)
    expected = float(loss.detach()), norm_of(trainer, loss)

    result = trainer.step_on(old, ADVANTAGES)
    assert (result.loss, result.grad_norm) == pytest.approx(expected, rel=1e-5)
    assert result.parity == ParityReport(tokens_compared=COUNT)
    means = result.stats.means()
    assert means["left_out_tokens"] == COUNT - int(kept_N.sum()) and means["stale_tokens"] == COUNT
    assert means["kl_generator_trainer"] == pytest.approx(float(kl_N.mean()), rel=1e-4)


def test_the_penalty_does_not_see_the_filter(build):
    flags = ["--sampling.top_k", "2", "--sampling.top_p", "0.9", "--policy_loss.kl_weight", "0.5"]
    trainer, initial = build(*FAST, *flags), build()
    assert trainer.step_on(likeliest(trainer), ADVANTAGES).stats.kl_reference == 0.0
    trajectories = likeliest(trainer)
    difference_N = unfiltered(initial, trajectories) - unfiltered(trainer, trajectories)
    result = trainer.step_on(trajectories, torch.zeros(COUNT))
    kl = float((difference_N.exp() - 1 - difference_N).mean())
    assert result.stats.means()["kl_reference"] == pytest.approx(kl, rel=1e-4) and result.grad_norm > 0
    assert result.loss == pytest.approx(0.5 * kl, rel=1e-4)


def test_a_version_the_trainer_has_not_reached_is_refused(build):
    trainer = build()
    future = [dataclasses.replace(t, policy_version=1) for t in sample(trainer)]
    with pytest.raises(ValueError, match="policy version 1 reached a trainer at version 0"):
        trainer.step_on(future, ADVANTAGES)


def test_equal_rewards_change_nothing(build):
    trainer = build()
    before = weights(trainer)
    result = trainer.step_on(sample(trainer), torch.zeros(COUNT))
    assert result.loss == 0.0 and result.grad_norm == 0.0
    assert equal(weights(trainer), before)
    assert all(math.isfinite(value) for value in result.stats.means().values())


def test_the_penalty_keeps_the_policy_near_the_initial_one(build):
    def distance(*flags: str) -> tuple[list[float], list[float]]:
        trainer = build("--optimizer.lr", "1e-3", *flags)
        results = [trainer.step_on(sample(trainer), ADVANTAGES) for _ in range(4)]
        return [r.loss for r in results], [r.stats.means()["kl_reference"] for r in results]

    (first, *_), weak = distance("--policy_loss.kl_weight", "1e-6")
    (same, *_), strong = distance("--policy_loss.kl_weight", "1")
    assert weak[0] == strong[0] == 0.0 and first == same, "the first step stands on the reference itself"
    assert 0 < strong[-1] < 0.5 * weak[-1]


def test_the_penalty_is_the_k3_estimate_of_the_initial_weights(build):
    trainer, initial = build("--policy_loss.kl_weight", "0.5", "--optimizer.lr", "1e-2"), build()
    trainer.step_on(sample(trainer), ADVANTAGES)
    trajectories = sample(trainer)
    before = weights(trainer)
    now_N, reference_N = logprobs(trainer, trajectories), logprobs(initial, trajectories).detach()
    kl_N = (reference_N - now_N).exp() - 1 - (reference_N - now_N)
    loss = (0.5 * kl_N - per_token(trajectories, ADVANTAGES) * (now_N - now_N.detach()).exp()).mean()
    expected = float(loss.detach()), norm_of(trainer, loss)
    assert equal(weights(trainer), before)
    result = trainer.step_on(trajectories, ADVANTAGES)
    assert (result.loss, result.grad_norm) == pytest.approx(expected, rel=1e-4)
    assert result.stats.means()["kl_reference"] == pytest.approx(float(kl_N.detach().mean()), rel=1e-4)


def test_after_a_resume_the_reference_is_still_the_initial_policy(build):
    flags = ["--policy_loss.kl_weight", "0.5", "--optimizer.lr", "1e-2", "--training.steps", "9"]
    flags += ["--checkpoint.enable", "--checkpoint.interval", "2"]
    whole = build(*flags)
    for due in (False, True):
        assert whole.step_on(sample(whole), ADVANTAGES).checkpoint_due == due
    whole.save({})
    resumed = build(*flags)
    assert resumed.step == 2 and equal(weights(resumed), weights(whole))
    trajectories = sample(whole)
    one, other = (trainer.step_on(trajectories, ADVANTAGES) for trainer in (whole, resumed))
    assert one == other and one.stats.kl_reference > 0


@pytest.mark.parametrize("advantage, figure", [(math.nan, "loss nan"), (3e38, "grad_norm inf")])
def test_what_is_not_finite_stops_before_the_optimizer_and_leaves_its_batch(build, tmp_path, advantage, figure):
    trainer = build()
    before, trajectories = weights(trainer), sample(trainer)
    advantages = ADVANTAGES.clone()
    advantages[3] = advantage
    with pytest.raises(NonFiniteError, match=f"step 1 was not taken.*{figure}.*nonfinite_step_1.pt"):
        trainer.step_on(trajectories, advantages)
    assert equal(weights(trainer), before)
    batch = torch.load(tmp_path / "nonfinite_step_1.pt")
    assert torch.equal(batch["advantages"].nan_to_num(), advantages.nan_to_num())
    assert [t["completion_ids"] for t in batch["trajectories"]] == [t.completion_ids for t in trajectories]
    assert torch.equal(batch["trajectories"][3]["logprobs"], trajectories[3].logprobs)


def test_a_batch_that_cannot_be_written_does_not_hide_the_cause(build, tmp_path):
    trainer = build()
    (tmp_path / "nonfinite_step_1.pt").mkdir()
    with pytest.raises(NonFiniteError, match="loss nan.*its batch could not be written to"):
        trainer.step_on(sample(trainer), ADVANTAGES * math.nan)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_a_masked_completion_is_compared_and_gives_neither_gradient_nor_tokens_to_the_mean(build, name):
    flags = ["--policy_loss.name", name, "--rl.microbatch_tokens", "40"]
    masking, training = build(*flags, "--rl.truncated_completions", "mask"), build(*flags)
    whole = sample(training)
    cut_off = [dataclasses.replace(t, finish_reason="length") if i in (2, 5) else t for i, t in enumerate(whole)]
    kept = [i for i in range(COUNT) if i not in (2, 5)]
    result = masking.step_on(cut_off, ADVANTAGES)
    expected = training.step_on([whole[i] for i in kept], ADVANTAGES[kept])
    # dr_grpo divides by the number of completions, those cut off included.
    share = len(kept) / COUNT if name == "dr_grpo" else 1
    assert result.loss == pytest.approx(expected.loss * share, rel=1e-5)
    assert result.grad_norm == pytest.approx(expected.grad_norm * share, rel=1e-5)
    assert result.parity.tokens_compared == sum(len(t.completion_ids) for t in whole)


def test_a_batch_of_masked_completions_changes_nothing(build):
    trainer = build("--rl.truncated_completions", "mask")
    result = trainer.step_on([dataclasses.replace(t, finish_reason="length") for t in sample(trainer)], ADVANTAGES)
    assert (result.loss, result.grad_norm) == (0, 0)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit(build, mode):
    plain, lean = build(), build("--activation_checkpoint.mode", mode)
    assert equal(weights(lean), weights(plain))
    for _ in range(2):
        trajectories = sample(plain)
        one, other = (trainer.step_on(trajectories, ADVANTAGES) for trainer in (plain, lean))
        assert one == other and torch.equal(gradient(plain), gradient(lean))
    assert equal(weights(lean), weights(plain))


def test_a_resume_takes_the_state_from_the_checkpoint_and_the_optimizers_settings_from_the_job(build):
    flags = ["--training.steps", "9", "--lr_scheduler.warmup_steps", "4"]
    flags += ["--checkpoint.enable", "--checkpoint.interval", "1", "--optimizer.lr"]
    whole = build(*flags, "1e-3")
    whole.step_on(sample(whole), ADVANTAGES)
    whole.save({})
    trajectories = sample(whole)
    same, other = build(*flags, "1e-3"), build(*flags, "1e-5", "--optimizer.beta1", "0.5")
    assert whole.step_on(trajectories, ADVANTAGES) == same.step_on(trajectories, ADVANTAGES)
    assert equal(weights(whole), weights(same))
    # The second step of the warm-up's four.
    assert other.step_on(trajectories, ADVANTAGES).lr == 1e-5 * (2 / 4)
    [one], [its] = whole.optimizers.optimizers, other.optimizers.optimizers
    assert (its.param_groups[0]["betas"], one.param_groups[0]["betas"]) == ((0.5, 0.95), (0.9, 0.95))
    assert {int(state["step"]) for state in its.state.values()} == {2}
    assert not equal(weights(whole), weights(other))
