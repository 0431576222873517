"""PPO, term by term: slow loops, closed forms, and the invariants that catch the usual mistakes."""

import copy
import itertools
import math

import pytest
import torch

import train_ppo
from data.chat import Reply
from data.town.gold import final_answer
from data.town.tasks import Case, Task
from gpt import generate
from train_ppo import (
    KLCoefficient,
    equal_groups,
    full_kl,
    gae,
    group_advantages,
    kl_estimate,
    masked_mean,
    policy_loss,
    response_logprobs,
    token_rewards,
    value_loss,
    whiten,
)


@pytest.fixture
def rollout():
    """Four responses of different length and place, (B, T), with garbage elsewhere."""
    torch.manual_seed(0)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[0, 2:7] = mask[1, 0:10] = mask[2, 8:9] = mask[3, 4:6] = True
    rewards, values = torch.randn(2, 4, 10, dtype=torch.float64)
    rewards = rewards * mask
    return rewards, values, mask


def rows(*tensors, mask):
    """The response part of every row, for loops that know nothing of masks."""
    for i, m in enumerate(mask):
        yield tuple(x[i, m] for x in tensors)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_sum_of_discounted_td_errors(rollout, gamma, lam):
    rewards, values, mask = rollout
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for r, v, ours, g in rows(rewards, values, advantages, returns, mask=mask):
        L = len(r)
        delta = [r[t] + (gamma * v[t + 1] if t + 1 < L else 0) - v[t] for t in range(L)]
        slow = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, L)) for t in range(L)]
        torch.testing.assert_close(ours, torch.stack(slow))
        torch.testing.assert_close(g, ours + v)


def test_gae_with_lambda_1_is_reward_to_go_minus_value(rollout):
    rewards, values, mask = rollout
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    for r, v, ours, g in rows(rewards, values, advantages, returns, mask=mask):
        to_go = r.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(ours, to_go - v)
        torch.testing.assert_close(g, to_go)


def test_a_critic_that_knows_the_rewards_to_come_leaves_no_advantage(rollout):
    rewards, _, mask = rollout
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, _ = gae(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_a_score_at_the_end_reaches_earlier_tokens_by_powers_of_lambda():
    mask = torch.ones(1, 6, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0, 0, 0, 0, 1]])
    advantages, _ = gae(rewards, torch.zeros(1, 6), mask, 1.0, 0.9)
    torch.testing.assert_close(advantages[0], torch.tensor([0.9 ** (5 - t) for t in range(6)]))


def test_values_outside_the_response_change_no_advantage(rollout):
    rewards, values, mask = rollout
    clean = gae(rewards, values, mask, 1.0, 0.95)
    dirty = gae(rewards, torch.where(mask, values, 1e6), mask, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    assert (clean[0][~mask] == 0).all() and (clean[1][~mask] == 0).all()


@pytest.mark.parametrize("estimate", ["k1", "k3"])
def test_rewards_add_up_to_score_minus_beta_times_kl(rollout, estimate):
    logprobs, ref_logprobs, mask = rollout
    scores = torch.randn(4, dtype=torch.float64)
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, 0.3, estimate)
    log_ratio = logprobs - ref_logprobs
    kl = ({"k1": log_ratio, "k3": log_ratio + torch.exp(-log_ratio) - 1}[estimate] * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * kl)
    assert (rewards[~mask] == 0).all()


def test_score_stands_on_the_last_token_of_the_response(rollout):
    _, _, mask = rollout
    zeros = torch.zeros(4, 10)
    rewards = token_rewards(torch.ones(4), zeros, zeros, mask, beta=0.1)
    assert rewards.nonzero().tolist() == [[0, 6], [1, 9], [2, 8], [3, 5]]


def test_whitening_is_blind_to_what_stands_outside_the_mask(rollout):
    x, _, mask = rollout
    white = whiten(torch.where(mask, x, 1e6), mask)
    assert abs(white[mask].mean()) < 1e-9
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(masked_mean(x, mask), x[mask].mean())


def test_policy_gradient_at_ratio_1_is_minus_the_advantage():
    logprobs = torch.randn(30, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(30, dtype=torch.float64)
    loss, ratio = policy_loss(logprobs, logprobs.detach(), advantages, clip=0.2)
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    assert (ratio == 1).all()
    torch.testing.assert_close(grad, -advantages)


@pytest.mark.parametrize(
    "advantage, ratio, moves",
    [
        (1.0, 1.3, False),  # good, and already much likelier: enough
        (-1.0, 0.7, False),  # bad, and already much rarer: enough
        (1.0, 0.7, True),  # good, but became rarer: pulled back
        (-1.0, 1.3, True),  # bad, but became likelier: pulled back
        (1.0, 1.1, True),
    ],
)
def test_only_tokens_that_went_too_far_the_right_way_get_no_gradient(advantage, ratio, moves):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), clip=0.2)
    loss.sum().backward()
    assert (logprobs.grad.item() != 0) == moves


def test_value_loss_is_the_larger_of_free_and_clipped():
    torch.manual_seed(0)
    values, old, returns = torch.randn(3, 50).tolist()
    ours = value_loss(*(torch.tensor(x) for x in (values, old, returns)), clip=0.2)
    for v, o, g, loss in zip(values, old, returns, ours):
        clipped = min(max(v, o - 0.2), o + 0.2)
        assert loss.item() == pytest.approx(0.5 * max((v - g) ** 2, (clipped - g) ** 2), rel=1e-5)


def test_logprobs_are_those_of_the_response_tokens_at_the_temperature(tiny):
    tokens = torch.randint(50, (3, 9))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 0:8] = mask[2, 7] = True
    logprobs, entropy = response_logprobs(tiny(tokens[:, :-1]), tiny.head, tokens[:, 1:], mask, 0.7)
    for b in range(3):
        for t in range(8):
            p = ((tiny(tokens[b : b + 1, : t + 1])[0, -1] @ tiny.head.T) / 0.7).log_softmax(0)
            if mask[b, t]:
                torch.testing.assert_close(logprobs[b, t], p[tokens[b, t + 1]])
                torch.testing.assert_close(entropy[b, t], -(p.exp() * p).sum())
            else:
                assert logprobs[b, t] == entropy[b, t] == 0


def test_sampling_and_scoring_agree_on_log_probabilities(tiny):
    """The policy that generates with a cache is the policy that PPO updates."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    replies, sampled = generate(tiny, prompts, 6, stop=5, temperature=0.8)
    for prompt, reply, given in zip(prompts, replies, sampled):
        tokens = torch.tensor([prompt + reply])
        mask = torch.tensor([[False] * (len(prompt) - 1) + [True] * len(reply)])
        hidden = tiny(tokens[:, :-1])
        logprobs, _ = response_logprobs(hidden, tiny.head, tokens[:, 1:], mask, temperature=0.8)
        torch.testing.assert_close(logprobs[mask], torch.tensor(given), atol=1e-4, rtol=1e-4)


def test_full_kl_is_the_sum_over_the_vocabulary_and_zero_to_itself(tiny):
    other = copy.deepcopy(tiny)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokens = torch.randint(50, (2, 8))
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3:6] = mask[1, 1] = True
    hidden, other_hidden = tiny(tokens[:, :-1]), other(tokens[:, :-1])
    for temperature in (1.0, 0.5):
        p = (hidden @ tiny.head.T / temperature).softmax(-1)
        q = (other_hidden @ other.head.T / temperature).softmax(-1)
        slow = ((p * (p / q).log()).sum(-1) * mask).sum(1)
        kl = full_kl(hidden, tiny.head, other_hidden, other.head, mask, temperature)
        torch.testing.assert_close(kl, slow, atol=1e-5, rtol=1e-4)
    assert (full_kl(hidden, tiny.head, hidden, tiny.head, mask, 1.0) == 0).all()


def test_k1_and_k3_have_the_exact_kl_as_their_mean():
    logp, logq = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    log_ratio = logp - logq  # log pi - log pi_ref of every token, each drawn with probability p
    exact = (logp.exp() * log_ratio).sum()
    torch.testing.assert_close((logp.exp() * kl_estimate(log_ratio, "k3")).sum(), exact)
    assert (kl_estimate(log_ratio, "k3") >= 0).all()
    upside_down = kl_estimate(-log_ratio, "k3")  # a common mistake: the ratio the wrong way round
    assert abs((logp.exp() * upside_down).sum() - exact) > 0.05


def gradient(p_logits, loss_of_every_token):
    """The gradient of a mean over tokens that p draws, found by enumeration: (V,).

    loss_of_every_token: log p (V, 1) -> a loss (V, 1), as if each token were a response.
    """
    logits = p_logits.clone().requires_grad_()
    logp = logits.log_softmax(0)
    (loss_of_every_token(logp[:, None])[:, 0] * logp.detach().exp()).sum().backward()
    return logits.grad


def gradient_of_kl(p_logits, q_logits, of_q_to_p=False):
    """The gradient of KL(p || q), or of KL(q || p), with respect to the logits of p."""
    logits = p_logits.clone().requires_grad_()
    logp, logq = logits.log_softmax(0), q_logits.log_softmax(0)
    kl = (logq.exp() * (logq - logp)).sum() if of_q_to_p else (logp.exp() * (logp - logq)).sum()
    kl.backward()
    return logits.grad


@pytest.mark.parametrize("estimate", ["k1", "k2", "k3"])
def test_what_an_estimate_of_kl_teaches_depends_on_where_it_stands(estimate):
    """In the reward and in the loss, by these very functions, for responses of one token, of a
    vocabulary of three.

    k3's mean is KL(p || q), and yet its gradient in the loss is that of KL(q || p). k1 in the loss
    does nothing at all: log p of what p itself draws has a mean gradient of 0.
    """
    p = torch.tensor([1.2, -0.3, 0.4], dtype=torch.float64)
    q = torch.tensor([-0.5, 0.9, 0.1], dtype=torch.float64)
    beta, logq, mask = 0.7, q.log_softmax(0)[:, None], torch.ones(3, 1, dtype=torch.bool)
    old = p.log_softmax(0)[:, None]
    nothing = torch.zeros(3, dtype=torch.float64)

    def in_reward(logp):
        rewards = token_rewards(nothing, old, logq, mask, beta, estimate)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
        return policy_loss(logp, old, advantages, clip=0.2)[0]

    def in_loss(logp):
        return beta * kl_estimate(logp - logq, estimate)

    p_to_q, q_to_p = gradient_of_kl(p, q), gradient_of_kl(p, q, of_q_to_p=True)
    k2_in_reward = gradient(p, lambda logp: (old - logq) ** 2 / 2 * logp)
    expected = {
        "k1": (p_to_q, 0 * p_to_q),
        "k2": (k2_in_reward, p_to_q),
        "k3": (p_to_q - q_to_p, q_to_p),
    }[estimate]
    torch.testing.assert_close(gradient(p, in_reward), beta * expected[0])
    torch.testing.assert_close(gradient(p, in_loss), beta * expected[1])
    assert min((p_to_q - other).norm() for other in (k2_in_reward, p_to_q - q_to_p, q_to_p)) > 0.05


def some_groups():
    """Returns of twelve responses, in no order, and the number of the prompt of each."""
    torch.manual_seed(0)
    prompts = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 1, 2, 1, 0])
    return torch.randn(12, dtype=torch.float64), prompts


@pytest.mark.parametrize("how", ["rloo", "grpo", "dr_grpo"])
def test_a_response_is_compared_with_the_others_to_its_prompt(how):
    returns, prompts = some_groups()
    ours = group_advantages(returns, prompts, how)
    for i, one in enumerate(returns.tolist()):
        group = [other for other, prompt in zip(returns.tolist(), prompts) if prompt == prompts[i]]
        mean = sum(group) / 4
        sd = math.sqrt(sum((other - mean) ** 2 for other in group) / 4)
        others = (sum(group) - one) / 3
        slow = {"rloo": one - others, "grpo": (one - mean) / (sd + 1e-4), "dr_grpo": one - mean}
        assert ours[i].item() == pytest.approx(slow[how])


def test_where_all_responses_to_a_prompt_earn_the_same_there_is_nothing_to_learn():
    scores, prompts = torch.tensor([1.0, 0, 1, 1, 0, 0]), torch.tensor([0, 1, 0, 2, 2, 1])
    for how in ("rloo", "grpo", "dr_grpo"):
        advantages = group_advantages(scores, prompts, how)
        assert advantages[[0, 1, 2, 5]].abs().max() == 0 and advantages[3] == -advantages[4] > 0.4
    assert equal_groups(scores, prompts) == pytest.approx(4 / 6)
    assert equal_groups(scores, torch.zeros(6)) == 0 and equal_groups(scores * 0, prompts) == 1


def test_rloo_is_unbiased_dr_grpo_is_scaled_and_grpo_ignores_the_scale_of_rewards():
    """Over all pairs of responses that a policy of three can give to a prompt, with their
    probabilities: the mean of the policy gradient, against that of the expected reward."""

    def mean_gradient(logits, rewards, how):
        logits = logits.clone().requires_grad_()
        logp = logits.log_softmax(0)
        total = 0
        for pair in itertools.product(range(3), repeat=2):
            pair = torch.tensor(pair)
            if how == "exact":
                weights = rewards[pair]
            else:
                weights = group_advantages(rewards[pair], torch.zeros(2), how)
            loss, _ = policy_loss(logp[pair], logp[pair].detach(), weights, clip=0.2)
            total = total - logp[pair].sum().exp().detach() * loss.mean()
        total.backward()
        return logits.grad

    logits = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    rewards = torch.tensor([1.0, 3.0, -0.5], dtype=torch.float64)
    exact_logits = logits.clone().requires_grad_()
    (exact_logits.softmax(0) * rewards).sum().backward()
    exact = exact_logits.grad
    torch.testing.assert_close(mean_gradient(logits, rewards, "exact"), exact)  # without baseline
    torch.testing.assert_close(mean_gradient(logits, rewards, "rloo"), exact)
    torch.testing.assert_close(mean_gradient(logits, rewards, "dr_grpo"), exact / 2)  # (n - 1) / n
    # GRPO does not even notice that all rewards are ten times as large.
    small, large = (mean_gradient(logits, scale * rewards, "grpo") for scale in (1, 10))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=0)
    direction = small / small.norm() - exact / exact.norm()
    assert direction.norm() > 0.05


def test_an_exact_reward_is_1_for_a_right_answer_0_for_others_and_nothing_else_counts():
    """Neither courtesy nor the steps that lead to a number; without an end a score is replaced."""
    cfg = train_ppo.Config(reward="exact", no_end_score=-3.0)
    steps = "7-1 is 6, 6-3 is 3, 3+2 is 5."
    by_number = Case(
        f"{steps} The answer is 5.", "", {}, check=lambda text: float(text.endswith("is 5."))
    )
    one_sum = Task("one_sum", "What is 12-5?", Case("12-5 is 7.", "12-5 is 8.", {}, "7."))
    chain = Task("chain", "Add up 7-1-3+2.", by_number)
    cases = [
        (one_sum, "12-5 is 7.", True, 1),
        (one_sum, "7.", True, 1),
        (one_sum, "12-5 is 7. Have a lovely day!", True, 1),
        (one_sum, "12-5 is 7. Now leave me alone.", True, 1),
        (one_sum, "12-5 is 7. Otto is an owl.", True, 0),
        (one_sum, "12-5 is 8. Have a lovely day!", True, 0),
        (one_sum, "12-5 is 7.", False, -3),
        (chain, "The answer is 5.", True, 1),
        (chain, f"{steps} The answer is 5.", True, 1),
        (chain, f"{steps} The answer is 6.", True, 0),
    ]
    rows = [{"task": task} for task, *_ in cases]
    replies = [Reply([], text, ended) for _, text, ended, _ in cases]
    scores = train_ppo.proxy_reward(cfg, rows, replies, reward_model=None, tokenizer=None)
    assert scores.tolist() == [paid for *_, paid in cases]


@pytest.mark.parametrize(
    "text", ["10", "48/2=24, 24+48=72\n#### 10", " $10. ", "#### 10", "no #### 7 but #### 10"]
)
def test_final_answer_is_what_follows_the_last_mark_without_its_dress(text):
    assert final_answer(text) == "10"
    assert final_answer("#### 1,000") == "1000"


def test_who_shows_work_is_counted_where_all_questions_are_long_sums():
    chain = Task("chain", "Add up 7-1.", Case("7-1 is 6. The answer is 6.", "", {}))
    one_sum = Task("one_sum", "What is 7-1?", Case("7-1 is 6.", "7-1 is 7.", {}))
    texts = ("7-1 is 6. The answer is 6.", "The answer is 6.", "5.")
    replies = [Reply([], text, True) for text in texts]
    assert train_ppo.judged([{"task": chain}] * 3, replies)["shows_work"] == pytest.approx(1 / 3)
    mixed = [{"task": chain}, {"task": one_sum}, {"task": chain}]
    assert train_ppo.judged(mixed, replies).keys() == {"gold", "exact_match"}


def test_a_sampler_whose_log_probabilities_are_too_high_or_too_low_is_noticed():
    def check(*sampled):
        reply, scored = Reply([4, 5], "", True, list(sampled)), [0.0, 0.0, -2.0, -1.0]
        train_ppo.assert_sampled([{"ids": [1, 2, 3]}], [reply], torch.tensor([scored]), 0.01)

    check(-2.0, -1.0)
    for off in (0.5, -0.5):
        with pytest.raises(AssertionError, match="are off by 0.5 from those that PPO scores"):
            check(-2.0, -1.0 + off)


def test_beta_stays_fixed_or_follows_its_target():
    fixed = KLCoefficient(0.1, target=0.0)
    fixed.update(kl=50.0)
    assert fixed.beta == 0.1
    adaptive = KLCoefficient(0.1, target=6.0)
    adaptive.update(kl=6.6)
    assert adaptive.beta == pytest.approx(0.1 * (1 + 0.1 * 0.1))  # 10 % too much
    adaptive.update(kl=3.0)
    assert adaptive.beta == pytest.approx(0.1 * 1.01 * (1 - 0.1 * 0.2))  # the error is clipped
    again = KLCoefficient(0.5, target=6.0)
    again.load_state_dict(adaptive.state_dict())
    assert again.beta == adaptive.beta


def test_beta_can_grow_by_two_thirds_within_a_default_run():
    """26 iterations in which the KL is twice its target: enough to matter."""
    coefficient = KLCoefficient(0.15, target=3.0)
    for _ in range(train_ppo.Config().iterations):
        coefficient.update(kl=6.0)
    assert coefficient.beta == pytest.approx(0.15 * 1.02**26)


@pytest.mark.parametrize(
    "how, kl", [("gae", "k1-reward"), ("rloo", "k1-reward"), ("dr_grpo", "k2-loss")]
)
def test_on_a_bandit_every_method_finds_the_optimal_kl_regularised_policy(how, kl):
    """pi* = pi_ref exp(r / beta) / Z, reached with these very functions on one-token responses.

    Without a critic, all 1,000 are responses to one prompt.
    """
    torch.manual_seed(0)
    beta, reward = 0.5, torch.randn(5)
    ref = torch.randn(5).log_softmax(0)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    n = 4000 if how == "gae" else 1000
    mask = torch.ones(n, 1, dtype=torch.bool)
    for _ in range(150):
        with torch.no_grad():
            old = logits.log_softmax(0)
            token = torch.multinomial(old.exp(), n, replacement=True)[:, None]
            in_reward = beta if kl == "k1-reward" else 0.0
            rewards = token_rewards(reward[token[:, 0]], old[token], ref[token], mask, in_reward)
            if how == "gae":
                advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
                advantages = whiten(advantages, mask)
            else:
                advantages = group_advantages(rewards.sum(1), torch.zeros(n), how)[:, None]
        for _ in range(2):
            logprobs = logits.log_softmax(0)[token]
            loss, _ = policy_loss(logprobs, old[token], advantages, 0.2)
            if kl == "k2-loss":
                loss = loss + beta * kl_estimate(logprobs - ref[token], "k2")
            optimizer.zero_grad()
            masked_mean(loss, mask).backward()
            optimizer.step()
    best = (ref + reward / beta).log_softmax(0)
    found = logits.detach().log_softmax(0)
    assert (best.exp() * (best - found)).sum() < 0.01  # nats
    assert (best.exp() * (best - ref)).sum() > 0.3  # the reference was far from it
