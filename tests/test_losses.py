"""The losses of SFT, RM and DPO against slow, obvious versions, and their gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_dpo
import train_pretrain
from data.metrics import expected_calibration_error, spearman
from data.run import lr_at, step_optimizers
from gpt import GPT, GPTConfig, ScalarModel
from kernels import linear_cross_entropy, linear_logprobs
from train_dpo import dpo_loss, sequence_logprobs
from train_ppo import policy_loss, value_loss
from train_pretrain import (
    Muon,
    cut_documents,
    make_optimizers,
    orthogonalise,
    validation_loss,
)
from train_rm import last_token_scores, preference_loss, score_sequences
from train_sft import sft_loss

# ---------------------------------------------------------------------------------------------
# All of them


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


TARGET, LENGTHS = torch.tensor([0, 3, 6, 2, 2]), torch.tensor([[3, 7, 1], [2, 5, 9]])
LOSSES = {  # name: (loss as a function of tensors, the shapes of those tensors)
    "cross-entropy of SFT": (lambda h, w: linear_cross_entropy(h, w, TARGET), (5, 4), (7, 4)),
    "log-probability": (lambda h, w: linear_logprobs(h, w, TARGET), (5, 4), (7, 4)),
    "entropy": (
        lambda h, w: linear_logprobs(h, w, TARGET, temperature=0.7, return_entropy=True)[1],
        (5, 4),
        (7, 4),
    ),
    "Bradley-Terry": (preference_loss, (6,), (6,)),
    "PPO policy": (lambda x: policy_loss(0.3 * x, random(9) * 0.3, random(9), 0.2)[0], (9,)),
    "PPO value": (lambda x: value_loss(x, random(9) + 0.1, 2 * random(9), 0.2), (9,)),
    **{
        f"{name}, nll {nll}": (
            lambda x, name=name, nll=nll: dpo_loss(
                x, random(2, 3), LENGTHS, train_dpo.Config(loss=name, nll=nll)
            ),
            (2, 3),
        )
        for name in ("dpo", "cdpo", "ipo", "simpo")
        for nll in (0.0, 0.5)
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_every_loss_agrees_with_finite_differences(name):
    loss, *shapes = LOSSES[name]
    inputs = [(random(*shape) + 0.01 * i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_a_model_that_has_learned_nothing_loses_ln_v_nats_and_half_the_variance_of_its_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1152, context=96, n_layer=3, n_head=4, n_embd=128))
    tokens = torch.randint(1152, (32, 96))
    loss = sft_loss(model, tokens, torch.ones_like(tokens).bool())
    variance = 128 * 0.02**2  # of a product of normalised states and a row of the token table
    assert loss.item() == pytest.approx(math.log(1152) + variance / 2, abs=0.01)


# ---------------------------------------------------------------------------------------------
# Pretraining


def test_windows_start_at_documents_and_every_context_inside_long_ones():
    tokens = np.array([9, 1, 2, 9, 1, 9, 1, 2, 3, 4, 5, 6])  # 9 is end-of-text
    assert cut_documents(tokens, 9, 4).tolist() == [0, 3, 5, 9, 12]
    assert cut_documents(tokens[:-2], 9, 4).tolist() == [0, 3, 5, 9, 10]  # one is left over


def test_validation_loss_is_the_mean_over_all_tokens_each_predicted_once(tiny):
    tokens = np.array([9, 1, 2, 9, 1, 9, 1, 2, 3, 4, 5, 6])
    cuts = cut_documents(tokens, 9, 4)
    total = 0.0
    for start, end in zip(cuts, cuts[1:]):
        for t in range(start, min(end, len(tokens) - 1)):
            logits = tiny(torch.tensor(tokens[None, start : t + 1]))[0, -1] @ tiny.head.T
            total -= logits.log_softmax(0)[tokens[t + 1]].item()
    assert validation_loss(tiny, tokens, cuts, 9) == pytest.approx(total / 11, rel=1e-5)


def test_learning_rate_rises_then_falls_to_its_floor():
    fractions = [lr_at(step, 100, 10, floor=0.1) for step in range(101)]
    assert fractions[0] == pytest.approx(0.1) and max(fractions) == fractions[9] == 1
    assert fractions[100] == pytest.approx(0.1)
    assert all(a <= b for a, b in zip(fractions[:9], fractions[1:10]))
    assert all(a >= b for a, b in zip(fractions[10:], fractions[11:]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_and_tables_are_decayed(tiny, optimizer):
    cfg = train_pretrain.Config(optimizer=optimizer, weight_decay=0.1)
    decay = {}
    for one in make_optimizers(tiny, cfg).values():
        for group in one.param_groups:
            decay.update({id(p): group["weight_decay"] for p in group["params"]})
    assert len(decay) == len(list(tiny.parameters()))  # every tensor is trained, once
    for name, p in tiny.named_parameters():
        assert decay[id(p)] == (0.1 if p.ndim == 2 else 0.0), name


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 32)])
def test_orthogonalising_keeps_directions_and_makes_singular_values_alike(shape):
    torch.manual_seed(0)
    stack = torch.randn(2, *shape, dtype=torch.float64) * torch.logspace(0, -1, shape[1])
    stack[0] *= 1e-4
    stack[1] *= 100.0  # the size of a matrix does not matter, nor what else is in the stack
    for g, found in zip(stack, orthogonalise(stack)):
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):  # what five rounds do to each singular value
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert 0.6 < s.min() and s.max() < 1.25
        torch.testing.assert_close(found, u @ s.diag() @ v)


def test_muon_is_torchs_muon_but_for_its_bfloat16():
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 48)]  # those of a shape are moved together
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.1, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(5):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q, old in zip(ours, theirs, before):
            moved = (p - old).norm().item()
            torch.testing.assert_close(p, q, atol=0.02 * moved, rtol=0)


def test_a_step_uses_a_fraction_of_the_peak_rate_and_clears_the_gradients():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in range(2):
        weight.sum().backward()
        step_optimizers([optimizer], lr_fraction=0.1)
    torch.testing.assert_close(weight.data, torch.full((3,), -2 * 0.1 * 0.5))
    assert weight.grad is None


# ---------------------------------------------------------------------------------------------
# SFT


def conversation():
    torch.manual_seed(0)
    tokens = torch.randint(50, (3, 12))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 5:9] = mask[1, 3:12] = mask[2, 7] = True
    return tokens, mask


def test_sft_loss_is_the_mean_over_supervised_tokens(tiny):
    tokens, mask = conversation()
    losses = []
    for row, m in zip(tokens, mask):
        for t in range(12):
            if m[t]:
                logits = tiny(row[None, :t])[0, -1] @ tiny.head.T  # what is known before token t
                losses.append(-logits.log_softmax(0)[row[t]])
    torch.testing.assert_close(sft_loss(tiny, tokens, mask), torch.stack(losses).mean())
    torch.testing.assert_close(sft_loss(tiny, tokens, mask, "sum"), torch.stack(losses).sum())


def test_prompt_tokens_get_zero_gradient(tiny):
    """No prompt token is a target: only the states before reply tokens are pulled."""
    tokens, mask = conversation()

    class Recorder:  # a model whose hidden states keep their gradient
        head = tiny.head

        def __call__(self, idx):
            self.hidden = tiny(idx)
            self.hidden.retain_grad()
            return self.hidden

    model = Recorder()
    sft_loss(model, tokens, mask).backward()
    pulled = model.hidden.grad.abs().sum(-1) > 0
    assert torch.equal(pulled, mask[:, 1:])


def test_what_stands_after_the_reply_changes_nothing(tiny):
    tokens, mask = conversation()
    before = sft_loss(tiny, tokens[:1], mask[:1])
    tokens[0, 9:] = 7  # padding
    torch.testing.assert_close(sft_loss(tiny, tokens[:1], mask[:1]), before)


def test_overfitting_one_batch_brings_the_loss_to_almost_nothing(tiny):
    tokens, mask = conversation()
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    for _ in range(60):
        loss = sft_loss(tiny, tokens, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05


# ---------------------------------------------------------------------------------------------
# Reward model


def test_preference_loss_is_bradley_terry():
    chosen, rejected = torch.randn(2, 20, dtype=torch.float64)
    expected = sum(-math.log(1 / (1 + math.exp(r - c))) for c, r in zip(chosen, rejected)) / 20
    torch.testing.assert_close(preference_loss(chosen, rejected).item(), float(expected))


def test_preference_loss_at_equal_scores_is_ln_2():
    assert preference_loss(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(math.log(2))


def test_only_the_difference_of_scores_counts():
    chosen, rejected = torch.randn(2, 20, dtype=torch.float64)
    torch.testing.assert_close(
        preference_loss(chosen + 5, rejected + 5), preference_loss(chosen, rejected)
    )


def test_gradient_of_the_preference_loss_is_how_surprised_it_was():
    chosen, rejected = torch.randn(2, 20, dtype=torch.float64).requires_grad_()
    d_chosen, d_rejected = torch.autograd.grad(
        preference_loss(chosen, rejected), (chosen, rejected)
    )
    torch.testing.assert_close(d_chosen, (torch.sigmoid(chosen - rejected) - 1) / 20)
    torch.testing.assert_close(d_rejected, -d_chosen)


def test_extreme_scores_give_finite_losses_and_gradients():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = preference_loss(chosen, -chosen.detach())
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite().all()


def scalar_model(tiny):
    model = ScalarModel.from_gpt(tiny)
    model.score.weight.data.normal_()
    return model


def test_score_is_read_at_the_last_token_whatever_stands_beside_it(tiny):
    model = scalar_model(tiny)
    rows = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [1, 2]]
    together = last_token_scores(model, rows, pad_id=0)
    alone = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(last_token_scores(model, rows, pad_id=33), together)
    torch.testing.assert_close(
        torch.tensor(score_sequences(model, rows, 0)).float(), together.detach()
    )


def test_calibration_error_of_a_calibrated_judge_goes_to_zero_and_of_a_braggart_does_not():
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    won = (rng.random(50_000) < p).astype(float)
    assert expected_calibration_error(p, won)[0] < 0.01
    sure = np.where(p > 0.5, 0.99, 0.01)
    assert expected_calibration_error(sure, won)[0] == pytest.approx(0.24, abs=0.01)  # .99 - .75


def test_calibration_error_by_hand():
    error, table = expected_calibration_error(
        np.array([0.1, 0.15, 0.9, 1.0]), np.array([0, 1, 1, 1])
    )
    assert error == pytest.approx((2 * (0.5 - 0.125) + (1 - 0.95) * 2) / 4)
    assert [n for *_, n in table] == [2, 2]


def test_rank_correlation_sees_order_only_and_shares_ranks():
    x = np.array([3.0, 1.0, 2.0, 2.0])
    assert spearman(x, x**3) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    by_hand = np.corrcoef([4, 1, 2.5, 2.5], [1, 2, 3, 4])[0, 1]
    assert spearman(x, [10, 20, 30, 40]) == pytest.approx(by_hand)


# ---------------------------------------------------------------------------------------------
# DPO


def dpo_config(**changes):
    return train_dpo.Config(**changes)


def pairs(n=20):
    torch.manual_seed(0)
    logprobs = (-10 * torch.rand(2, n, dtype=torch.float64)).requires_grad_()
    ref_logprobs = -10 * torch.rand(2, n, dtype=torch.float64)
    lengths = torch.randint(1, 20, (2, n))
    return logprobs, ref_logprobs, lengths


def test_sequence_logprob_is_the_sum_over_the_reply(tiny):
    tokens, mask = conversation()
    for row, m, ours in zip(tokens, mask, sequence_logprobs(tiny, tokens, mask)):
        logprobs = (tiny(row[None])[0] @ tiny.head.T).log_softmax(-1)
        slow = sum(logprobs[t - 1, row[t]] for t in range(12) if m[t])
        torch.testing.assert_close(ours, slow)


def test_dpo_loss_is_its_formula():
    logprobs, ref, lengths = pairs()
    logprobs = logprobs.detach()
    for i, loss in enumerate(dpo_loss(logprobs, ref, lengths, dpo_config(beta=0.3))):
        h = (logprobs[0, i] - ref[0, i]) - (logprobs[1, i] - ref[1, i])
        assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.3 * h))))


@pytest.mark.parametrize(
    "loss, expected", [("dpo", math.log(2)), ("cdpo", math.log(2)), ("ipo", 25.0)]
)
def test_loss_is_known_when_policy_equals_reference(loss, expected):
    logprobs, _, lengths = pairs()
    losses = dpo_loss(logprobs, logprobs.detach(), lengths, dpo_config(loss=loss, beta=0.1))
    torch.testing.assert_close(losses, torch.full_like(losses, expected))


def test_gradient_of_dpo_weighs_pairs_by_how_wrong_the_implicit_reward_is():
    """Rafailov et al. 2023, section 4: -beta sigmoid(-beta h) for chosen, the rest mirrored."""
    logprobs, ref, lengths = pairs()
    (grad,) = torch.autograd.grad(
        dpo_loss(logprobs, ref, lengths, dpo_config(beta=0.3)).sum(), logprobs
    )
    h = (logprobs - ref)[0] - (logprobs - ref)[1]
    torch.testing.assert_close(grad[0], (-0.3 * torch.sigmoid(-0.3 * h)).detach())
    torch.testing.assert_close(grad[1], -grad[0])


def test_swapping_chosen_and_rejected_mirrors_the_loss():
    logprobs, ref, lengths = pairs()
    cfg = dpo_config(beta=0.3)
    there, back = (
        dpo_loss(logprobs, ref, lengths, cfg),
        dpo_loss(logprobs.flip(0), ref.flip(0), lengths, cfg),
    )
    h = (logprobs - ref)[0] - (logprobs - ref)[1]
    torch.testing.assert_close(back - there, 0.3 * h)  # log sigmoid(x) - log sigmoid(-x) = x


def test_cdpo_is_smallest_where_the_model_is_as_sure_as_the_labels_are_right():
    h = torch.linspace(-20, 40, 6001, dtype=torch.float64)
    zeros = torch.zeros_like(h)
    loss = dpo_loss(
        torch.stack([h, zeros]),
        torch.stack([zeros, zeros]),
        torch.ones(2, len(h)),
        dpo_config(loss="cdpo", label_smoothing=0.2, beta=0.1),
    )
    assert torch.sigmoid(0.1 * h[loss.argmin()]).item() == pytest.approx(0.8, abs=1e-3)


def test_ipo_is_smallest_at_its_target_margin():
    h = torch.linspace(-20, 40, 6001, dtype=torch.float64)
    zeros = torch.zeros_like(h)
    loss = dpo_loss(
        torch.stack([h, zeros]),
        torch.stack([zeros, zeros]),
        torch.ones(2, len(h)),
        dpo_config(loss="ipo", beta=0.1),
    )
    assert h[loss.argmin()].item() == pytest.approx(1 / (2 * 0.1), abs=0.02)


def test_simpo_compares_means_and_ignores_the_reference():
    logprobs, ref, lengths = pairs()
    cfg = dpo_config(loss="simpo", beta=2.0, simpo_margin=0.5)
    ours = dpo_loss(logprobs, ref, lengths, cfg)
    means = logprobs / lengths
    torch.testing.assert_close(ours, -F.logsigmoid(2 * means[0] - 2 * means[1] - 0.5))
    torch.testing.assert_close(dpo_loss(logprobs, ref + 7, lengths, cfg), ours)


def test_nll_term_adds_the_mean_loss_of_the_chosen_reply():
    logprobs, ref, lengths = pairs()
    plain, with_nll = (dpo_loss(logprobs, ref, lengths, dpo_config(nll=nll)) for nll in (0.0, 0.2))
    torch.testing.assert_close(with_nll - plain, -0.2 * logprobs[0] / lengths[0])


def test_dpo_on_a_bandit_finds_the_policy_that_kl_regularised_reward_maximisation_has():
    """pi* = pi_ref exp(r / beta) / Z, here with every pair of 5 replies and exact labels."""
    torch.manual_seed(0)
    reward, ref = (
        torch.randn(5, dtype=torch.float64),
        torch.randn(5, dtype=torch.float64).log_softmax(0),
    )
    logits = ref.clone().requires_grad_()
    i, j = torch.combinations(torch.arange(5)).T
    p = torch.sigmoid(reward[i] - reward[j])  # how often i is preferred to j
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15
    )
    cfg, ones = dpo_config(beta=0.5), torch.ones(2, len(i))

    def closure():
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        both = torch.stack([logp[i], logp[j]]), torch.stack([ref[i], ref[j]])
        losses = p * dpo_loss(*both, ones, cfg) + (1 - p) * dpo_loss(
            *(x.flip(0) for x in both), ones, cfg
        )
        losses.sum().backward()
        return losses.sum()

    optimizer.step(closure)
    torch.testing.assert_close(
        logits.log_softmax(0), (ref + reward / 0.5).log_softmax(0), atol=1e-5, rtol=0
    )
