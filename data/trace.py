"""A look inside one reply: what PPO, DPO and the reward model see of every single token.

    python gpt.py --trace "What is 4-2 and 3-1?"         tables on the screen, and out/trace.png

A response of the PPO policy, and two of the SFT model, are taken apart by the very functions with
which the scripts train:

    PPO            log pi and log pi_ref of every token, their ratio, the KL penalty, the reward R
                   (penalty and, at the last token, the reward model's score), the value V, the
                   advantage A. A run keeps its policy only, so V is that of the critic as it
                   begins: the reward model, read at every token
    DPO            beta log(pi / pi_ref) of every token of the two responses: the implicit reward
    reward model   its score after every token of the two; only the last one of each is trained

Of the two, the one that the reward model likes better stands for the one that annotators chose.
"""

import itertools
from pathlib import Path

import torch

from data.chat import encode_prompt, question, sample_replies
from data.run import COLOURS
from data.tokenizer import load_tokenizer
from gpt import GPT, InputError, ScalarModel, load_model
from train_dpo import Config as DPOConfig
from train_dpo import dpo_loss, dpo_margin
from train_ppo import Config as PPOConfig
from train_ppo import gae, kl_estimate, predictions, response_logprobs, token_rewards
from train_rm import last_token_scores, preference_loss


def logprobs_of(model: GPT, inputs, targets, mask, temperature=1.0) -> torch.Tensor:
    """log p of every token of a response given all before it, (B, T); 0 outside the mask."""
    return response_logprobs(model(inputs), model.head, targets, mask, temperature)[0]


@torch.no_grad()
def inside_ppo(policy, ref, reward_model, rows, replies, cfg: PPOConfig, pad: int) -> dict:
    """What PPO computes of every token of replies, for one step: name -> (B, T).

    rows: with the "ids" of the prompts. The arguments are those of train_ppo.py.
    """
    inputs, targets, mask = predictions(rows, replies, pad, reward_model.reward_mean.device)
    logprobs, ref_logprobs = (
        logprobs_of(model, inputs, targets, mask, cfg.temperature) for model in (policy, ref)
    )
    sequences = [row["ids"] + reply.ids for row, reply in zip(rows, replies)]
    scores = last_token_scores(reward_model, sequences, pad)
    ended = torch.tensor([reply.ended for reply in replies], device=scores.device)
    scores = scores.where(ended, cfg.no_end_score)
    estimate, place = cfg.kl.split("-")
    beta = cfg.beta if place == "reward" else 0.0
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, beta, estimate)
    values = reward_model(inputs)  # (B, T): before token t + 1 is chosen
    advantages, _ = gae(rewards, values, mask, cfg.gamma, cfg.lam)
    return {
        "log pi": logprobs,
        "log pi_ref": ref_logprobs,
        "pi / pi_ref": (logprobs - ref_logprobs).exp(),
        "penalty": -beta * kl_estimate(logprobs - ref_logprobs, estimate),
        "reward R": rewards,
        "value V": values * mask,
        "advantage A": advantages,
        "mask": mask,
    }


@torch.no_grad()
def inside_pair(policy, ref, reward_model, rows, replies, cfg: DPOConfig, pad: int) -> dict:
    """What DPO and the reward model make of a chosen and a rejected reply: name -> (2, T).

    And "margin", "dpo_loss" and "rm_loss", which are numbers.
    """
    inputs, targets, mask = predictions(rows, replies, pad, reward_model.reward_mean.device)
    logprobs, ref_logprobs = (logprobs_of(model, inputs, targets, mask) for model in (policy, ref))
    sums = logprobs.sum(1, keepdim=True), ref_logprobs.sum(1, keepdim=True)  # (2, 1): one pair
    lengths = mask.sum(1, keepdim=True)
    tokens = torch.cat([inputs, targets[:, -1:]], 1)  # (2, T + 1)
    sequences = [row["ids"] + reply.ids for row, reply in zip(rows, replies)]
    scores = last_token_scores(reward_model, sequences, pad)  # (2,)
    return {
        "implicit reward": cfg.beta * (logprobs - ref_logprobs),
        "score so far": reward_model(tokens)[:, 1:] * mask,  # after token t + 1 has been read
        "mask": mask,
        "margin": dpo_margin(*sums, lengths, cfg).item(),
        "dpo_loss": dpo_loss(*sums, lengths, cfg).item(),
        "rm_loss": preference_loss(scores[:1], scores[1:]).item(),
    }


# ---------------------------------------------------------------------------------------------
# Presentation


def tokens_of(tokenizer, reply) -> list[str]:
    """What each token adds to the text of a reply, blanks visible: "12", "-", "5", "·is"."""
    so_far = [tokenizer.show(reply.ids[:n]) for n in range(len(reply.ids) + 1)]
    added = [after[len(before) :] for before, after in zip(so_far, so_far[1:])]
    return [text.replace(" ", "·").replace("\n", "\\n") or "·" for text in added]


def table(tokens: list[str], columns: dict[str, list[float]]) -> list[str]:
    """A line of names, then one for every token, with a number in each column."""
    lines = [f"{'token':12}" + "".join(f"  {name:>10}" for name in columns)]
    for i, token in enumerate(tokens):
        numbers = (f"  {values[i]:{max(len(name), 10)}.3f}" for name, values in columns.items())
        lines.append(f"{token:12}" + "".join(numbers))
    return lines


def draw(path: Path, panels: list[tuple[str, list[str], dict[str, list[float]]]]):
    """A PNG with a panel for each of (title, tokens, name -> a number for every token).

    "reward R" and "implicit reward" are bars, since they are earned at a token; all else are lines.
    """
    from matplotlib.figure import Figure  # takes half a second, so not before it is needed

    figure = Figure(figsize=(13, 3 * len(panels)))
    for axis, (title, tokens, curves) in zip(figure.subplots(len(panels)), panels):
        for colour, (name, values) in zip(COLOURS, curves.items()):
            if "reward" in name:
                axis.bar(range(len(tokens)), values, color=colour, alpha=0.5, label=name)
            else:
                axis.plot(range(len(tokens)), values, "o-", color=colour, label=name)
        unit = "SD of SFT samples\n(implicit reward: logits)"
        axis.set(ylabel=unit, xlim=(-0.6, len(tokens) - 0.4))
        axis.set_title(title, parse_math=False)  # "$5" in a response is no formula
        ticks = dict(rotation=60, ha="right", fontsize=8, parse_math=False)
        axis.set_xticks(range(len(tokens)), tokens, **ticks)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def options_of(kind, checkpoint: dict, stage: str):
    """The options with which a run was started; raises InputError if they are none of today's."""
    try:
        return kind(**checkpoint["train_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{stage} was trained by another version of train_{stage}.py: {error}")


def load_stages(out: Path, device) -> dict[str, tuple[GPT | ScalarModel, dict]]:
    """stage -> its model and checkpoint. Raises InputError if one is missing, or reads otherwise
    than the SFT model does."""
    loaded = {}
    for stage in ("sft", "rm", "ppo", "dpo"):
        path = out / stage / "ckpt.pt"
        if not path.exists():
            raise InputError(f"--trace needs {path}: run `python train_{stage}.py` first")
        loaded[stage] = load_model(path, device, ScalarModel if stage == "rm" else GPT)
        (model, made), (sft, of_sft) = loaded[stage], loaded["sft"]
        if made["tokenizer"] != of_sft["tokenizer"] or made["stage"] != stage:
            raise InputError(
                f"{path} has another tokenizer or stage than it should: train it again"
            )
        if model.config.context < sft.config.context:
            raise InputError(f"{path} has a smaller context than {out}/sft: train it again")
        if stage != "sft" and made.get("made_from", {}).get("init") != of_sft["fingerprint"]:
            print(f"note: {path} was trained from another model than {out}/sft has now")
    return loaded


def trace(prompt: str, out: Path, max_new_tokens: int, seed: int, device):
    """Print the tables of a prompt, and draw them to out/trace.png."""
    loaded = load_stages(out, device)
    (ref, of_sft), (reward_model, _), (ppo, of_ppo), (dpo, of_dpo) = loaded.values()
    ppo_cfg, dpo_cfg = options_of(PPOConfig, of_ppo, "ppo"), options_of(DPOConfig, of_dpo, "dpo")
    if (ppo_cfg.reward, ppo_cfg.advantage) != ("rm", "gae"):
        print("note: this policy was not trained so: the tables show a reward model and a critic\n")
    tokenizer = load_tokenizer(of_sft["tokenizer"])
    row = {"ids": encode_prompt(tokenizer, question(prompt))}

    def ask(model, n, temperature):
        how = dict(max_new_tokens=max_new_tokens, seed=seed, temperature=temperature)
        return sample_replies(model, tokenizer, [row["ids"]] * n, **how)

    def of_response(values, reply, i=0):
        return values[i, len(row["ids"]) - 1 :][: len(reply.ids)].tolist()

    # ---- PPO: a response of the policy
    (said,) = ask(ppo, 1, ppo_cfg.temperature)
    found = inside_ppo(ppo, ref, reward_model, [row], [said], ppo_cfg, tokenizer.pad)
    shape = tuple(found.pop("mask").shape)
    columns = {name: of_response(values, said) for name, values in found.items()}
    score = columns["reward R"][-1] - columns["penalty"][-1]
    print(
        f"> {prompt}\n\nPPO (beta {ppo_cfg.beta}) says: {said.text}\n"
        f"All tensors are (B, T) = {shape}: {len(row['ids'])} tokens of the prompt and "
        f"{len(said.ids)} of the response, of which the last is not read, only predicted.\n"
    )
    print("\n".join(table(tokens_of(tokenizer, said), columns)))
    print(f"\nThe score of the response, {score:.3f}, arrives at the last token; GAE spreads it.\n")
    curves = {name: columns[name] for name in ("reward R", "value V", "advantage A")}
    panels = [(f"PPO: {said.text}", tokens_of(tokenizer, said), curves)]

    # ---- DPO and the reward model: two responses of the SFT model
    pair = ask(ref, 2, 1.0)
    sequences = [row["ids"] + reply.ids for reply in pair]
    first, second = last_token_scores(reward_model, sequences, tokenizer.pad).tolist()
    pair = pair if first >= second else pair[::-1]
    found = inside_pair(dpo, ref, reward_model, [row] * 2, pair, dpo_cfg, tokenizer.pad)
    tables, rewards, scores = [], [], []
    for i, (name, reply) in enumerate(zip(("chosen", "rejected"), pair)):
        print(f"{name}: {reply.text}")
        columns = {k: of_response(found[k], reply, i) for k in ("implicit reward", "score so far")}
        tables.append(table(tokens_of(tokenizer, reply), columns))
        panels.append((f"{name}: {reply.text}", tokens_of(tokenizer, reply), columns))
        rewards.append(sum(columns["implicit reward"]))
        scores.append(columns["score so far"][-1])
    print("\nchosen, and beside it rejected:")
    for left, right in itertools.zip_longest(*tables, fillvalue=""):
        print(f"{left:50}{right}".rstrip())
    print(
        f"\nDPO: implicit rewards {rewards[0]:.3f} and {rewards[1]:.3f}, "
        f"margin {found['margin']:.3f}, loss {found['dpo_loss']:.3f}\n"
        f"reward model: scores {scores[0]:.3f} and {scores[1]:.3f}, loss {found['rm_loss']:.3f}"
    )
    draw(out / "trace.png", panels)
    print(f"a picture of it is in {out}/trace.png")
