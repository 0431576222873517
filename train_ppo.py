"""Stage 4 of 5: RLHF with PPO. The model tries responses, a reward model scores them, PPO learns.

    maximise  E[ r(x, y) ] - beta KL(policy || reference)       x a prompt, y the policy's response

    reward   R_t = -beta (log pi_old - log pi_ref)(y_t), plus r(x, y) at the last token of y
    delta_t  = R_t + gamma v_old,t+1 - v_old,t   A_t = delta_t + gamma lambda A_{t+1}        (GAE)
    ratio_t  = pi(y_t) / pi_old(y_t)             A' = whiten(A): mean 0, variance 1 over all tokens
    policy   loss = mean max(-A' ratio, -A' clip(ratio, 1 - eps, 1 + eps))         (PPO, equation 7)
             (minus --entropy_bonus times the policy's entropy, if asked for)
    critic   loss = mean 1/2 max((v - G)^2, (v_old + clip(v - v_old, -eps, eps) - G)^2)
             where G = A + v_old, not whitened, is the return that the critic should have foreseen
    pi is the policy, pi_old the same when it sampled y; eps is --clip, and --value_clip for values

    Without a critic (--advantage rloo, grpo or dr_grpo) a prompt gets several responses, and
    A' = how much more reward y earned than other responses to x         (see `group_advantages`)

    trained  policy (from SFT), critic (from the reward model; without one, from SFT)
    frozen   reference (the SFT model), reward model
    reads    out/sft/ckpt.pt, out/rm/ckpt.pt, prompts of the town (or --data rows.jsonl);
             under --reward gold or exact, no reward model
    writes   out/ppo/: ckpt.pt, log.csv, curve.png, samples.txt
    run      python train_ppo.py
    expect   1 minute on two cores; gold of samples from 0.2 to 0.9 SD, KL 1.4 nats per response

The policy is the only model that is kept. The KL term holds it near the SFT model, where the reward
model has seen responses and can be trusted. `proxy` is what the policy is trained on, `gold` what
it should be trained on and never sees: when proxy keeps rising while gold falls, the policy has
found the reward model's mistakes (over-optimisation).

References: Schulman et al. 2017 (PPO), 2016 (GAE, equation 16); Ziegler et al. 2019 (KL in the
reward, adaptive beta); Ouyang et al. 2022 (InstructGPT); Ahmadian et al. 2024 (RLOO); Shao et al.
2024 (GRPO: here --advantage grpo --kl k3-loss); Liu et al. 2025 (Dr. GRPO). As in Ziegler et al.
and OpenAI's code, a response without an end gets a fixed score (trl subtracts a penalty). As in
that code, but not in the PPO paper, values are clipped and Adam's eps is 1e-5. Differs in: policy
and critic are separate models, so no coefficient weighs their losses; no pretraining gradients are
mixed in; learning rates fall to a tenth; every token counts the same, where GRPO divides by the
length of its response and Dr. GRPO by a constant; RLOO is clipped, where the paper uses REINFORCE.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from data.alarms import checksum
from data.chat import encode_prompt, one_line, pad, question, sample_replies, transcript
from data.files import held_out, keep_fitting, read_prompts
from data.gpt2 import load_init
from data.run import (
    RANK,
    WORLD,
    Run,
    average_gradients,
    gather,
    lr_at,
    mean_over_ranks,
    run_script,
    set_speed,
    shard,
    shard_microbatches,
    start,
    step_optimizers,
    sum_over_ranks,
)
from data.tokenizer import load_tokenizer
from data.town.gold import exact_match, final_answer, gold, shows_work
from data.town.tasks import SHOWN, draw_tasks, task_rows
from gpt import InputError, ScalarModel, fingerprint, load_model
from kernels import linear_logprobs
from train_rm import score_sequences


@dataclass
class Config:
    # data
    init: str = ""  # SFT checkpoint, policy at the start and reference ("" = out/sft/ckpt.pt)
    rm: str = ""  # reward model, and critic at the start ("" = out/rm/ckpt.pt)
    data: str = ""  # JSON or JSONL with prompts ("" = tasks of the town)
    tasks: str = ""  # mixture of kinds, like story:3,one_sum ("" = all, equally)
    # rollouts
    iterations: int = 26  # rounds of sampling, scoring and updating
    rollouts: int = 128  # responses sampled per iteration
    temperature: float = 1.0  # of sampling, and so of every log-probability
    max_new_tokens: int = 48  # longest response; without an end by then it gets no_end_score
    no_end_score: float = -2.0  # score of a response without an end, in SD of SFT samples
    # reward
    reward: str = "rm"  # rm; gold (of the town, to see what PPO could do); exact (1 if right, or 0)
    beta: float = 0.25  # KL coefficient (only its initial value if target_kl is given)
    target_kl: float = 0.0  # KL per response to aim for; beta moves slowly (0 = beta stays fixed)
    kl: str = "k1-reward"  # k1, k2 or k3 (see kl_estimate), in the -reward or in the -loss
    # advantages
    advantage: str = "gae"  # gae, with a critic; without one rloo, grpo or dr_grpo
    group: int = 8  # responses to every prompt if there is no critic
    gamma: float = 1.0  # GAE: discount
    lam: float = 0.95  # GAE: 1 trusts the rewards that followed, 0 the critic alone
    # updates
    epochs: int = 2  # passes over the rollouts of an iteration
    minibatch: int = 64  # responses per optimizer step
    microbatch: int = 16  # responses per forward pass; gradients add up to the minibatch
    clip: float = 0.2  # eps of the ratio
    value_clip: float = 0.2  # eps of the values
    entropy_bonus: float = 0.0  # weight of the policy's entropy, which keeps it from settling early
    lr: float = 3e-4  # peak learning rate of the policy
    critic_lr: float = 1e-3  # peak learning rate of the critic
    warmup: int = 2  # iterations until the peak (0 = none)
    grad_clip: float = 1.0  # largest norm of either gradient (0 = off)
    # run
    seed: int = 0  # everything random follows from it
    eval_every: int = 10  # iterations between greedy evaluations on held-out prompts
    save_every: int = 10  # iterations between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
    bf16: bool = False  # multiply in bfloat16; weights stay float32 (CPUs gain next to nothing)
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs
    name: str = ""  # of this run, which writes to out/<name> ("" = ppo)
    resume: bool = False  # continue an interrupted run
    check: bool = False  # compare the curves with those of reference runs (data/check.py)

    def __post_init__(self):
        if self.temperature == 0:
            raise ValueError(
                "--temperature 0: PPO learns from samples, and greedy ones never differ"
            )
        if self.target_kl and not self.beta:
            raise ValueError("--target_kl adapts --beta by factors, and 0 stays 0: start above it")
        if self.reward not in ("rm", "gold", "exact") or (self.data and self.reward == "gold"):
            raise ValueError(
                f"--reward {self.reward}: there are rm, exact and, without --data, gold"
            )
        if self.data and self.tasks:
            raise ValueError("--tasks are those of the town: with --data there are none")
        if self.kl not in [
            f"{k}-{place}" for k in ("k1", "k2", "k3") for place in ("reward", "loss")
        ]:
            raise ValueError(f"--kl {self.kl}: it is k1, k2 or k3, then -reward or -loss")
        if self.advantage not in ("gae", "rloo", "grpo", "dr_grpo"):
            raise ValueError(f"--advantage {self.advantage}: there are gae, rloo, grpo and dr_grpo")
        if self.advantage != "gae" and (self.group < 2 or self.rollouts % self.group):
            raise ValueError(
                f"--group {self.group}: responses are compared with others to the same prompt, so "
                f"it is 2 or more and divides --rollouts {self.rollouts}"
            )

    def resolved(self) -> "Config":
        """The same with the paths that "" stands for."""
        return replace(
            self,
            init=self.init or f"{self.out}/sft/ckpt.pt",
            rm=self.rm or f"{self.out}/rm/ckpt.pt",
        )


# ---------------------------------------------------------------------------------------------
# The mathematics. Column t of every (B, T) tensor below is about the t-th prediction: the token
# that was to come (targets), its log-probability, its reward, and the value of the state before it.


def response_logprobs(hidden, head, targets, mask, temperature):
    """Log-probability of every response token given all before it, and the policy's entropy there.

    hidden (B, T, C) and head (V, C) are the policy's; targets (B, T) int64: the tokens that follow;
    mask (B, T) bool: which of them belong to the response. Returns (logprobs, entropy), both (B, T)
    in nats, 0 outside the mask. Old, new and reference policy all go through here: two functions
    that differed in the last digit would falsify the ratio.
    """
    logprobs, entropy = linear_logprobs(
        hidden.flatten(0, 1),
        head,
        targets.masked_fill(~mask, -100).flatten(),
        temperature=temperature,
        return_entropy=True,
    )
    return logprobs.view_as(targets), entropy.view_as(targets)


def full_kl(hidden, head, ref_hidden, ref_head, mask, temperature):
    """KL(policy || ref) at each token of a response, over the whole vocabulary, summed: (B,).

    log pi - log pi_ref of the sampled tokens estimates the same, with more noise. All that remains
    random here is which tokens came before. For the log only: it needs all logits.
    """
    hidden, ref_hidden = hidden[mask].to(head.dtype), ref_hidden[mask].to(head.dtype)  # (N, C)
    logp = (hidden @ head.T / temperature).float().log_softmax(-1)  # (N, V)
    logref = (ref_hidden @ ref_head.T / temperature).float().log_softmax(-1)  # (N, V)
    kl = mask.new_zeros(mask.shape, dtype=torch.float32)  # (B, T)
    kl[mask] = (logp.exp() * (logp - logref)).sum(-1)
    return kl.sum(1)


def predictions(rows, replies, pad_token: int, device):
    """Prompts and responses as what the policy reads and predicts: three tensors (B, T).

    inputs int64: all tokens but the last, padded on the right; targets int64: the tokens that
    follow them; mask bool: the targets that belong to the response, end-of-turn included.
    """
    sequences = [row["ids"] + reply.ids for row, reply in zip(rows, replies)]
    in_response = [
        [0] * (len(row["ids"]) - 1) + [1] * len(reply.ids) for row, reply in zip(rows, replies)
    ]
    tokens, mask = pad(sequences, pad_token), pad(in_response, 0).bool()  # (B, T + 1), (B, T)
    assert mask.any(1).all(), "a response without tokens teaches nothing"
    return tokens[:, :-1].to(device), tokens[:, 1:].to(device), mask.to(device)


def masked_mean(x, mask):
    """Mean of x where mask is true."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """x shifted and scaled to mean 0 and variance 1 over the mask; 0 outside it."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, beta, estimate="k1"):
    """R_t (B, T): the KL penalty at every response token, and at the last one its score (B,)."""
    rewards = -beta * kl_estimate(logprobs - ref_logprobs, estimate) * mask
    # The column of each response's last token, (B,).
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def kl_estimate(log_ratio, estimate):
    """Estimates of KL(p || q) from log p - log q of tokens that p sampled, any shape.

    k1, k2 and k3 of http://joschu.net/blog/kl-approx.html. The means of k1 and of k3 are the KL;
    that of k2 nearly is while p and q are close. k1 may be negative (clipping it at 0 would bias
    it), the others never are. While p and q are close, k2 and k3 are far less noisy than k1; once
    they are apart, a single token that p has made rare adds q / p to k3, and its mean jumps.

    What they teach, though, depends on where they are used (Tang and Munos 2025). In the reward, k1
    has the gradient of KL(p || q). In the loss, k1 has none on average, k2 has that of KL(p || q),
    and k3, which is GRPO's, that of KL(q || p), but each for one token at a time: a token's effect
    on the KL of those after it, which the return includes, is left out. And in the loss, beta
    weighs the KL against A', which gae and grpo divide by an SD: it is not the beta of the reward.
    """
    if estimate == "k1":
        return log_ratio
    if estimate == "k2":
        return log_ratio**2 / 2
    return torch.expm1(-log_ratio) + log_ratio


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation: all (B, T) -> advantages, returns; 0 outside the mask.

    The mask of a row is contiguous, and nothing follows its last token: the next value is 0. The
    returns, which the critic learns, are A + v before A is whitened.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros(len(rewards), device=rewards.device)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # the last token: A = R - v, and nothing follows
    assert not advantages[~mask].any() and torch.allclose(
        advantages[last], (rewards - values)[last], atol=1e-4
    ), "rewards or values have been summed across the padding"
    return advantages, (advantages + values) * mask


def group_advantages(totals, prompts, how):
    """How much better every response is than others to its prompt: (B,), without any critic.

    totals (B,): the rewards of every response, summed over its tokens; prompts (B,) int64: the
    number of its prompt.

        rloo      total - mean of the others                      Ahmadian et al. 2024
        grpo      (total - mean of all) / (SD of all + 1e-4)      Shao et al. 2024, section 4.1.2
        dr_grpo   total - mean of all                             Liu et al. 2025

    The mean of the others does not depend on the response itself, so rloo is unbiased. dr_grpo is
    (n - 1) / n of it with n responses to a prompt. Dividing by the SD gives prompts on which nearly
    all responses are right, or nearly none, more weight than they have in the expected reward.
    """
    same = (prompts[:, None] == prompts).to(totals.dtype)  # (B, B)
    n = same.sum(1)
    deviation = totals - same @ totals / n
    if how == "rloo":
        return deviation * n / (n - 1)
    if how == "grpo":
        return deviation / ((same @ deviation**2 / n).sqrt() + 1e-4)
    return deviation


def equal_groups(scores, prompts) -> float:
    """The fraction of responses whose group has one score: these teach nothing about the reward."""
    same = prompts[:, None] == prompts  # (B, B)
    return (~same | (scores[:, None] == scores)).all(1).float().mean().item()


def policy_loss(logprobs, old_logprobs, advantages, clip):
    """Clipped surrogate per token, and the ratio; all (B, T).

    The maximum of two losses: a token whose ratio has left [1 - clip, 1 + clip] in the direction
    its advantage asked for gets no gradient; one that left in the wrong direction is pulled back.
    """
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return loss, ratio


def value_loss(values, old_values, returns, clip):
    """Half the squared error per token (B, T): of the value or of the clipped one, if larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


class KLCoefficient:
    """beta: fixed, or adapted so that the KL per response nears a target (Ziegler et al. 2019,
    section 2.2)."""

    def __init__(self, beta, target):
        self.beta, self.target = beta, target

    def update(self, kl):
        """After an iteration with this mean KL per response: beta grows if that was too much."""
        if self.target:
            error = max(-0.2, min(kl / self.target - 1, 0.2))  # both constants are the paper's
            self.beta *= 1 + 0.1 * error

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


# ---------------------------------------------------------------------------------------------
# Prompts, and what responses to them are worth


def load_prompts(cfg, tokenizer, longest: int) -> tuple[list[dict], list[dict]]:
    """Training and test rows, each with "messages" and their "ids", at most `longest` of them.

    Rows of the town also have the "task" that gold needs, rows of a file an "answer" if it has one.
    """

    def encode(rows: list[dict]) -> list[dict]:
        for row in rows:
            row["ids"] = encode_prompt(tokenizer, row["messages"])
        lengths = [len(row["ids"]) for row in rows]
        return keep_fitting(rows, lengths, longest, "the context minus --max_new_tokens")

    if cfg.data:
        rows = read_prompts(cfg.data)
        if cfg.reward == "exact":
            answered = [row for row in rows if row.get("answer")]
            if not answered:
                raise InputError(f"{cfg.data}: --reward exact needs responses to compare with")
            if n_others := len(rows) - len(answered):
                print(f"left out {n_others:,} of {len(rows):,} rows: they have no response")
            rows = answered
        return held_out(encode(rows))
    tasks = draw_tasks(cfg.iterations * cfg.rollouts, f"ppo {cfg.seed}", cfg.tasks)
    test_tasks = draw_tasks(150, "ppo", cfg.tasks, split="test")
    return encode(task_rows(tasks)), encode(task_rows(test_tasks))


def load_reward_model(cfg, checkpoint: dict, device) -> tuple[ScalarModel, str]:
    """The reward model, frozen, and its fingerprint. checkpoint: that of the initial policy.

    Prints a note if it was trained from another model. Raises InputError if its tokenizer differs.
    """
    model, rm_checkpoint = load_model(cfg.rm, device, ScalarModel)
    if rm_checkpoint["tokenizer"] != checkpoint["tokenizer"]:
        raise InputError(f"{cfg.rm} has another tokenizer than {cfg.init}")
    if rm_checkpoint.get("made_from", {}).get("init") not in (None, checkpoint["fingerprint"]):
        print(
            f"note: {cfg.rm} was trained from another model than {cfg.init}, and normalised on "
            "samples of that one: here its scores need not have mean 0 and SD 1"
        )
    report = rm_checkpoint.get("report", {})
    if report and report["accuracy"] < 0.5 + 1 / math.sqrt(report["pairs"]):  # two standard errors
        print(
            f"ALARM: {cfg.rm} agrees with only {report['accuracy']:.1%} of {report['pairs']} "
            "held-out labels, as a coin would: PPO would learn noise. Train it longer, or look "
            "whether chosen and rejected differ"
        )
    return model.requires_grad_(False), rm_checkpoint["fingerprint"]


def proxy_reward(cfg, rows, replies, reward_model, tokenizer) -> torch.Tensor:
    """What the policy is trained on, for each reply to a row: (B,), on the CPU.

    A response without an end gets cfg.no_end_score, whatever it says: if a penalty were subtracted
    from its score, a long response with a high enough score would still pay off.
    """
    pairs = list(zip(rows, replies))
    if cfg.reward == "rm":
        sequences = [row["ids"] + reply.ids for row, reply in pairs]
        scores = score_sequences(reward_model, sequences, tokenizer.pad)
    elif cfg.reward == "gold":
        scores = [gold(row["task"], reply.text, reply.ended) for row, reply in pairs]
    elif cfg.data:
        scores = [final_answer(reply.text) == final_answer(row["answer"]) for row, reply in pairs]
    else:
        scores = [exact_match(row["task"], reply.text) for row, reply in pairs]
    ended = np.array([reply.ended for reply in replies])
    return torch.tensor(np.where(ended, scores, cfg.no_end_score), dtype=torch.float32)


def judged(rows, replies) -> dict[str, float]:
    """Means for the log: gold, right responses and, where all are to long sums, those that show
    their work. Nothing where there is no gold."""
    if "task" not in rows[0]:
        return {}
    pairs = [(row["task"], reply) for row, reply in zip(rows, replies)]
    numbers = {
        "gold": np.mean([gold(task, reply.text, reply.ended) for task, reply in pairs]),
        "exact_match": np.mean([exact_match(task, reply.text) for task, reply in pairs]),
    }
    if all(task.kind == "chain" for task, _ in pairs):
        numbers["shows_work"] = np.mean([shows_work(reply.text) for reply in replies])
    return numbers


# ---------------------------------------------------------------------------------------------
# The stage


def forward_passes(policy, critic, reward_model, epochs: int) -> float:
    """What an iteration costs, in forward passes of the policy over all its tokens."""
    updates = 3 * epochs  # forward 1, backward 2
    passes = 2 + updates + 1  # policy: sampling, old log-probabilities, updates; reference
    for model, n in ((reward_model, 1), (critic, 1 + updates)):
        passes += n * model.config.n_layer / policy.config.n_layer if model else 0
    return passes


def assert_sampled(rows, replies, logprobs, rounding):
    """Assert that the sampler's log-probabilities equal those (B, T) that PPO computes."""
    sampled = [[0.0] * (len(row["ids"]) - 1) + r.logprobs for row, r in zip(rows, replies)]
    worst = (pad(sampled, 0.0).to(logprobs.device) - logprobs).abs().max().item()
    assert worst < rounding, (
        f"the sampler's log-probabilities are off by {worst:.3g} from those that PPO scores: is it "
        "the same model, at the same temperature, and is the mask that of the response?"
    )


def spread(scores, advantages) -> dict[str, float]:
    """For the alarms: how much scores (B,) and advantages (N,) differ, and the best score.

    Under gae the advantages are whitened, so their SD is 1, or 0 if all are equal.
    """
    return {
        "score_sd": scores.std(correction=0).item(),
        "best_score": scores.max().item(),
        "advantage_sd": advantages.std(correction=0).item(),
    }


def explained_variance(returns, values) -> float:
    """How much of the variance of the returns the critic foresaw: at most 1; both (N,)."""
    variance = returns.var(correction=0).clamp(min=1e-8)  # of one token 0, and not nan
    return 1 - ((returns - values).var(correction=0) / variance).item()


PANELS = {  # of curve.png: what a panel shows -> columns of log.csv
    "reward, SD of SFT samples": ["proxy", "gold"],
    "KL from SFT, nats per response\n(k3 jumps at rare tokens)": ["kl", "kl_k3", "kl_full"],
    "entropy, nats per token": ["entropy"],
    "explained variance of the returns": ["explained_variance"],
    "ratios beyond the clip, fraction;\napprox. KL in nats": ["clipfrac", "approx_kl"],
    "fractions of responses": ["no_end", "exact_match", "shows_work", "equal_groups"],
    "tokens per response": ["length"],
}
# Of every optimizer step; the last two are the critic's.
MEASURED = "policy_loss approx_kl clipfrac policy_grad_norm value_loss critic_grad_norm".split()
# On the screen.
REPORTED = "proxy gold shows_work kl length no_end greedy_proxy greedy_gold".split()


def main(cfg: Config) -> dict:
    """Train, and return the last row of the log."""
    cfg = cfg.resolved()
    device = start(cfg)
    run = Run("ppo", cfg, PANELS, unit="iteration")

    # ---- models: two that learn, two that stay as they are
    policy, checkpoint = load_init(cfg.init, device)
    ref, _ = load_init(cfg.init, device)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    made_from = {"init": checkpoint["fingerprint"]}
    reward_model = critic = None
    if cfg.reward == "rm":
        reward_model, made_from["rm"] = load_reward_model(cfg, checkpoint, device)
    if cfg.advantage == "gae":  # the others need no critic
        critic = deepcopy(reward_model) if reward_model else ScalarModel.from_gpt(policy)
        critic.to(device).requires_grad_()
    ref.requires_grad_(False)
    set_speed(cfg, *(model for model in (policy, ref, critic, reward_model) if model))
    ref_before = checksum(ref)
    # On a GPU all tensors are updated by one kernel; on a CPU that would save 1 % of an iteration.
    adamw = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=device.type == "cuda")
    optimizers = [torch.optim.AdamW(policy.parameters(), lr=cfg.lr, **adamw)]
    kl_coefficient = KLCoefficient(cfg.beta, cfg.target_kl)
    trained = dict(kl_coefficient=kl_coefficient, policy_optimizer=optimizers[0])
    if critic:
        optimizers.append(torch.optim.AdamW(critic.parameters(), lr=cfg.critic_lr, **adamw))
        trained |= dict(critic=critic, critic_optimizer=optimizers[1])
    estimate, place = cfg.kl.split("-")
    # How far apart two log-probabilities that should be equal may be: the town's are within 1e-5,
    # but GPT-2's logits lie near -80, where float32 has fewer digits after the point.
    rounding = 0.2 if cfg.bf16 else 1e-2

    # ---- prompts
    max_new, temperature = cfg.max_new_tokens, cfg.temperature
    group = 1 if critic else cfg.group
    rows, test_rows = load_prompts(cfg, tokenizer, policy.config.context - max_new)

    # ---- training
    encoded = ([row["ids"], row.get("answer")] for row in rows + test_rows)
    made_from["data"] = fingerprint(len(rows), *encoded)
    for iteration in run.steps(cfg.iterations, policy, tokenizer, made_from, **trained):
        rng = np.random.default_rng([cfg.seed, iteration])  # so that --resume repeats it

        # 1. Roll out: the policy answers, and every model reads the answers.
        n_prompts = cfg.rollouts // group
        drawn = rng.choice(len(rows), n_prompts, replace=n_prompts > len(rows))
        batch = [rows[i] for i in drawn.repeat(group)]
        seed = int(rng.integers(2**31)) + RANK  # ranks sample different tokens
        asked = shard([row["ids"] for row in batch])
        replies = gather(sample_replies(policy, tokenizer, asked, max_new, seed, temperature))
        # From here on sorted by length, so that neighbours share a forward pass with few pads.
        widths = [len(row["ids"]) + len(reply.ids) - 1 for row, reply in zip(batch, replies)]
        by_width = np.argsort(widths, kind="stable")
        batch, replies, widths = ([x[i] for i in by_width] for x in (batch, replies, widths))
        prompt_of = torch.tensor(by_width // group, device=device)  # (B,): equal for one prompt
        inputs, targets, mask = predictions(batch, replies, tokenizer.pad, device)  # (B, T) each

        old_logprobs, ref_logprobs, old_values, entropy = torch.zeros(4, *mask.shape, device=device)
        kl_full = torch.zeros(len(batch), device=device)
        with torch.no_grad():
            # at: the rows and columns of a microbatch, as an index into all (B, T) tensors
            for at in shard_microbatches(np.arange(len(batch)), widths, cfg.microbatch):
                hidden, ref_hidden = policy(inputs[at]), ref(inputs[at])  # (b, t, C)
                y, m = targets[at], mask[at]
                old_logprobs[at], entropy[at] = response_logprobs(
                    hidden, policy.head, y, m, temperature
                )
                ref_logprobs[at], _ = response_logprobs(ref_hidden, ref.head, y, m, temperature)
                if critic:
                    old_values[at] = critic(inputs[at])
                kl_full[at[0]] = full_kl(hidden, policy.head, ref_hidden, ref.head, m, temperature)
        sum_over_ranks(old_logprobs, ref_logprobs, old_values, entropy, kl_full)
        if iteration == 0:
            assert_sampled(batch, replies, old_logprobs, rounding)
            assert kl_full.abs().max() < rounding, "policy and reference start as the same model"

        # 2. Rewards and advantages. scores: of responses; rewards: of every token; returns: what
        # the critic should predict.
        scores = proxy_reward(cfg, batch, replies, reward_model, tokenizer).to(device)  # (B,)
        log_ratio = (old_logprobs - ref_logprobs) * mask
        kl, beta = log_ratio.sum(1), kl_coefficient.beta  # kl (B,): k1, summed over the response
        in_reward, in_loss = (beta, 0.0) if place == "reward" else (0.0, beta)
        rewards = token_rewards(scores, old_logprobs, ref_logprobs, mask, in_reward, estimate)
        if critic:
            advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)
            run.log(
                iteration, explained_variance=explained_variance(returns[mask], old_values[mask])
            )
            advantages = whiten(advantages, mask)
        else:  # all tokens of a response have the same advantage
            advantages = group_advantages(rewards.sum(1), prompt_of, cfg.advantage)[:, None] * mask
            run.log(iteration, equal_groups=equal_groups(scores, prompt_of))

        # 3. Update policy and critic on these rollouts.
        measured = []  # of every step, in the order of MEASURED
        ratio_errors = torch.zeros(len(batch), device=device)  # of the first step: ratios must be 1
        for epoch in range(cfg.epochs):
            shuffled = rng.permutation(len(batch))
            n_minibatches = math.ceil(len(batch) / cfg.minibatch)
            for number, minibatch in enumerate(np.array_split(shuffled, n_minibatches)):
                minibatch = np.sort(minibatch)  # by length, as the batch is
                n_tokens = mask[minibatch].sum() / WORLD  # since gradients are averaged over ranks
                sums = torch.zeros(4)
                for at in shard_microbatches(minibatch, widths, cfg.microbatch):
                    hidden, m = policy(inputs[at]), mask[at]
                    logprobs, new_entropy = response_logprobs(
                        hidden, policy.head, targets[at], m, temperature
                    )
                    loss, ratio = policy_loss(logprobs, old_logprobs[at], advantages[at], cfg.clip)
                    if cfg.entropy_bonus:
                        loss = loss - cfg.entropy_bonus * new_entropy
                    if in_loss:
                        loss = loss + in_loss * kl_estimate(logprobs - ref_logprobs[at], estimate)
                    # Every token of the minibatch counts the same, whatever response it is in.
                    ((loss * m).sum() / n_tokens).backward()
                    critic_loss = torch.zeros_like(loss)
                    if critic:
                        v, v_old = critic(inputs[at]), old_values[at]
                        critic_loss = value_loss(v, v_old, returns[at], cfg.value_clip)
                        ((critic_loss * m).sum() / n_tokens).backward()

                    with torch.no_grad():
                        moved = (ratio - 1).abs() * m
                        if epoch == 0 and number == 0:
                            ratio_errors[at[0]] = moved.amax(1)
                        approx_kl = kl_estimate(old_logprobs[at] - logprobs, "k3")  # old to new
                        outside = (moved > cfg.clip).float()
                        for i, x in enumerate((loss, approx_kl, outside, critic_loss)):
                            sums[i] += ((x * m).sum() / n_tokens).cpu()
                if epoch == 0 and number == 0:
                    sum_over_ranks(ratio_errors)
                    worst = ratio_errors.max().item()
                    assert worst < rounding, f"a ratio is off by {worst} before any update"
                norm = average_gradients(policy, cfg.grad_clip)
                critic_norm = average_gradients(critic, cfg.grad_clip) if critic else 0.0
                measured.append([*sums[:3].tolist(), norm, sums[3].item(), critic_norm])
                step_optimizers(optimizers, lr_at(iteration, cfg.iterations, cfg.warmup, floor=0.1))

        assert iteration > 1 or checksum(ref) == ref_before, "the reference must not move"

        # 4. Report.
        names = MEASURED if critic else MEASURED[:4]
        run.log(
            iteration,
            proxy=scores.mean().item(),
            **spread(scores, advantages[mask]),
            **judged(batch, replies),
            kl=kl.mean().item(),
            kl_k3=kl_estimate(log_ratio, "k3").sum(1).mean().item(),
            kl_full=kl_full.mean().item(),
            beta=beta,
            objective=(scores - beta * kl).mean().item(),
            entropy=masked_mean(entropy, mask).item(),
            length=mask.sum(1).float().mean().item(),
            no_end=np.mean([not reply.ended for reply in replies]),
            first_ratio_error=ratio_errors.max().item(),
            **mean_over_ranks(device, **dict(zip(names, np.mean(measured, 0)))),
        )
        kl_coefficient.update(kl.mean().item())
        passes = forward_passes(policy, critic, reward_model, cfg.epochs)
        run.count(sum(widths) + len(widths), passes)  # a width is a token less than its sequence

        if (iteration + 1) % cfg.eval_every == 0 or iteration + 1 == cfg.iterations:
            asked = [row["ids"] for row in test_rows]
            replies = sample_replies(policy, tokenizer, asked, max_new, seed=0, temperature=0.0)
            proxy = proxy_reward(cfg, test_rows, replies, reward_model, tokenizer)
            greedy = {"proxy": proxy.mean().item(), **judged(test_rows, replies)}
            run.log(iteration, **{f"greedy_{name}": value for name, value in greedy.items()})
            run.report(iteration, *REPORTED)
            run.say(f"    > {one_line(test_rows[0]['messages'])}\n    {replies[0].text}")

    # ---- results: what it says to some prompts
    file_prompts = [row["messages"] for row in test_rows[:8]]
    shown = file_prompts if cfg.data else [question(text) for text in SHOWN]
    before, after = (transcript(m, tokenizer, shown, max_new, cfg.seed) for m in (ref, policy))
    run.finish(policy, f"{after}BEFORE, the model that this one was trained from:\n\n{before}")
    return run.rows[-1]


if __name__ == "__main__":
    run_script(main, Config)
