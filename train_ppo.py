"""Stage 4 of 5: RLHF with PPO. The model tries replies, a reward model scores them, PPO learns.

    maximise  E[ r(x, y) ] - beta KL(policy || reference)       x a prompt, y sampled by the policy

    reward   R_t = -beta (log pi - log pi_ref)(y_t), plus r(x, y) at the last token of y
    delta_t  = R_t + gamma V_{t+1} - V_t         A_t = delta_t + gamma lambda A_{t+1}        (GAE)
    ratio_t  = pi(y_t) / pi_old(y_t)
    policy   loss = mean max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))           (PPO, equation 7)
    critic   loss = mean 1/2 max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2)
             where G = A + V_old is the return that the critic should have foreseen

    trained  policy (from SFT), critic (from the reward model)
    frozen   reference (the SFT model), reward model
    reads    out/sft/ckpt.pt, out/rm/ckpt.pt, prompts of the town (or --data rows.jsonl);
             under --reward gold or exact, no reward model
    writes   out/ppo/: ckpt.pt, log.csv, curve.png, samples.txt
    run      python train_ppo.py
    expect   1 minute on two cores; gold of samples from 0.0 to 1.0 SD, KL 1.8 nats per reply

The policy is the only model that is kept. The KL term holds it near the SFT model, where the reward
model has seen replies and can be trusted. `proxy` is what the policy is trained on, `gold` what it
should be trained on and never sees: when proxy goes on rising while gold falls, the policy has
found the reward model's mistakes (over-optimisation).

References: Schulman et al. 2017 (PPO), 2016 (GAE, equation 16); Ziegler et al. 2019 (KL in the
reward, adaptive beta); Ouyang et al. 2022 (InstructGPT). Differs in: no pretraining gradients mixed
in, no entropy bonus, and a reply without end has its score replaced, not reduced.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.chat import encode_prompt, pad, question, sample_replies, transcript
from data.files import held_out, keep_fitting, read_prompts
from data.gold import gold
from data.tasks import SHOWN, draw_tasks
from data.tokenizer import load_tokenizer
from gpt import ScalarModel, load_model
from kernels import linear_logprobs
from train_pretrain import (
    RANK,
    WORLD,
    Run,
    average_gradients,
    gather,
    lr_at,
    mean_over_ranks,
    my_share,
    pick_device,
    run_script,
    set_speed,
    step_optimizers,
    sum_over_ranks,
)
from train_rm import score_sequences


@dataclass
class Config:
    # data
    init: str = ""  # SFT checkpoint, policy at the start and reference ("" = out/sft/ckpt.pt)
    rm: str = ""  # reward model, and critic at the start ("" = out/rm/ckpt.pt)
    data: str = ""  # JSON or JSONL with prompts ("" = tasks of the town)
    # rollouts
    iterations: int = 26  # rounds of sampling, scoring and updating
    rollouts: int = 128  # replies sampled per iteration
    temperature: float = 1.0  # of sampling, and so of every log-probability
    max_new_tokens: int = 48  # longest reply; without an end by then it gets no_end_score
    no_end_score: float = -2.0  # score of a reply without end, in SD of SFT samples
    # reward
    reward: str = "rm"  # rm; gold (of the town, to see what PPO could do); exact (final answers)
    beta: float = 0.15  # KL coefficient, the one to start from if target_kl is given
    target_kl: float = 0.0  # nats per reply that beta is adapted to (0 = beta stays fixed)
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE: 1 trusts the rewards that followed, 0 the critic
    # updates
    epochs: int = 2  # passes over the rollouts of an iteration
    minibatch: int = 64  # replies per optimizer step
    microbatch: int = 16  # replies per forward pass; gradients add up to the minibatch
    clip: float = 0.2  # eps of the ratio
    value_clip: float = 0.2  # eps of the values
    lr: float = 3e-4  # peak learning rate of the policy
    critic_lr: float = 1e-3  # peak learning rate of the critic
    warmup: int = 2  # iterations until the peak
    grad_clip: float = 1.0  # largest norm of either gradient (0 = any)
    # run
    seed: int = 0  # everything random follows from it
    eval_every: int = 10  # iterations between greedy evaluations on held-out prompts
    save_every: int = 10  # iterations between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    bf16: bool = False  # multiply matrices in bfloat16 (weights stay float32); for GPUs
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs; this one writes to out/ppo
    resume: bool = False  # go on with an interrupted run
    check: bool = False  # compare the curves with those of right runs, in data/expected/


# ---------------------------------------------------------------------------------------------
# The mathematics. Column t of every (B, T - 1) tensor below is about tokens[:, t + 1]: its
# log-probability, its reward, and the value of the state just before it.


def response_logprobs(hidden, head, tokens, mask, temperature):
    """Log-probability of every response token given all before it, and the policy's entropy there.

    hidden (B, T - 1, C) = model(tokens[:, :-1]) and head (V, C) are the policy's; tokens (B, T)
    int64; mask (B, T - 1) bool: which tokens[:, 1:] belong to the response. Returns (logprobs,
    entropy), both (B, T - 1) in nats, 0 outside the mask. Old, new and reference policy all go
    through here: two functions that differ in the last digit would make the ratio lie.
    """
    target = tokens[:, 1:].masked_fill(~mask, -100)
    logprobs, entropy = linear_logprobs(
        hidden.flatten(0, 1),
        head,
        target.flatten(),
        temperature=temperature,
        return_entropy=True,
        ignore_index=-100,
    )
    return logprobs.view_as(target), entropy.view_as(target)


def exact_kl(hidden, head, ref_hidden, ref_head, mask, temperature):
    """KL(policy || ref) per response, summed over all the vocabulary at each of its tokens: (B,).

    What log pi - log pi_ref of the sampled tokens estimates. For the log only: it needs all logits.
    """
    hidden, ref_hidden = hidden[mask].to(head.dtype), ref_hidden[mask].to(head.dtype)  # (N, C)
    logp = (hidden @ head.T / temperature).float().log_softmax(-1)  # (N, V)
    logref = (ref_hidden @ ref_head.T / temperature).float().log_softmax(-1)
    kl = mask.new_zeros(mask.shape, dtype=torch.float32)
    kl[mask] = (logp.exp() * (logp - logref)).sum(-1)
    return kl.sum(1)


def masked_mean(x, mask):
    """Mean of x where mask is true."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """x shifted and scaled to mean 0 and variance 1 over the mask; 0 outside it."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """R_t (B, T - 1): the KL penalty at every response token, and at the last the score (B,).

    log pi - log pi_ref of the sampled token is an unbiased estimate of the KL there (k1 in
    http://joschu.net/blog/kl-approx.html). It may be negative; cutting it off at 0 would bias it.
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # (B,)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def k3(log_ratio):
    """Estimates of KL(p || q) from log p - log q of tokens that p sampled, any shape.

    Unbiased like log_ratio itself (k1), and never negative (k3 in the same note). Less noisy than
    k1 while p and q are close; later one token that p has made rare counts q / p, and the mean
    jumps.
    """
    return torch.expm1(-log_ratio) + log_ratio


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation: all (B, T - 1) -> advantages, returns; 0 outside the mask.

    Nothing follows the last token: its next value is 0. The returns, which the critic learns, are
    A + V before A is whitened.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros(len(rewards), device=rewards.device)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, clip):
    """Clipped surrogate per token, and the ratio; all (B, T - 1).

    The maximum of two losses: a token whose ratio has left [1 - clip, 1 + clip] in the direction
    its advantage asked for gets no gradient; one that left in the wrong direction is pulled back.
    """
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return loss, ratio


def value_loss(values, old_values, returns, clip):
    """Half the squared error per token (B, T - 1), of the free or the clipped value if larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


class KLCoefficient:
    """beta: fixed, or adapted so that the KL per reply nears a target (Ziegler 2019, sec. 2.2)."""

    def __init__(self, beta, target, horizon=10_000):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl, n_replies):
        """After n_replies more, at this mean KL per reply: beta grows if it is above the target."""
        if self.target:
            error = max(-0.2, min(kl / self.target - 1, 0.2))
            self.beta *= 1 + error * n_replies / self.horizon

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


# ---------------------------------------------------------------------------------------------
# The stage


def main(cfg: Config) -> dict:
    """Train, and return the last row of the log."""
    run = Run("ppo", cfg)
    run.panels = {
        "reward, SD of SFT samples": ["proxy", "gold"],
        "KL from SFT, nats per reply": ["kl", "kl_k3", "kl_exact"],
        "entropy, nats per token": ["entropy"],
        "explained variance of the returns": ["explained_variance"],
        "shares; approx_kl in nats": ["clipfrac", "approx_kl", "no_end"],
    }
    device = pick_device(cfg.device)
    if cfg.temperature == 0:
        raise SystemExit("--temperature 0: PPO learns from samples, and greedy replies are none")

    # ---- models: two that learn, two that stay as they are
    init, rm_path = cfg.init or f"{cfg.out}/sft/ckpt.pt", cfg.rm or f"{cfg.out}/rm/ckpt.pt"
    policy, checkpoint = load_model(init, device)
    ref, _ = load_model(init, device)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    if cfg.reward == "rm":
        reward_model, rm_checkpoint = load_model(rm_path, device, ScalarModel)
        critic, _ = load_model(rm_path, device, ScalarModel)
        if rm_checkpoint["tokenizer"] != checkpoint["tokenizer"]:
            raise SystemExit(f"{rm_path} has another tokenizer than {init}")
        reward_model.requires_grad_(False)
    elif cfg.reward == ("exact" if cfg.data else "gold"):
        critic = ScalarModel.from_gpt(policy).to(device)
    else:
        raise SystemExit(
            f"--reward {cfg.reward}: there are rm, gold (without --data) and exact (with it)"
        )
    ref.requires_grad_(False)
    # On a GPU all tensors are updated by one kernel; on a CPU that would save 1 % of an iteration.
    adamw = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=device.type == "cuda")
    optimizers = {
        "policy_optimizer": torch.optim.AdamW(policy.parameters(), lr=cfg.lr, **adamw),
        "critic_optimizer": torch.optim.AdamW(critic.parameters(), lr=cfg.critic_lr, **adamw),
    }
    kl_coefficient = KLCoefficient(cfg.beta, cfg.target_kl)
    set_speed(cfg, policy, ref, critic, *([reward_model] if cfg.reward == "rm" else []))
    # How far equal log-probabilities may be apart. The town's are within 1e-6, but GPT-2's logits
    # lie near -80, where float32 has fewer digits after the point.
    rounding = 1.0 if cfg.bf16 else 1e-2

    # ---- prompts
    if cfg.data:
        rows, test_rows = held_out(read_prompts(cfg.data))
    else:
        tasks = draw_tasks(cfg.iterations * cfg.rollouts, f"ppo {cfg.seed}")
        rows, test_rows = town_rows(tasks), town_rows(draw_tasks(150, "ppo", split="test"))
    room = policy.config.context - cfg.max_new_tokens
    for row in rows + test_rows:
        row["ids"] = encode_prompt(tokenizer, row["messages"])
    what = "the context minus max_new_tokens,"
    rows = keep_fitting(rows, [len(row["ids"]) for row in rows], room, what)
    test_rows = keep_fitting(test_rows, [len(row["ids"]) for row in test_rows], room, what)
    for row in rows + test_rows:
        if cfg.reward == "exact" and not row.get("answer"):
            raise SystemExit(f"{row['where']}: --reward exact needs a reply to compare with")

    def score(rows, replies):
        """The reward of replies (B,), and the score that PPO uses (B,): no end, no credit."""
        pairs = list(zip(rows, replies))
        if cfg.reward == "rm":
            sequences = [row["ids"] + reply.ids for row, reply in pairs]
            proxy = score_sequences(reward_model, sequences, tokenizer.pad)
        elif cfg.reward == "gold":
            proxy = [gold(row["task"], reply.text, reply.ended) for row, reply in pairs]
        else:
            proxy = [
                final_answer(reply.text) == final_answer(row["answer"]) for row, reply in pairs
            ]
        proxy = torch.tensor(np.asarray(proxy, dtype=np.float32))
        # Replaced, not reduced: if a long reply could earn more than the fine, it would.
        ended = torch.tensor([reply.ended for reply in replies])
        return proxy.to(device), torch.where(ended, proxy, cfg.no_end_score).to(device)

    def mean_gold(rows, replies):
        """The mean gold reward, as columns for the log; none where there is no gold."""
        if "task" not in rows[0]:
            return {}
        golds = [gold(row["task"], r.text, r.ended) for row, r in zip(rows, replies)]
        return {"gold": np.mean(golds)}

    # ---- training
    for iteration in run.steps(
        cfg.iterations,
        policy,
        tokenizer,
        critic=critic,
        kl_coefficient=kl_coefficient,
        **optimizers,
    ):
        rng = np.random.default_rng([cfg.seed, iteration])

        # 1. Roll out: the policy answers, and every model reads the answers.
        batch = [rows[i] for i in rng.choice(len(rows), cfg.rollouts, cfg.rollouts > len(rows))]
        ids, seed = [row["ids"] for row in my_share(batch)], int(rng.integers(2**31)) + RANK
        replies = gather(
            sample_replies(policy, tokenizer, ids, cfg.max_new_tokens, seed, cfg.temperature)
        )
        # From here on sorted by length, so that neighbours can share a forward pass with few pads.
        pairs = sorted(zip(batch, replies), key=lambda pair: len(pair[0]["ids"]) + len(pair[1].ids))
        batch, replies = zip(*pairs)
        prompts = [row["ids"] for row in batch]
        sequences = [prompt + reply.ids for prompt, reply in zip(prompts, replies)]
        ends = [len(ids) for ids in sequences]  # where each row ends
        tokens = pad(sequences, tokenizer.pad).to(device)  # (B, T)
        chosen = [[0] * (len(p) - 1) + [1] * len(r.ids) for p, r in zip(prompts, replies)]
        mask = pad(chosen, 0).bool().to(device)  # (B, T - 1): the tokens[:, 1:] the policy chose
        proxy, scores = score(batch, replies)  # (B,)

        old_logprobs, ref_logprobs, old_values, entropy = torch.zeros(4, *mask.shape, device=device)
        kl_exact = torch.zeros(len(batch), device=device)
        with torch.no_grad():
            for start in range(0, len(batch), cfg.microbatch)[RANK::WORLD]:
                part = slice(start, start + cfg.microbatch)
                end = max(ends[part])
                here = part, slice(end - 1)
                ids, m, T = tokens[part, :end], mask[here], cfg.temperature
                hidden, ref_hidden = policy(ids[:, :-1]), ref(ids[:, :-1])
                old_logprobs[here], entropy[here] = response_logprobs(
                    hidden, policy.head, ids, m, T
                )
                ref_logprobs[here], _ = response_logprobs(ref_hidden, ref.head, ids, m, T)
                kl_exact[part] = exact_kl(hidden, policy.head, ref_hidden, ref.head, m, T)
                old_values[here] = critic(ids[:, :-1])
        sum_over_ranks(old_logprobs, ref_logprobs, old_values, entropy, kl_exact)

        # 2. Rewards and advantages.
        log_ratio = (old_logprobs - ref_logprobs) * mask
        kl = log_ratio.sum(1)  # (B,): k1, summed over the reply
        kl_k3 = k3(log_ratio).sum(1)
        if iteration == 0:
            assert kl_exact.abs().max() < rounding, "policy and reference start as the same model"
        beta = kl_coefficient.beta
        rewards = token_rewards(scores, old_logprobs, ref_logprobs, mask, beta)
        advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)
        unexplained = (returns - old_values)[mask].var() / returns[mask].var()
        advantages = whiten(advantages, mask)

        # 3. Update policy and critic on these rollouts.
        measured = []  # per step: policy loss, value loss, KL, clipfrac, two gradient norms
        ratio_errors = torch.zeros(len(batch), device=device)
        for epoch in range(cfg.epochs):
            order = rng.permutation(len(batch))
            for first in range(0, len(batch), cfg.minibatch):
                minibatch = np.sort(order[first : first + cfg.minibatch])  # sorted by length again
                n_tokens = mask[minibatch].sum() / WORLD  # since gradients are averaged over ranks
                numbers = torch.zeros(4)
                for start in range(0, len(minibatch), cfg.microbatch)[RANK::WORLD]:
                    part = minibatch[start : start + cfg.microbatch]
                    end = ends[part[-1]]
                    here = part, slice(end - 1)  # these rows, without the columns that only pad
                    ids, m = tokens[part, :end], mask[here]
                    hidden = policy(ids[:, :-1])
                    logprobs, _ = response_logprobs(hidden, policy.head, ids, m, cfg.temperature)
                    pg, ratio = policy_loss(
                        logprobs, old_logprobs[here], advantages[here], cfg.clip
                    )
                    values = critic(ids[:, :-1])
                    vf = value_loss(values, old_values[here], returns[here], cfg.value_clip)
                    # Every token of the minibatch counts the same, whatever the reply it is in.
                    ((pg * m).sum() / n_tokens).backward()
                    ((vf * m).sum() / n_tokens).backward()

                    with torch.no_grad():
                        off = (ratio - 1).abs() * m
                        if epoch == 0 and first == 0:
                            ratio_errors[part] = off.amax(1)
                        approx_kl = k3(old_logprobs[here] - logprobs)  # of old policy to new
                        for i, x in enumerate((pg, vf, approx_kl, (off > cfg.clip).float())):
                            numbers[i] += ((x * m).sum() / n_tokens).cpu()
                if epoch == 0 and first == 0:
                    sum_over_ranks(ratio_errors)
                    worst = ratio_errors.max().item()
                    assert worst < rounding, f"a ratio is off by {worst} before any update"
                norms = [average_gradients(model, cfg.grad_clip) for model in (policy, critic)]
                measured.append([*numbers.tolist(), *norms])
                step_optimizers(
                    optimizers.values(), lr_at(iteration, cfg.iterations, cfg.warmup, 0.1)
                )

        # 4. Report.
        names = ("policy_loss", "value_loss", "approx_kl", "clipfrac")
        *losses, policy_norm, critic_norm = np.mean(measured, 0)
        run.log(
            iteration,
            proxy=proxy.mean().item(),
            **mean_gold(batch, replies),
            kl=kl.mean().item(),
            kl_k3=kl_k3.mean().item(),
            kl_exact=kl_exact.mean().item(),
            beta=beta,
            objective=(scores - beta * kl).mean().item(),
            entropy=masked_mean(entropy, mask).item(),
            length=mask.sum(1).float().mean().item(),
            no_end=np.mean([not reply.ended for reply in replies]),
            **mean_over_ranks(device, **dict(zip(names, losses))),
            explained_variance=1 - unexplained.item(),
            first_ratio_error=ratio_errors.max().item(),
            policy_grad_norm=policy_norm,
            critic_grad_norm=critic_norm,
        )
        kl_coefficient.update(kl.mean().item(), len(batch))
        n = sum(ends)
        smaller = critic.config.n_layer / policy.config.n_layer  # so is the reward model
        # sampling, old, ref; reward, value; then forward 1 + backward 2 for each
        run.forwards += n * (3 + 2 * smaller + cfg.epochs * 3 * (1 + smaller))

        if (iteration + 1) % cfg.eval_every == 0 or iteration + 1 == cfg.iterations:
            prompts = [row["ids"] for row in test_rows]
            replies = sample_replies(policy, tokenizer, prompts, cfg.max_new_tokens, 0, 0.0)
            proxy, _ = score(test_rows, replies)
            greedy = {"proxy": proxy.mean().item(), **mean_gold(test_rows, replies)}
            run.log(iteration, **{f"greedy_{name}": value for name, value in greedy.items()})
            names = [
                name for name in ("proxy", "gold", "kl", "length", "no_end") if name in run.rows[-1]
            ]
            run.say(
                f"iteration {iteration + 1:3d}  "
                + "  ".join(f"{name.replace('_', ' ')} {run.rows[-1][name]:.2f}" for name in names)
                + "  held out, greedy: "
                + "  ".join(f"{name} {value:.2f}" for name, value in greedy.items())
                + f"  {run.elapsed():.0f} s\n    > {test_rows[0]['messages'][-1]['content']}"
                + f"\n    {replies[0].text}"
            )

    # ---- results
    start, _ = load_model(init, device)
    for now, then in zip(ref.parameters(), start.parameters()):
        assert torch.equal(now, then), "the reference must not move"
    if cfg.data:
        shown = [row["messages"] for row in test_rows[:8]]
    else:
        shown = [question(text) for text in SHOWN]
    samples = transcript(policy, tokenizer, shown, cfg.max_new_tokens, cfg.seed)
    print(samples)
    run.finish(policy, samples)
    return run.rows[-1]


def final_answer(text: str) -> str:
    """What follows the last "####" (as in GSM8K), or all of it; 1,000 and $1000. are 1000."""
    return text.split("####")[-1].strip().replace(",", "").strip("$. ")


def town_rows(tasks) -> list[dict]:
    """Tasks of the town in the form that data/files.py gives to rows of a file."""
    return [
        {"messages": question(task.prompt), "task": task, "where": f"task {i}"}
        for i, task in enumerate(tasks)
    ]


if __name__ == "__main__":
    run_script(main, Config)
