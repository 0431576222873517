"""The exercises of the course: what a student writes, and how it is graded.

This is the one place to add an exercise: append an `Exercise` to EXERCISES. It names a function of
the project; tests/course.py blanks it in the students' copy, and tests/grading.py puts a student's
version of it in place of the project's. Nothing in this file is handed out but tests and hints.

    tests     tests of this folder that the students have, each with its weight and a hint
    cases     calls of the function, the smallest first. Those of a public seed are for feedback:
              the first that differs from the project's own function is shown with both results.
              Those of a secret seed are the hidden tests
    mistakes  typical wrong answers: a sentence about each, and changes of the right one. A hand-in
              that returns in all public cases what such a change returns gets the sentence. The
              mutants of tests/mutants.py that lie inside the function are added, with their
              symptoms, so they need no entry here
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import data.chat
import data.run
import data.tokenizer
import gpt
import kernels
import train_dpo
import train_ppo
import train_rm
import train_sft
from data.tokenizer import CharTokenizer

HIDDEN = 0.4  # the part of an exercise's points that hidden tests give


@dataclass
class Exercise:
    """One function to write."""

    name: str
    week: int
    file: str
    function: str  # its name, or Class.method
    points: int
    minutes: int  # of work for a student: our estimate
    equation: str  # for the handout
    tests: dict[str, tuple[int, str]]  # file::test in tests/ -> (weight, hint)
    cases: Callable  # torch.Generator -> pairs (the call as text, a function that makes it)
    questions: list[str]  # to be answered in writing: a line, and below it the key
    mistakes: dict[str, list] = field(default_factory=dict)  # sentence -> [{right: wrong}, ...]
    keep: int = 0  # statements of the body, after the docstring, that students are given


# ---------------------------------------------------------------------------------------------
# Cases. Numbers have one digit after the point, so that a student can try them by hand.


def draw(rng, *shape):
    """Normal numbers with one digit, float64."""
    return (10 * torch.randn(*shape, generator=rng, dtype=torch.float64)).round() / 10


def integers(rng, low, high, *shape):
    return torch.randint(low, high, shape, generator=rng)


def pick(rng, *choices):
    return choices[int(integers(rng, 0, len(choices), 1))]


def responses(rng, B, T):
    """A mask (B, T) whose rows are one stretch each: the tokens of a response."""
    start = integers(rng, 0, T, B, 1)
    end = start + 1 + (torch.rand(B, 1, generator=rng) * (T - start)).long()
    column = torch.arange(T)
    return (start <= column) & (column < end)


def shown(value) -> str:
    """A value as a student would type it; large tensors by their shape alone."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 24:
            return f"(a tensor {tuple(value.shape)})"
        value = (value.int() if value.dtype == torch.bool else value).tolist()
    return re.sub(r"\d+\.\d{5,}", lambda digits: f"{float(digits[0]):.4g}", repr(value))


def call(module, function, **arguments):
    """One case: f(x=...) as text, and what calls it. The function is looked up when it is called,
    since by then it may be a student's."""
    text = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())

    def run():
        owner = module
        for name in function.split("."):
            owner = getattr(owner, name)
        return owner(*arguments.values())

    return f"{function}({text})", run


def tiny(rng, n_layer=1, context=16):
    """A GPT of width 8 with two heads and a vocabulary of 11, in float64."""
    model = gpt.GPT(gpt.GPTConfig(11, context, n_layer, n_head=2, n_embd=8)).double()
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    return model


def train_bpe(rng):
    yield call(data.tokenizer, "train_bpe", text=" aa aa", n_vocab=256 + 1 + 5)
    yield call(data.tokenizer, "train_bpe", text=" low lower lowest", n_vocab=256 + 3 + 5)
    yield call(data.tokenizer, "train_bpe", text=" ab", n_vocab=300)
    for letters, n_words in (("ab", 4), ("aab", 12), ("abcd", 40), ("abé.1 ", 80)):
        words = ["".join(pick(rng, *letters) for _ in range(1 + n % 5)) for n in range(n_words)]
        yield call(data.tokenizer, "train_bpe", text=" " + " ".join(words), n_vocab=256 + 25 + 5)


def attention(rng):
    for B, T in ((1, 1), (1, 2), (2, 5), (3, 9)):
        model = tiny(rng)
        layer, x = model.h[0].attn, draw(rng, B, T, 8)
        yield f"Attention.forward of x {(B, T, 8)}", lambda layer=layer, x=x: layer(x)
    yield from with_cache(rng)


def with_cache(rng):
    """Hidden states of prompts, and then of one more token per row, at two positions each."""
    for lengths in ((1,), (3,), (2, 4), (5, 1, 3)):
        model, B, longest = tiny(rng, n_layer=2), len(lengths), max(lengths)
        prompts, more = integers(rng, 0, 11, B, longest), integers(rng, 0, 11, 2, B, 1)

        def run(model=model, lengths=lengths, prompts=prompts, more=more):
            cache = gpt.Cache(model, len(lengths), 12)
            hidden = [model(prompts, cache)]
            for step, ids in enumerate(more):
                hidden.append(model(ids, cache, torch.tensor(lengths) + step))
            return hidden

        yield f"prompts of {lengths} tokens, then two more tokens each, with a cache", run


def cache_update(rng):
    for B, T, positions in ((1, 2, [2]), (2, 3, [1, 3]), (3, 4, [4, 2, 0])):
        model = tiny(rng, n_layer=2)
        prompt, token = draw(rng, 2, B, 2, T, 4), draw(rng, 2, B, 2, 1, 4)
        mask = torch.zeros(B, 1, 1, max(positions) + 1)

        def run(model=model, prompt=prompt, token=token, positions=positions, mask=mask):
            cache = gpt.Cache(model, len(positions), 6)
            first = cache.update(1, None, None, *prompt)
            then = cache.update(1, torch.tensor(positions), mask, *token)
            return *first, *then, cache.keys.clone(), cache.values.clone()

        yield f"update of {B} prompts of {T} tokens, then of a token at {positions}", run
    yield from with_cache(rng)


def sample(rng):
    """Which tokens are drawn, how often, and with which log-probabilities: not which one when, for
    there are several right ways to use a random number."""
    settings = [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}]
    settings += [{"temperature": 2.0, "top_p": 0.9}, {"top_k": 3, "temperature": 0.7}, {"top_k": 9}]
    for number, how in enumerate(settings):
        # Without ties, and with no token so rare that 4000 draws might miss it.
        logits = draw(rng, 2 + number % 4).clamp(-1, 1)
        logits = logits + torch.arange(len(logits)).double() / 100

        def run(logits=logits, how=how):
            rows = logits.float().expand(4000, -1)
            generator = torch.Generator()
            torch.manual_seed(1)
            ids, logprobs = gpt.sample(rows, generator=generator.manual_seed(5), **how)
            torch.manual_seed(2)
            again, _ = gpt.sample(rows, generator=generator.manual_seed(5), **how)
            drawn = torch.bincount(ids, minlength=len(logits))
            found = torch.zeros(len(logits)).scatter(0, ids, logprobs.float())
            expected = torch.where(drawn > 0, found.exp(), 0.0)
            return {
                "tokens that are drawn": (drawn > 0).nonzero().squeeze(1),
                "log-probability of each": found,
                "as often as that says": bool(((drawn / 4000) - expected).abs().max() < 0.04),
                "the same again with the same generator": torch.equal(ids, again),
            }

        options = "".join(f", {name}={value}" for name, value in how.items())
        yield f"sample(logits={shown(logits)}{options})", run


def lr_at(rng):
    yield call(data.run, "lr_at", step=0, steps=10, warmup=0)
    yield call(data.run, "lr_at", step=0, steps=10, warmup=2)
    for step, floor in ((1, 0.0), (2, 0.0), (5, 0.0), (9, 0.0), (5, 0.1), (10, 0.1)):
        yield call(data.run, "lr_at", step=step, steps=10, warmup=2, floor=floor)
    for _ in range(6):
        steps, warmup = int(integers(rng, 3, 90, 1)), int(integers(rng, 0, 9, 1))
        step = int(integers(rng, 0, steps + 1, 1))
        yield call(data.run, "lr_at", step=step, steps=steps, warmup=warmup, floor=0.2)
    yield call(data.run, "lr_at", step=2, steps=3, warmup=3)


def encode_chat(rng):
    """With a tokenizer of characters, whose five special ids come after those of the letters."""
    tokenizer = CharTokenizer(string.ascii_letters + "\n .?")

    def say(role):
        content = "".join(pick(rng, *"abXY. ?") for _ in range(int(integers(rng, 0, 5, 1))))
        return {"role": role, "content": content}

    turn = ["user", "assistant"]
    for roles in (turn, ["user"], ["system", *turn], turn * 2, ["system", *turn, *turn, "user"]):
        messages = [say(role) for role in roles]
        text = f"encode_chat(CharTokenizer, {messages})"
        yield text, lambda messages=messages: data.chat.encode_chat(tokenizer, messages)


def reading(module, function, masked=True):
    """Cases of a loss that reads tokens (B, T) with a model: its value, and its gradient."""

    def cases(rng):
        for B, T in ((1, 2), (1, 4), (2, 6), (3, 9)):
            model, tokens = tiny(rng), integers(rng, 0, 11, B, T)
            mask = torch.zeros(B, T, dtype=torch.bool)
            mask[:, 1:] = responses(rng, B, T - 1)

            def run(model=model, tokens=tokens, mask=mask):
                result = getattr(module, function)(model, tokens, mask)
                (gradient,) = torch.autograd.grad(result.sum(), model.ln_f.bias)
                return {"value": result, "gradient": gradient}

            text = f"{function}(model, tokens={shown(tokens)}, mask={shown(mask)})"
            yield text, run

    return cases


def preference_loss(rng):
    pairs = [([1.0], [0.0]), ([0.0, 2.0], [0.0, -1.0]), ([-1e4], [1e4]), ([1e4], [-1e4])]
    pairs = [torch.tensor(pair, dtype=torch.float64) for pair in pairs]
    for chosen, rejected in [*pairs, *(draw(rng, 2, n) for n in (1, 3, 7))]:

        def run(chosen=chosen, rejected=rejected):
            chosen = chosen.clone().requires_grad_()
            loss = train_rm.preference_loss(chosen, rejected)
            return {"loss": loss, "gradient": torch.autograd.grad(loss.sum(), chosen)[0]}

        yield f"preference_loss({shown(chosen)}, {shown(rejected)})", run


def last_token_scores(rng):
    for lengths in ((2,), (1, 3), (4, 2, 5, 1)):
        model = gpt.ScalarModel.from_gpt(tiny(rng)).double()
        model.score.weight.data = draw(rng, 1, 8)
        rows = [integers(rng, 0, 10, n).tolist() for n in lengths]
        for pad_id in (0, 10):
            text = f"last_token_scores(model, rows={rows}, pad_id={pad_id})"
            yield (
                text,
                lambda a=(model, rows, pad_id): train_rm.last_token_scores(*a),
            )


def token_rewards(rng):
    for estimate in ("k1", "k2", "k3"):
        for B, T in ((1, 1), (1, 3), (2, 4), (4, 7)):
            logprobs, ref_logprobs = -draw(rng, 2, B, T).abs()
            yield call(
                train_ppo,
                "token_rewards",
                scores=draw(rng, B),
                logprobs=logprobs,
                ref_logprobs=ref_logprobs,
                mask=responses(rng, B, T),
                beta=pick(rng, 0.1, 0.5),
                estimate=estimate,
            )


def gae(rng):
    for B, T in ((1, 1), (1, 2), (1, 4), (2, 4), (4, 7)):
        for gamma, lam in ((1.0, 0.95), (0.9, 0.5)):
            (rewards, values), mask = draw(rng, 2, B, T), responses(rng, B, T)
            if T > 1:  # the critic says something about padding, too
                mask[0], mask[0, : T - 1] = False, True
            arguments = dict(
                rewards=rewards * mask + 0.0, values=values, mask=mask, gamma=gamma, lam=lam
            )
            yield call(train_ppo, "gae", **arguments)


def policy_loss(rng):
    clip = 0.2
    for advantage, log_ratio in ((1.0, 0.0), (1.0, 0.5), (-1.0, 0.5), (1.0, -0.5), (-1.0, -0.5)):
        logprobs, old = torch.tensor([[-2.0 + log_ratio]]), torch.tensor([[-2.0]])
        advantages = torch.tensor([[advantage]])
        arguments = dict(logprobs=logprobs, old_logprobs=old, advantages=advantages, clip=clip)
        yield call(train_ppo, "policy_loss", **arguments)
    for B, T in ((1, 2), (3, 4)):
        logprobs, old, advantages = draw(rng, 3, B, T)
        arguments = dict(logprobs=-logprobs.abs(), old_logprobs=-old.abs(), advantages=advantages)
        yield call(train_ppo, "policy_loss", **arguments, clip=clip)


def group_advantages(rng):
    for how in ("rloo", "grpo", "dr_grpo"):
        for n_prompts, n in ((1, 2), (1, 4), (2, 3), (3, 4)):
            prompts = torch.arange(n_prompts).repeat_interleave(n)
            prompts = prompts[torch.randperm(len(prompts), generator=rng)]
            returns = draw(rng, len(prompts))
            yield call(train_ppo, "group_advantages", totals=returns, prompts=prompts, how=how)
    returns, prompts = torch.ones(3), torch.zeros(3)
    yield call(train_ppo, "group_advantages", totals=returns, prompts=prompts, how="grpo")


def dpo_loss(rng):
    for options in (
        {},
        {"nll": 0.5},
        {"loss": "cdpo", "label_smoothing": 0.2},
        {"loss": "ipo"},
        {"loss": "simpo", "beta": 2.0},
    ):
        for n in (1, 4):
            logprobs, ref_logprobs = -3 * draw(rng, 2, 2, n).abs()
            lengths, cfg = integers(rng, 1, 9, 2, n), train_dpo.Config(**options)
            text = f"logprobs={shown(logprobs)}, ref_logprobs={shown(ref_logprobs)}, "
            text = f"dpo_loss({text}lengths={shown(lengths)}, cfg=Config({options or ''}))"

            def run(a=(logprobs, ref_logprobs, lengths, cfg)):
                return train_dpo.dpo_loss(*a)

            yield text, run


def logit_gradients(rng):
    for n, V, temperature in ((1, 2, 1.0), (1, 3, 0.5), (4, 6, 0.7), (7, 5, 1.0)):
        hidden, weight, target = draw(rng, n, 3), draw(rng, V, 3), integers(rng, 0, V, n)
        for with_entropy in (False, True):
            g, h = draw(rng, n), draw(rng, n) if with_entropy else None
            given = hidden, weight, V, target, temperature
            statistics = torch.stack(kernels._statistics(*given, with_entropy))
            text = f"hidden={shown(hidden)}, weight={shown(weight)}, target={shown(target)}, "
            text += f"temperature={temperature}, g={shown(g)}, h={shown(h)}"

            def run(a=(*given, statistics, g, h)):
                return kernels._logit_gradients(*a)

            yield f"_logit_gradients({text})", run


# ---------------------------------------------------------------------------------------------
# The exercises, in the order of the lecture

BPE, MODEL, CHAT = "test_tokenizer.py::test_", "test_gpt.py::test_", "test_chat.py::test_"
# Pieces of dpo_loss, and what a student writes who has read no farther than equation 7.
MARGIN = "dpo_margin(logprobs, ref_logprobs, lengths, cfg)"
BETA_H = "cfg.beta * ((logprobs - ref_logprobs)[0] - (logprobs - ref_logprobs)[1])"
ONLY_DPO = {'if cfg.loss == "dpo":': "if True:", " - cfg.nll * logprobs[0] / lengths[0]": ""}
LOSS, PPO, HEAD = "test_losses.py::test_", "test_ppo.py::test_", "test_kernels.py::test_"

EXERCISES = [
    Exercise(
        name="train_bpe",
        week=1,
        file="data/tokenizer.py",
        function="train_bpe",
        points=10,
        minutes=90,
        equation="merge argmax over pairs (a, b) of count(a b); of equal counts the smallest pair",
        tests={
            BPE + "training_merges_what_a_recount_of_the_whole_text_would_merge": (
                4,
                "Count pairs as the words are after the last merge, each word as often as it "
                "occurs, inside pre-tokens (PATTERN) only; of equal counts take the smallest pair.",
            ),
            BPE + "encoding_applies_merges_in_the_order_they_were_learned": (
                1,
                "Return pairs of ids in the order learned: merge n makes id 256 + n.",
            ),
            BPE + "any_text_survives_the_round_trip": (
                1,
                "Start from all 256 bytes, and make no merge twice.",
            ),
        },
        cases=train_bpe,
        questions=[
            "Why does the docstring say which of two equally frequent pairs is merged?\n"
            "Merges define ids. If the order of a dict decided, the same text could give another "
            "vocabulary, and a checkpoint would read other tokens than it was trained on.",
            "Why may no merge cross the border of a pre-token? What would tokens look like?\n"
            'There would be a token for "dog." beside the one for "dog", and for frequent phrases: '
            "ids spent on combinations, each of which has to be learned anew.",
        ],
        mistakes={
            "You count every distinct word once, however often it occurs in the text.": [
                {"counts = list(found.values())": "counts = [1] * len(found)"}
            ],
            "Five ids are for special tokens: there are n_vocab - 256 - 5 merges.": [
                {"n_vocab - len(SPECIALS)": "n_vocab"}
            ],
            "You go on merging pairs that occur only once.": [
                {"-heap[0][0] < 2": "-heap[0][0] < 1"}
            ],
        },
    ),
    Exercise(
        name="attention",
        week=2,
        file="gpt.py",
        function="Attention.forward",
        points=10,
        minutes=90,
        equation="softmax(q k^T / sqrt(hs)) v, over positions up to one's own, in nh heads",
        tests={
            MODEL + "forward_equals_the_formulas_written_out_for_one_token_at_a_time": (
                3,
                "Compare with softmax(q k^T / sqrt(hs)) v: is the scale there, and is the last "
                "axis split into q, k, v first and into heads then, (B, T, 3, nh, hs)?",
            ),
            MODEL + "future_tokens_do_not_change_past_hidden_states": (
                3,
                "Position t may look at positions 0..t only: is the causal mask there?",
            ),
            MODEL + "cached_and_uncached_hidden_states_agree_for_rows_of_mixed_length": (
                2,
                "With a cache, keys and values come from cache.update, and mask (not None: one "
                "token per row) is added to the scores in place of the causal mask.",
            ),
            MODEL + "greedy_reply_equals_taking_the_best_token_again_and_again": (
                1,
                "While sampling, T is 1 and everything that came before is in the cache.",
            ),
        },
        cases=attention,
        questions=[
            "Scores are divided by sqrt(hs). What would happen without, the wider the heads?\n"
            "A product of hs terms of variance 1 has SD sqrt(hs). Softmax of such scores is nearly "
            "one-hot: attention looks at single tokens, and gradients vanish.",
            "Why is a future score set to -inf before the softmax, and not its weight to 0 after "
            "it?\n"
            "The weights would no longer add up to 1, and future scores would still stand in the "
            "denominator: the past would depend on them.",
        ],
        mistakes={
            "Your scale is that of the width C: divide by sqrt(hs), the size of one head.": [
                {"attn_mask=mask, ": "attn_mask=mask, scale=C**-0.5, "}
            ],
            "The cache is left out: while sampling, k and v are those that cache.update returns, "
            "and a query looks at all of them.": [
                {
                    "        if cache is not None:\n"
                    "            k, v = cache.update(layer, positions, mask, k, v)\n": "",
                    "attn_mask=mask, is_causal=mask is None": "is_causal=True",
                }
            ],
            "The mask that comes with a cache is not used: rows of different length need it.": [
                {"attn_mask=mask, is_causal=mask is None": "is_causal=mask is None"}
            ],
            "The heads are put side by side in the wrong order: transpose back to (B, T, nh, hs) "
            "before reshaping to (B, T, C).": [
                {"y.transpose(1, 2).reshape(B, T, C)": "y.reshape(B, T, C)"}
            ],
            "The output layer is missing: return self.c_proj of the heads.": [
                {"return self.c_proj(y)": "return y"}
            ],
        },
    ),
    Exercise(
        name="cache",
        week=2,
        file="gpt.py",
        function="Cache.update",
        points=5,
        minutes=45,
        equation="keys[layer, b, :, positions[b]] = k[b];  return what the queries look at",
        tests={
            MODEL + "cached_and_uncached_hidden_states_agree_for_rows_of_mixed_length": (
                3,
                "Row b stores its token at positions[b], in all heads; what is returned reaches to "
                "the end of the mask.",
            ),
            MODEL + "log_probabilities_of_samples_equal_those_of_a_second_reading": (
                2,
                "Prompts are stored from column 0 on, and a later token after them.",
            ),
            MODEL + "replies_to_more_prompts_than_are_read_at_a_time_equal_those_to_each_alone": (
                2,
                "Write into self.keys and self.values themselves, not into copies.",
            ),
        },
        cases=cache_update,
        questions=[
            "After a prompt of P tokens, T tokens are sampled. How many tokens does the model "
            "read with the cache, and how many without?\n"
            "P + T - 1 with it; P + (P + 1) + ... + (P + T - 1) = T P + T (T - 1) / 2 without.",
        ],
        mistakes={
            "Values are stored as keys, or the other way round.": [
                {"= k[:, :, 0], v[:, :, 0]": "= v[:, :, 0], k[:, :, 0]"}
            ],
            "All rows are written at the first row's position; each has its own.": [
                {"slice(None), positions ": "slice(None), positions[:1] "}
            ],
            "Only the new token is returned; the query also looks at all that are stored.": [
                {"return keys[:, :, :end], values[:, :, :end]": "return k, v"}
            ],
        },
    ),
    Exercise(
        name="sample",
        week=2,
        file="gpt.py",
        function="sample",
        points=8,
        minutes=60,
        equation="p = softmax(logits / temperature), restricted to top_k or top_p, renormalised",
        tests={
            MODEL + "sampling_frequencies_follow_the_temperature": (
                3,
                "Divide the logits by the temperature before the softmax; the log-probability is "
                "that of the distribution you draw from.",
            ),
            MODEL + "top_k_and_top_p_keep_just_the_likeliest_tokens": (
                3,
                "top_p keeps the smallest set whose probabilities add up to at least top_p, so the "
                "token that reaches it stays; afterwards the rest is normalised again.",
            ),
            MODEL + "sampling_that_leaves_nothing_to_chance_takes_the_likeliest": (
                1,
                "Extreme settings: the likeliest token always stays, and no logit becomes nan.",
            ),
            MODEL + "same_seed_samples_the_same_replies": (
                2,
                "Draw from the generator that is passed, not from the global one.",
            ),
        },
        cases=sample,
        questions=[
            "Four tokens have probabilities 0.5, 0.3, 0.15 and 0.05. Which can top_p 0.9 draw, "
            "and with which probabilities?\n"
            "The first three, which have 0.95 (two have only 0.8): 0.526, 0.316 and 0.158.",
        ],
        mistakes={
            "The log-probability is that of the logits before temperature, top_k and top_p.": [
                {
                    "logits = logits.float()": "logits = raw = logits.float()",
                    "return ids, probs.gather(1, ids[:, None]).squeeze(1).log()": "return ids, "
                    "raw.log_softmax(1).gather(1, ids[:, None]).squeeze(1)",
                }
            ],
            "top_p drops the token with which the sum reaches top_p; it belongs to the set.": [
                {"- sorted_logits.softmax(1)\n": "\n", "out = before >=": "out = before >"}
            ],
            "Logits are multiplied by the temperature: divide by it.": [
                {"logits / max(temperature, 1e-30)": "logits * temperature"}
            ],
        },
    ),
    Exercise(
        name="lr_at",
        week=3,
        file="data/run.py",
        function="lr_at",
        points=3,
        minutes=20,
        equation="min of (step + 1) / max(warmup, 1), 1 and\n"
        "    floor + (1 - floor) (steps - step) / max(steps - warmup, 1)",
        tests={
            LOSS + "learning_rate_rises_then_falls_to_its_floor": (
                1,
                "Linear up to 1 at step warmup - 1, then linear down to floor at step `steps`; "
                "the first step is not 0.",
            )
        },
        cases=lr_at,
        questions=[
            "Why does a run with Adam begin with small steps?\n"
            "Its second moments rest on one or two gradients then, so each weight would move by "
            "the full rate, in the direction of noise.",
        ],
        mistakes={
            "The decay ignores floor: it ends at 0.": [
                {"floor + (1 - floor) * (steps": "1.0 * (steps"}
            ],
        },
    ),
    Exercise(
        name="encode_chat",
        week=4,
        file="data/chat.py",
        function="encode_chat",
        points=6,
        minutes=45,
        equation="ids   <|user|> text <|assistant|> text <|end|>\n"
        "    mask  0        0    0             1    1",
        tests={
            CHAT + "just_the_replies_and_their_ends_are_supervised": (
                3,
                "The mask is 1 for what the assistant says and for its <|end|>; 0 for <|user|>, "
                "questions and <|assistant|>. A system message opens the next question only.",
            ),
            CHAT + "prompt_and_reply_put_together_are_the_conversation": (
                2,
                "A reply is <|assistant|> and then encode_reply, which has the <|end|>.",
            ),
            CHAT + "a_message_that_spells_a_special_token_stays_inside_its_turn": (
                1,
                "Special tokens come from the tokenizer's attributes, never from encoding text.",
            ),
        },
        cases=encode_chat,
        questions=[
            "Why is <|end|> learned, and why is <|assistant|> not?\n"
            "The model has to say when it stops; a turn is opened for it, so it never has to "
            "predict that.",
        ],
        mistakes={
            "The system message is lost: it opens the next user message, with a blank line between "
            "them.": [{'system = text + "\\n\\n"': 'system = ""'}],
        },
    ),
    Exercise(
        name="sft_loss",
        week=4,
        file="train_sft.py",
        function="sft_loss",
        points=6,
        minutes=40,
        equation="- mean over the tokens of all responses of log p(token | conversation so far)",
        tests={
            LOSS + "sft_loss_is_the_mean_over_supervised_tokens": (
                3,
                "The state after token t predicts token t + 1: tokens and mask are both shifted by "
                "one. The mean is over supervised tokens of the whole batch.",
            ),
            LOSS + "prompt_tokens_get_zero_gradient": (
                3,
                "No token of a prompt may be a target: use the mask.",
            ),
            LOSS + "what_stands_after_the_reply_changes_nothing": (
                2,
                "Padding has mask 0: neither its loss nor its number may count.",
            ),
        },
        cases=reading(train_sft, "sft_loss"),
        questions=[
            "Averaged over the tokens of a batch, or over the means of its rows: whom does each "
            "favour?\n"
            "Over tokens, long responses weigh more, and each token the same. Over rows, a token "
            "of a short response weighs more.",
        ],
        mistakes={
            "Not shifted: you compare the state after token t with token t itself, which it has "
            "seen. The target is token t + 1, under the mask of token t + 1.": [
                {"tokens[:, 1:], mask[:, 1:]": "tokens[:, :-1], mask[:, 1:]"},
                {"tokens[:, :-1]": "tokens", "tokens[:, 1:], mask[:, 1:]": "tokens, mask"},
            ],
            "A sum where a mean is asked for.": [{"reduction=reduction": 'reduction="sum"'}],
        },
    ),
    Exercise(
        name="preference_loss",
        week=5,
        file="train_rm.py",
        function="preference_loss",
        points=4,
        minutes=20,
        equation="- mean over pairs of log sigmoid(r(chosen) - r(rejected))",
        tests={
            LOSS + "preference_loss_is_bradley_terry": (
                3,
                "Chosen minus rejected, not the other way round; minus the mean over pairs.",
            ),
            LOSS + "preference_loss_at_equal_scores_is_ln_2": (1, "-log sigmoid(0) is ln 2."),
            LOSS + "gradient_of_the_preference_loss_is_how_surprised_it_was": (
                2,
                "The loss must fall when chosen scores rise.",
            ),
            LOSS + "extreme_scores_give_finite_losses_and_gradients": (
                2,
                "sigmoid(-10000) is 0, and its log -inf: there is a function that does both at "
                "once.",
            ),
        },
        cases=preference_loss,
        questions=[
            "The reference run agrees with 0.73 of the held-out labels, an oracle that knows "
            "gold with 0.79. Why is 1 out of reach?\n"
            "Annotators prefer the better response only with probability sigmoid of the difference "
            "in gold over tau: labels of close pairs are nearly coins.",
        ],
        mistakes={
            "The mean over pairs is asked for.": [{".mean()": ".sum()"}, {".mean()": ""}],
        },
    ),
    Exercise(
        name="last_token_scores",
        week=5,
        file="train_rm.py",
        function="last_token_scores",
        points=4,
        minutes=25,
        equation="r(x, y) = score of the state after the last token of y",
        tests={
            LOSS + "score_is_read_at_the_last_token_whatever_stands_beside_it": (
                1,
                "A row shorter than the batch has padding on its right: its score is at its own "
                "length - 1, not in the last column.",
            )
        },
        cases=last_token_scores,
        questions=[
            "Why may anything at all stand in the padding on the right? And on the left?\n"
            "Attention is causal: nothing looks to its right. On the left it would be seen by the "
            "row, and would shift its positions.",
        ],
        mistakes={
            "That is not the last token's score: its index is length - 1.": [
                {"len(row) - 1": "max(len(row) - 2, 0)"},
                {"scores.gather(1, last[:, None]).squeeze(1)": "scores[:, 0]"},
            ],
        },
    ),
    Exercise(
        name="token_rewards",
        week=6,
        file="train_ppo.py",
        function="token_rewards",
        points=6,
        minutes=40,
        equation="R_t = -beta kl_estimate(log pi_old - log pi_ref, estimate)(y_t),\n"
        "    plus r(x, y) at the last token of y",
        tests={
            PPO + "rewards_add_up_to_score_minus_beta_times_kl": (
                3,
                "The penalty is -beta times the estimate, for tokens of the response only.",
            ),
            PPO + "score_stands_on_the_last_token_of_the_response": (
                3,
                "The score is added once per row, in the last column where the mask is 1.",
            ),
        },
        cases=token_rewards,
        questions=[
            "Why is the score paid at the last token alone, but the KL penalty at every one?\n"
            "The score is of the whole response. The log-ratio is a sum over tokens: what each "
            "adds is known as soon as it is chosen, and so GAE can blame the right one.",
        ],
        mistakes={
            "The score is lost: it is added at the last token of the response.": [
                {"last] += scores": "last] += 0 * scores"}
            ],
            "The score stands in the last column, which need not belong to the response.": [
                {"(mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)": "-1"}
            ],
            "The penalty is also paid outside the mask, for prompts and padding.": [
                {"ref_logprobs, estimate) * mask": "ref_logprobs, estimate)"}
            ],
        },
    ),
    Exercise(
        name="gae",
        week=6,
        file="train_ppo.py",
        function="gae",
        points=10,
        minutes=75,
        equation="delta_t = R_t + gamma V_{t+1} - V_t\n"
        "    A_t = delta_t + gamma lambda A_{t+1};  returns A_t + V_t",
        tests={
            PPO + "gae_is_the_sum_of_discounted_td_errors": (
                4,
                "Go backwards. After the last token of a response the next value and the next "
                "advantage are 0; the returns are A + V.",
            ),
            PPO + "gae_with_lambda_1_is_reward_to_go_minus_value": (
                2,
                "With gamma = lambda = 1 the sum telescopes: rewards to come, minus the value.",
            ),
            PPO + "a_critic_that_knows_the_rewards_to_come_leaves_no_advantage": (
                1,
                "R_t + V_{t+1} - V_t is 0 for a critic that is right.",
            ),
            PPO + "a_score_at_the_end_reaches_earlier_tokens_by_powers_of_lambda": (
                1,
                "Run it by hand on three tokens with values 0.",
            ),
            PPO + "values_outside_the_response_change_no_advantage": (
                3,
                "What the critic says where the mask is 0 is garbage: neither the next value nor "
                "the result may contain it.",
            ),
        },
        cases=gae,
        questions=[
            "What does lambda 1 trust, what does lambda 0, and what does each cost?\n"
            "1 trusts the rewards that followed: no bias, but all their noise. 0 trusts the "
            "critic's next value: little noise, but its mistakes.",
        ],
        mistakes={
            "The returns are wrong: they are A + V, what the critic should have predicted.": [
                {"(advantages + values) * mask": "advantages * mask"}
            ],
            "gamma or lambda is missing in the recursion: A_t = delta_t + gamma lambda A_{t+1}.": [
                {"gamma * lam * next_advantage": "lam * next_advantage"},
                {"gamma * lam * next_advantage": "gamma * next_advantage"},
            ],
            "A value is missing: delta_t = R_t + gamma V_{t+1} - V_t.": [
                {" + gamma * next_value - values[:, t]": " + gamma * next_value"},
                {" + gamma * next_value": ""},
            ],
        },
    ),
    Exercise(
        name="policy_loss",
        week=7,
        file="train_ppo.py",
        function="policy_loss",
        points=8,
        minutes=40,
        equation="max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)), ratio = pi / pi_old, per token",
        tests={
            PPO + "policy_gradient_at_ratio_1_is_minus_the_advantage": (
                3,
                "One loss per token, no mean, and the ratio as well; the sign is such that "
                "gradient descent makes tokens with A > 0 likelier.",
            ),
            PPO + "only_tokens_that_went_too_far_the_right_way_get_no_gradient": (
                4,
                "The paper takes the minimum of two objectives; with losses, their negatives, it "
                "is the maximum.",
            ),
        },
        cases=policy_loss,
        questions=[
            "What is the ratio in the first minibatch of an iteration, and what does clipping do "
            "there?\n"
            "1, since nothing has been updated since sampling, and so nothing is clipped: the "
            "gradient is that of -A log pi.",
        ],
        mistakes={
            "You return the mean: a loss per token (B, T) is asked for, and the caller averages "
            "over the mask.": [{"return loss, ratio": "return loss.mean(), ratio"}],
            "The sign is wrong: this is the objective, which is to be maximised. The loss is its "
            "negative.": [{"return loss, ratio": "return -loss, ratio"}],
            "The ratio is upside down: it is pi / pi_old.": [
                {"(logprobs - old_logprobs).exp()": "(old_logprobs - logprobs).exp()"}
            ],
            "Nothing is clipped.": [{"ratio.clamp(1 - clip, 1 + clip)": "ratio"}],
        },
    ),
    Exercise(
        name="group_advantages",
        week=7,
        file="train_ppo.py",
        function="group_advantages",
        points=5,
        minutes=40,
        equation="rloo     return - mean of the others\n"
        "    grpo     (return - mean) / (SD + 1e-4), SD dividing by n\n"
        "    dr_grpo  return - mean",
        tests={
            PPO + "a_response_is_compared_with_the_others_to_its_prompt": (
                3,
                "Groups are told by `prompts`, in any order; rloo leaves a response out of its own "
                "baseline.",
            ),
            PPO + "where_all_responses_to_a_prompt_earn_the_same_there_is_nothing_to_learn": (
                1,
                "Equal returns give exactly 0, and no nan from an SD of 0.",
            ),
            PPO + "rloo_is_unbiased_dr_grpo_is_scaled_and_grpo_ignores_the_scale_of_rewards": (
                2,
                "rloo is n / (n - 1) of dr_grpo.",
            ),
        },
        cases=group_advantages,
        questions=[
            "All eight responses to a prompt are right. What does it teach, and what follows for "
            "the choice of prompts?\n"
            "Of the reward nothing: what is left compares KL penalties, and is 0 if there are "
            "none. Prompts should be such that some responses are right and some wrong.",
        ],
        mistakes={
            "The mean is over all responses: compare only with those to the same prompt.": [
                {"(prompts[:, None] == prompts)": "(prompts[:, None] > prompts - 99)"}
            ],
        },
    ),
    Exercise(
        name="sequence_logprobs",
        week=8,
        file="train_dpo.py",
        function="sequence_logprobs",
        points=4,
        minutes=25,
        equation="log p(y | x) = sum over the tokens of y of log p(y_t | x, y_<t)",
        tests={
            LOSS + "sequence_logprob_is_the_sum_over_the_reply": (
                1,
                "A sum, not a mean; tokens and mask are shifted by one, as in sft_loss; tokens "
                "outside the mask count 0.",
            )
        },
        cases=reading(train_dpo, "sequence_logprobs"),
        questions=[
            "DPO's equation needs sums. What changes if you put in means per token?\n"
            "beta h is divided by the length, so the loss stays near ln 2 and beta means something "
            "else for every length. (SimPO does it on purpose, with a large beta.)",
        ],
        mistakes={
            "Not shifted: the state after token t predicts token t + 1.": [
                {"tokens[:, 1:].masked_fill(": "tokens[:, :-1].masked_fill("}
            ],
            "The mask is left out: the prompt is counted, too.": [
                {"tokens[:, 1:].masked_fill(~mask[:, 1:], -100)": "tokens[:, 1:]"}
            ],
            "The sign is wrong: log-probabilities are negative.": [{".sum(1)": ".sum(1).neg()"}],
        },
    ),
    Exercise(
        name="dpo_loss",
        week=8,
        file="train_dpo.py",
        function="dpo_loss",
        points=6,
        minutes=60,
        equation="dpo   -log sigmoid(beta h)\n"
        "    cdpo  -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)\n"
        "    ipo   (h - 1 / (2 beta))^2\n"
        "    simpo -log sigmoid(beta (means per token of chosen - of rejected) - margin)\n"
        "    to any of them: - nll log pi(chosen) / tokens of chosen",
        tests={
            LOSS + "dpo_loss_is_its_formula": (
                4,
                "Equation 7, one loss per pair and no mean, with h from log-ratios to the "
                "reference (dpo_margin is beta h).",
            ),
            LOSS + "loss_is_known_when_policy_equals_reference": (
                2,
                "Is the reference subtracted? Then h is 0, and the loss ln 2, for ipo "
                "1 / (4 beta^2).",
            ),
            LOSS + "swapping_chosen_and_rejected_mirrors_the_loss": (1, "Chosen comes first."),
            LOSS + "cdpo_is_smallest_where_the_model_is_as_sure_as_the_labels_are_right": (
                1,
                "cdpo: with probability eps = label_smoothing the label is the other way round.",
            ),
            LOSS + "ipo_is_smallest_at_its_target_margin": (1, "ipo: (h - 1 / (2 beta))^2."),
            LOSS + "simpo_compares_means_and_ignores_the_reference": (
                1,
                "simpo: means per token, no reference, and simpo_margin is subtracted.",
            ),
            LOSS + "nll_term_adds_the_mean_loss_of_the_chosen_reply": (
                1,
                "To any loss: minus nll times the mean log-probability of chosen, per token.",
            ),
        },
        cases=dpo_loss,
        questions=[
            "The first loss of every run with `--loss dpo` is ln 2. Why?\n"
            "The policy is still its own reference, so h is 0, and -log sigmoid(0) is ln 2.",
            "In the log the log-ratio of chosen responses falls. Is that a bug?\n"
            "No: the loss asks only for the difference. Chosen responses are not what the policy "
            "itself would say most, and usually both fall, rejected ones faster.",
        ],
        mistakes={
            "You return the mean, or only one number: a loss for every pair is asked for (B,).": [
                {
                    "return loss - cfg.nll * logprobs[0] / lengths[0]": "return (loss - cfg.nll * "
                    "logprobs[0] / lengths[0]).mean()"
                }
            ],
            "Only DPO, and its mean: a loss for every pair (B,) is asked for, and cfg.loss may "
            "also be cdpo, ipo or simpo; nll is added to any of them.": [
                {**ONLY_DPO, "return loss": "return loss.mean()"},
                {MARGIN: BETA_H, **ONLY_DPO, "return loss": "return loss.mean()"},
            ],
            "Only DPO: cfg.loss may also be cdpo, ipo or simpo, and nll is added to any of them.": [
                ONLY_DPO,
                {MARGIN: BETA_H, **ONLY_DPO},
            ],
            "The reference is left out: h compares log-ratios, log pi - log pi_ref.": [
                {MARGIN: MARGIN.replace("ref", "0 * ref")},
                {MARGIN: "cfg.beta * (logprobs[0] - logprobs[1])", **ONLY_DPO},
            ],
            "nll is forgotten: its term is added to any loss.": [
                {" - cfg.nll * logprobs[0] / lengths[0]": ""}
            ],
            "Chosen and rejected are swapped.": [{"= dpo_margin(": "= -dpo_margin("}],
        },
    ),
    Exercise(
        name="head_gradient",
        week=9,
        file="kernels.py",
        function="_logit_gradients",
        points=5,
        minutes=60,
        equation="dz_j = g ([j = t] - p_j) - h p_j (log p_j + H),  z after the temperature",
        tests={
            HEAD + "logprobs_and_entropy_take_any_upstream_gradient": (
                3,
                "g and h are one number per row. For h you need log p of every token, and H, which "
                "is in statistics.",
            ),
            HEAD + "gradients_agree_with_finite_differences": (
                2,
                "_logits divides by the temperature already, and the caller multiplies by "
                "1 / temperature once more: do neither here.",
            ),
            HEAD + "ignored_rows_give_zero_and_get_exactly_zero_gradient": (
                1,
                "Rows that do not count never come here: treat all alike.",
            ),
        },
        cases=logit_gradients,
        questions=[
            "Every row of dz adds up to 0. Why must it?\n"
            "Softmax does not change if a constant is added to all logits of a row, so the "
            "derivative in that direction, the sum over j, is 0.",
            "How many bytes are the logits of 8192 tokens with a vocabulary of 50304 in float32, "
            "and how does the head avoid them?\n"
            "8192 x 50304 x 4 = 1.65e9. It works through the rows in chunks, and computes the "
            "logits of a chunk again in the backward pass.",
        ],
        mistakes={
            "The sign is that of a loss: this is the gradient of log p_t, g ([j = t] - p_j).": [
                {"dz = -g[:, None] * p": "g = -g\n    dz = -g[:, None] * p"}
            ],
            "The target's own term is missing: g ([j = t] - p_j).": [
                {
                    "    dz.scatter_(1, t, 0.0)\n": "",
                    "    dz.scatter_(1, t, -dz.sum(1, keepdim=True))": "    pass",
                }
            ],
            "The entropy's gradient is left out: h p_j (log p_j + H).": [
                {"if h is not None:\n        log_p": "if False:\n        log_p"}
            ],
        },
        keep=2,
    ),
]
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
