"""Talk to a trained model, or let all of them answer the same prompts.

python gpt.py                              talk to the newest model in out/; it remembers what
                                           has been said, as far as its context reaches
python gpt.py --prompt "What is 4-2?"      answer once
python gpt.py --compare                    the same prompts, answered by every stage and variant
python gpt.py --trace "What is 4-2?"       what PPO, DPO and the reward model see of each token
python gpt.py --export DIR                 a folder that transformers loads (data/gpt2.py)
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from data.chat import Reply, encode_opening, encode_prompt, question, recent, sample_replies
from data.gpt2 import export, load_init
from data.run import STAGES, run_script, stage_of, start
from data.tokenizer import load_tokenizer
from data.town.tasks import SHOWN
from data.trace import trace
from gpt import InputError


@dataclass
class Config:
    ckpt: str = ""  # checkpoint to talk to ("" = the newest in out/)
    prompt: str = None  # answer this, which may be empty, and exit
    compare: bool = False  # let every stage and variant in out/ answer
    trace: str = None  # take responses to this apart, token by token (needs all stages)
    temperature: float = 0.7  # of sampling (0 = greedy)
    top_k: int = 0  # keep the k likeliest tokens (0 = all)
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    max_new_tokens: int = 48  # longest response
    seed: int = 0  # of sampling
    export: str = ""  # folder to write the model to, for transformers, instead of talking
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
    out: str = "out"  # folder of all runs

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p is a probability, above 0 and at most 1, not {self.top_p}")
        given = {"prompt": self.prompt is not None, "compare": self.compare}
        given |= {"trace": self.trace is not None, "export": bool(self.export)}
        modes = [f"--{name}" for name, is_given in given.items() if is_given]
        if len(modes) > 1 and modes != ["--prompt", "--compare"]:
            raise ValueError(f"{' and '.join(modes)} cannot be done at once: leave out all but one")
        if self.trace is not None and self.ckpt:
            raise ValueError("--trace reads all stages of --out: leave out --ckpt")


class Speaker:
    """A language model that answers prompts, each model in the way that it is used to."""

    def __init__(self, path: str | Path, device="cpu"):
        """path: a checkpoint, or what else --init may name. Raises InputError if it is no
        language model."""
        self.model, checkpoint = load_init(path, device)
        self.tokenizer = load_tokenizer(checkpoint["tokenizer"])
        self.is_base = checkpoint["stage"] == "pretrain"  # it has never seen the chat format
        self.stop = self.tokenizer.eot if self.is_base else self.tokenizer.end

    def encode(self, messages: list[dict]) -> list[int]:
        """A conversation with an assistant; to a base model, the opening of a document."""
        if self.is_base:
            return encode_opening(self.tokenizer, " ".join(m["content"] for m in messages))
        return encode_prompt(self.tokenizer, messages)

    def fits(self, messages: list[dict]) -> bool:
        """Whether a conversation leaves room in the context for a response."""
        return len(self.encode(messages)) < self.model.config.context

    def answer(self, conversations, max_new_tokens: int, seed: int, **how) -> list[Reply]:
        """One reply to each conversation, a list of messages that ends with a question.

        how: temperature and the other options of `generate`.
        """
        prompts = [self.encode(messages) for messages in conversations]
        return sample_replies(
            self.model, self.tokenizer, prompts, max_new_tokens, seed, stop=self.stop, **how
        )


def find_checkpoints(out: str | Path) -> dict[str, tuple[str, Path]]:
    """Every finished run in a folder, in the order of the stages: name -> (stage, checkpoint).

    The first of a stage is the one without --name, then come its variants.
    """
    found = []
    for path in Path(out).glob("*/ckpt.pt"):
        try:
            stage, name = stage_of(path), path.parent.name
        except InputError as error:  # one damaged file says nothing of the others
            print(f"left out: {error}")
            continue
        found.append((STAGES.index(stage), name != stage, name, stage, path))
    return {name: (stage, path) for *_, name, stage, path in sorted(found)}


def main(cfg: Config):
    """Talk at the terminal, answer once, compare, trace, or export."""
    device = start(cfg)
    if cfg.trace is not None:
        trace(cfg.trace, Path(cfg.out), cfg.max_new_tokens, cfg.seed, device)
        return
    if cfg.ckpt:
        paths = {Path(cfg.ckpt).parent.name or cfg.ckpt: Path(cfg.ckpt)}
    else:
        found = find_checkpoints(cfg.out)
        paths = {name: path for name, (stage, path) in found.items() if stage != "rm"}
        if not paths:
            raise InputError(f"no model is in {cfg.out}/ yet: run `python train_pretrain.py` first")
        if not cfg.compare:
            newest = max(paths, key=lambda name: paths[name].stat().st_mtime)
            paths = {newest: paths[newest]}
    speakers = {name: Speaker(path, device) for name, path in paths.items()}

    if cfg.export:
        ((name, speaker),) = speakers.items()
        export(speaker.model, speaker.tokenizer, cfg.export, speaker.is_base)
        print(f"{paths[name]} is in {cfg.export}/ now, with its tokenizer, for transformers")
        return

    def respond(name: str, messages: list[dict], seed: int) -> str | None:
        """Print what a model says in a conversation, and return it; None if there is no room."""
        speaker = speakers[name]
        if not speaker.fits(messages):
            n_tokens, context = len(speaker.encode(messages)), speaker.model.config.context
            print(f"that is {n_tokens} tokens, and the context of {name} has {context}")
            return None
        how = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
        (reply,) = speaker.answer([messages], cfg.max_new_tokens, seed, **how)
        said = reply.text or "(nothing: for this model the text ends here)"
        label = f"{name:9} " if len(speakers) > 1 else ""
        print(label + said + ("" if reply.ended else " ..."))
        return reply.text

    if cfg.prompt is not None:
        for name in speakers:
            respond(name, question(cfg.prompt), cfg.seed)
    elif cfg.compare:
        for text in SHOWN:
            print(f"\n> {text}")
            for name in speakers:
                respond(name, question(text), cfg.seed)
    else:
        ((name, speaker),) = speakers.items()
        context = speaker.model.config.context
        memory = f"It remembers what fits its context of {context} tokens."
        if speaker.is_base:
            memory = "It goes on with every line alone: it has never seen a conversation."
        print(f"You are talking to {paths[name]}. {memory} Leave with Ctrl-D.")
        messages, forgets = [], False  # what it remembers; whether it has forgotten any turns
        for turn in itertools.count():
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not text:
                continue
            asked = messages + question(text)
            kept = recent(speaker.tokenizer, asked, context - min(cfg.max_new_tokens, context // 2))
            said = respond(name, kept, cfg.seed + turn)
            if said is None or speaker.is_base:
                continue
            if len(kept) < len(asked) and not forgets:
                print("(the oldest turns no longer fit the context and are forgotten from now on)")
                forgets = True
            messages = [*kept, {"role": "assistant", "content": said}]


if __name__ == "__main__":
    run_script(main, Config)
