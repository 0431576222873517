"""Agreement with code that others have written and many have used: transformers, trl, tiktoken.

These tests need `pip install transformers trl==1.10.0` and are skipped without it. Where a
reference differs from the papers, a test says how.
"""

import inspect
import math
import random
import textwrap
import types
from unittest.mock import MagicMock

import pytest
import torch

import train_dpo
import train_pretrain
from data.run import lr_at
from data.tokenizer import PATTERN, train_bpe
from gpt import GPT, GPTConfig, ScalarModel, generate
from train_dpo import dpo_loss, sequence_logprobs
from train_ppo import gae, kl_estimate, masked_mean, policy_loss, token_rewards, value_loss, whiten
from train_rm import last_token_scores, preference_loss
from train_sft import sft_loss

pytestmark = pytest.mark.reference


def closest(ours, theirs, within=1e-5):
    torch.testing.assert_close(ours, theirs, atol=within, rtol=within)


# ---------------------------------------------------------------------------------------------
# transformers: the model


def is_transposed(name: str) -> bool:
    """Whether transformers stores a matrix the other way round (its Conv1D)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def the_same_gpt2(ours: GPT):
    """A GPT2LMHeadModel with the weights of ours, its vocabulary without padding rows."""
    transformers = pytest.importorskip("transformers")
    c = ours.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    weights = {}
    for name, tensor in ours.state_dict().items():
        weights[name] = tensor.T if is_transposed(name) else tensor
    weights["wte.weight"] = weights["wte.weight"][: c.vocab_size]
    missing, unexpected = theirs.transformer.load_state_dict(weights, strict=False)
    assert not unexpected and not missing
    theirs.tie_weights()
    return theirs.eval()


def random_gpt(vocab_size=50, context=24, n_layer=2, n_head=2, n_embd=16):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, context, n_layer, n_head, n_embd))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) / math.sqrt(n_embd / 16)
    return model.eval()


SHAPES = [
    dict(),
    dict(n_layer=3, n_head=4, n_embd=128, vocab_size=1152, context=96),  # the default run's
    dict(n_layer=1, n_head=1, n_embd=64, vocab_size=257, context=33),
    dict(n_layer=5, n_head=8, n_embd=64),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_gpt2_in_transformers(shape):
    ours = random_gpt(**shape)
    theirs = the_same_gpt2(ours)
    idx = torch.randint(ours.config.vocab_size, (3, ours.config.context))
    closest(ours(idx) @ ours.head.T, theirs(idx).logits)
    loss = sft_loss(ours, idx, torch.ones_like(idx).bool())
    closest(loss, theirs(idx, labels=idx).loss)
    loss.backward()
    theirs(idx, labels=idx).loss.backward()
    gradients = dict(theirs.transformer.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = gradients[name].grad
        gradient = gradient.T if is_transposed(name) else gradient
        closest(parameter.grad[: len(gradient)], gradient)  # padding rows of the table: only ours


def test_greedy_replies_are_those_of_generate_in_transformers_with_left_padding():
    ours = random_gpt(context=40)
    theirs = the_same_gpt2(ours)
    prompts = [torch.randint(50, (n,)).tolist() for n in (3, 11, 7, 1, 11, 5)]
    end = 7
    replies, _ = generate(ours, prompts, 15, stop=end, temperature=0)
    longest = max(map(len, prompts))
    output = theirs.generate(
        torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        do_sample=False,
        max_new_tokens=15,
        eos_token_id=end,
        pad_token_id=0,
    )[:, longest:]
    for reply, row in zip(replies, output.tolist()):
        assert reply == row[: len(reply)]
        assert reply[-1] == end or len(reply) == 15


# ---------------------------------------------------------------------------------------------
# trl: losses of DPO and the reward model, run by trl's trainers on our model


class AsTheyCallIt(torch.nn.Module):
    """Our GPT behind the interface of transformers."""

    is_gradient_checkpointing = False

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return types.SimpleNamespace(logits=self.gpt(input_ids) @ self.gpt.head.T)


def two_models_and_pairs():
    policy, ref = random_gpt(), random_gpt()
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokens = torch.randint(50, (8, 20))  # 4 chosen, then 4 rejected
    mask = torch.zeros(8, 20, dtype=torch.bool)
    for row, (start, end) in enumerate(
        [(3, 9), (5, 20), (1, 2), (9, 14), (3, 12), (5, 8), (1, 19), (9, 20)]
    ):
        mask[row, start:end] = True
    return policy, ref, tokens, mask


def trl_dpo_loss(policy, ref, tokens, mask, loss_type, beta):
    pytest.importorskip("trl")
    from trl import DPOTrainer

    trainer = MagicMock()  # whatever the method only logs
    trainer.model, trainer.ref_model = AsTheyCallIt(policy), AsTheyCallIt(ref)
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = lambda tensor: tensor
    trainer.aux_loss_enabled = trainer.precompute_ref_logps = trainer.use_weighting = False
    trainer.ld_alpha, trainer.f_divergence_type = None, "reverse_kl"
    trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
    trainer.beta, trainer.label_smoothing = beta, 0.0
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": mask.long(),
    }
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)


def our_dpo_loss(policy, ref, tokens, mask, **options):
    logprobs = sequence_logprobs(policy, tokens, mask).view(2, -1)
    with torch.no_grad():
        ref_logprobs = sequence_logprobs(ref, tokens, mask).view(2, -1)
    cfg = train_dpo.Config(**options)
    return dpo_loss(logprobs, ref_logprobs, mask.sum(1).view(2, -1), cfg).mean()


def test_dpo_loss_and_its_gradients_are_those_of_trl():
    policy, ref, tokens, mask = two_models_and_pairs()
    ours = our_dpo_loss(policy, ref, tokens, mask, beta=0.3)
    theirs = trl_dpo_loss(policy, ref, tokens, mask, "sigmoid", 0.3)
    closest(ours, theirs)
    parameters = list(policy.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, theirs))):
        closest(a, b)


def test_ipo_in_trl_compares_means_where_equation_17_compares_sums():
    policy, ref, tokens, mask = two_models_and_pairs()
    theirs = trl_dpo_loss(policy, ref, tokens, mask, "ipo", 0.3)
    assert abs(our_dpo_loss(policy, ref, tokens, mask, loss="ipo", beta=0.3) - theirs) > 0.1
    # The same once our log-ratios are divided by the lengths, as theirs are.
    lengths = mask.sum(1).view(2, -1)
    means = (
        sequence_logprobs(model, tokens, mask).view(2, -1) / lengths for model in (policy, ref)
    )
    cfg = train_dpo.Config(loss="ipo", beta=0.3)
    closest(dpo_loss(*means, lengths, cfg).mean(), theirs)
    # For replies of one token there is nothing to divide.
    one = torch.zeros_like(mask)
    one[:, 5] = True
    ours = our_dpo_loss(policy, ref, tokens, one, loss="ipo", beta=0.3)
    closest(ours, trl_dpo_loss(policy, ref, tokens, one, "ipo", 0.3))


def test_nll_term_is_a_mean_over_replies_where_trl_takes_it_over_tokens():
    policy, ref, tokens, mask = two_models_and_pairs()
    theirs = trl_dpo_loss(policy, ref, tokens, mask, "sft", 0.3)
    chosen = sequence_logprobs(policy, tokens[:4], mask[:4])
    lengths = mask[:4].sum(1)
    closest(theirs, -chosen.sum() / lengths.sum())
    plain, with_nll = (
        our_dpo_loss(policy, ref, tokens, mask, beta=0.3, nll=nll) for nll in (0.0, 1.0)
    )
    closest(with_nll - plain, -(chosen / lengths).mean())  # Pang et al. 2024, equation 4


def test_loss_of_the_reward_model_is_that_of_trl():
    pytest.importorskip("trl")
    from trl import RewardTrainer

    model = ScalarModel.from_gpt(random_gpt())
    model.score.weight.data.normal_()
    rows = [torch.randint(50, (n,)).tolist() for n in (3, 9, 5, 8, 4, 6)]  # 3 chosen, 3 rejected
    chosen, rejected = last_token_scores(model, rows, pad_id=0).view(2, -1)

    class Classifier(torch.nn.Module):  # as sequence classification in transformers
        def forward(self, input_ids, attention_mask, use_cache):
            last = attention_mask.sum(1, keepdim=True) - 1
            return types.SimpleNamespace(logits=model(input_ids).gather(1, last))

    trainer = MagicMock()
    trainer.args.center_rewards_coefficient = None
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    theirs = RewardTrainer.compute_loss(trainer, Classifier(), inputs)
    closest(preference_loss(chosen, rejected), theirs)


# ---------------------------------------------------------------------------------------------
# trl: PPO. Its arithmetic stands in the middle of one long method, so these tests cut the lines
# out of it and run them.


def run_lines_of_trl(first: str, last: str, **names) -> dict:
    """Run the lines of PPOTrainer.train from the one with `first` to that with `last`."""
    pytest.importorskip("trl")
    ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
    lines = inspect.getsource(ppo_trainer.PPOTrainer.train).split("\n")
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i >= start and last in line)
    names = {**vars(ppo_trainer), **names}
    exec(textwrap.dedent("\n".join(lines[start : end + 1])), names)
    return names


def rollouts(lengths, width=10):
    torch.manual_seed(0)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    logprobs, ref_logprobs, values = torch.randn(3, len(lengths), width, dtype=torch.float64)
    return mask, logprobs, ref_logprobs, values * mask, torch.randn(len(lengths)).double()


def trl_advantages(mask, logprobs, ref_logprobs, values, scores, estimator="k1"):
    """What trl makes of rollouts whose responses start in column 0."""
    sequence_lengths = mask.sum(1) - 1  # trl: the place of the last token
    places = torch.arange(mask.shape[1]).repeat(len(mask), 1)
    return run_lines_of_trl(
        "logr = ref_logprobs - logprobs",
        "returns = advantages + values",
        args=types.SimpleNamespace(
            kl_estimator=estimator, kl_coef=0.3, whiten_rewards=False, gamma=0.99, lam=0.9
        ),
        logprobs=torch.where(mask, logprobs, 1.0),  # trl fills up both with the same number
        ref_logprobs=torch.where(mask, ref_logprobs, 1.0),
        values=values,
        scores=scores,
        responses=mask,
        sequence_lengths=sequence_lengths,
        sequence_lengths_p1=sequence_lengths + 1,
        padding_mask=~mask,
        padding_mask_p1=places > sequence_lengths[:, None] + 1,
    )


def test_rewards_advantages_and_returns_are_those_of_trl():
    mask, logprobs, ref_logprobs, values, scores = rollouts([10, 10, 10])
    theirs = trl_advantages(mask, logprobs, ref_logprobs, values, scores)
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, beta=0.3)
    advantages, returns = gae(rewards, values, mask, gamma=0.99, lam=0.9)
    closest(rewards, theirs["rewards"], 1e-12)
    closest(advantages, theirs["advantages"], 1e-12)
    closest(returns, theirs["returns"], 1e-12)


def test_trl_puts_the_score_behind_the_last_token_where_we_put_it_on_it():
    """In trl a reply that ends early is scored one column later, on padding with a value of its
    own. One more step of discount and of lambda lies between the score and every token."""
    mask, logprobs, ref_logprobs, values, scores = rollouts([10, 4, 7])
    theirs = trl_advantages(mask, logprobs, ref_logprobs, values, scores)["rewards"]
    ours = token_rewards(scores, logprobs, ref_logprobs, mask, beta=0.3)
    closest(ours[0], theirs[0], 1e-12)  # no room behind the end
    for row, last in ((1, 3), (2, 6)):
        closest(ours[row, last] - theirs[row, last], scores[row], 1e-12)
        closest(theirs[row, last + 1], scores[row], 1e-12)
        assert ours[row, last + 1] == 0


def test_k3_is_that_of_trl():
    mask, logprobs, ref_logprobs, values, scores = rollouts([10, 10, 10])
    theirs = trl_advantages(mask, logprobs, ref_logprobs, values, scores, "k3")["kl"]
    closest(kl_estimate(logprobs - ref_logprobs, "k3"), theirs, 1e-12)


def test_whitening_in_trl_divides_by_one_token_less():
    ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
    mask, x, *_ = rollouts([10, 4, 7])
    n = mask.sum()
    theirs = ppo_trainer.masked_whiten(x, mask) * mask
    closest(whiten(x, mask) * ((n - 1) / n).sqrt(), theirs, 1e-7)
    closest(masked_mean(x, mask), ppo_trainer.masked_mean(x, mask), 1e-12)


def test_policy_and_value_loss_are_those_of_trl():
    mask, new, old, values, _ = rollouts([10, 4, 7])
    old_values, returns, advantages = torch.randn(3, *mask.shape, dtype=torch.float64)
    rows = slice(None)
    theirs = run_lines_of_trl(
        "vpredclipped = torch.clamp(",
        "pg_loss = masked_mean(",
        args=types.SimpleNamespace(cliprange=0.2, cliprange_value=0.2),
        vpred=values,
        mb_values=old_values,
        mb_return=returns,
        new_logprobs=new,
        mb_logprobs=old,
        mb_advantage=advantages,
        micro_batch_inds=rows,
        padding_mask=~mask,
        padding_mask_p1=~mask,
    )
    loss, ratio = policy_loss(new, old, advantages, clip=0.2)
    closest(masked_mean(loss, mask), theirs["pg_loss"], 1e-12)
    closest(ratio, theirs["ratio"], 1e-12)
    loss = value_loss(values, old_values, returns, clip=0.2)
    closest(masked_mean(loss, mask), theirs["vf_loss"], 1e-12)


# ---------------------------------------------------------------------------------------------
# tiktoken and torch


def test_merges_are_those_of_the_trainer_that_explains_tiktoken():
    pytest.importorskip("regex")
    from tiktoken._educational import bpe_train

    # Both take the most frequent pair, and differ in which of two equally frequent ones goes first.
    # In random letters that are not equally likely, the first 60 have no such doubles.
    rng = random.Random(0)
    letters = rng.choices("etaoinshrd", weights=range(20, 0, -2), k=50_000)
    text = "".join(letter + " " * (rng.random() < 0.2) for letter in letters)
    ours = train_bpe(text, 261 + 60)
    pieces = [bytes([byte]) for byte in range(256)]
    for a, b in ours:
        pieces.append(pieces[a] + pieces[b])
    theirs = bpe_train(text, 256 + 60, PATTERN, visualise=None)
    assert pieces[256:] == sorted(theirs, key=theirs.get)[256:]


def test_schedule_is_two_linear_ones_of_torch():
    steps, warmup, floor = 100, 10, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    linear = torch.optim.lr_scheduler.LinearLR
    theirs = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            linear(optimizer, 1 / warmup, 1.0, warmup - 1),
            linear(optimizer, 1.0, floor, steps - warmup),
        ],
        milestones=[warmup],
    )
    for step in range(steps):
        ours = lr_at(step, steps, warmup, floor)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_adamw_is_the_paper_s_with_decay_of_matrices_only():
    """Loshchilov and Hutter 2019, algorithm 2, against the optimizer that the scripts make."""
    model = random_gpt(n_layer=1)
    cfg = train_pretrain.Config(optimizer="adamw", lr=0.01, weight_decay=0.1)
    optimizer = train_pretrain.make_optimizers(model, cfg)["adamw"]
    slow = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in slow.items()}
    v = {name: torch.zeros_like(p) for name, p in slow.items()}
    for t in range(1, 4):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            step = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            decay = 0.1 if p.ndim == 2 else 0.0
            slow[name] = slow[name] - 0.01 * (step + decay * slow[name])
        optimizer.step()
    for name, p in model.named_parameters():
        closest(p.detach().double(), slow[name], 1e-6)
