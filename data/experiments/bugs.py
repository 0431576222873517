"""Bugs that are planted on purpose: a copy of the project with one piece of one file changed.

The experiment `broken` trains PPO with those of train_ppo.py, --check must notice one in every
stage (tests/test_expected.py), and tests/mutants.py has them among many more.

Nothing of the project is imported here at the top: whoever plants a bug may want to import the copy
afterwards, and Python would give it the modules that are loaded already.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Of the top level; whatever else lies there, a teacher's notes say, is not copied.
TOP = ("README.md", "requirements.txt", "gpt.py", "kernels.py")
TOP += tuple(f"train_{stage}.py" for stage in ("pretrain", "sft", "rm", "ppo", "dpo"))


class Bug(NamedTuple):
    """A mistake in one place."""

    file: str
    right: str  # a piece of the file, which must occur in it exactly once
    wrong: str  # what stands there instead
    symptom: str  # what somebody would notice, sooner or later
    seen_in: str  # repositories in which a bug of this kind has been, or "common"
    test: str  # the test that must fail: file::name, in tests/


BUGS = {
    # ---- PPO
    "KL penalty with the wrong sign": Bug(
        "train_ppo.py",
        "rewards = -beta * kl_estimate(",
        "rewards = beta * kl_estimate(",
        "KL explodes, the faster the larger beta is.",
        "rlhf-book (loss.py:23): the sign of k1",
        "test_ppo.py::test_rewards_add_up_to_score_minus_beta_times_kl",
    ),
    # The KL that is penalised, and logged, is that of the policy from itself, 0. So this is a run
    # without a penalty, and looks like one in all curves but that of KL.
    "policy as its own reference": Bug(
        "train_ppo.py",
        "ref_hidden, ref.head, y, m",
        "hidden, policy.head, y, m",
        "KL in the log stays 0, whatever beta is, and the responses run away.",
        "common: the reference is the policy under another name",
        "test_scripts.py::test_policy_leaves_its_reference",
    ),
    "score at the first token": Bug(
        "train_ppo.py",
        "device=mask.device)).argmax(1)",
        "device=mask.device)).sign().argmax(1)",
        "Hardly anything is learned: what the last tokens did is paid before they were chosen.",
        "common: argmax of a mask is its first 1",
        "test_ppo.py::test_score_stands_on_the_last_token_of_the_response",
    ),
    "score at every token": Bug(
        "train_ppo.py",
        "[torch.arange(len(rewards)), last] += scores",
        " += scores[:, None] * mask",
        "Responses grow longer and longer: every token earns.",
        "common: a score that is broadcast over the tokens",
        "test_ppo.py::test_score_stands_on_the_last_token_of_the_response",
    ),
    # ---- the other stages
    "a position sees what follows": Bug(
        "gpt.py",
        "is_causal=mask is None)",
        "is_causal=False)",
        "The training loss falls to almost nothing within minutes, and samples are nonsense.",
        "common",
        "test_gpt.py::test_future_tokens_do_not_change_past_hidden_states",
    ),
    "prompts in the loss of SFT": Bug(
        "data/chat.py",
        "add([tokenizer.user] + tokenizer.encode(system + text), 0)",
        "add([tokenizer.user] + tokenizer.encode(system + text), 1)",
        "The loss looks low, and the model likes to ask questions.",
        "nanochat (#20), verl (#3287)",
        "test_chat.py::test_just_the_replies_and_their_ends_are_supervised",
    ),
    "the reward model prefers rejected responses": Bug(
        "train_rm.py",
        "-F.logsigmoid(chosen_scores - rejected_scores).mean()",
        "-F.logsigmoid(rejected_scores - chosen_scores).mean()",
        "Held-out accuracy is well below one half.",
        "common",
        "test_losses.py::test_preference_loss_is_bradley_terry",
    ),
    "means instead of sums under DPO": Bug(
        "train_dpo.py",
        "return logprobs.view_as(target).sum(1)",
        "return logprobs.view_as(target).sum(1) / mask.sum(1)",
        "Margins are tiny and the loss stays near ln 2, since beta is divided by the length.",
        "LLMs-from-scratch (dpo notebook): means under DPO's equation 7",
        "test_losses.py::test_sequence_logprob_is_the_sum_over_the_reply",
    ),
}


def plant(bug: Bug, where: Path):
    """Copy the project to a folder, without what runs have left in it, and with this bug.

    Files that are there already are replaced. Raises InputError unless the right piece occurs
    exactly once in its file.
    """
    for name in ("data", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, where / name, ignore=ignored, dirs_exist_ok=True)
    for name in TOP:
        shutil.copy(ROOT / name, where)
    text = (where / bug.file).read_text("utf-8")
    if text.count(bug.right) != 1:
        from gpt import InputError

        raise InputError(
            f"{bug.file} has {text.count(bug.right)} times what a bug replaces: {bug.right}"
        )
    (where / bug.file).write_text(text.replace(bug.right, bug.wrong), "utf-8")
