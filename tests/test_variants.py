"""Runs with --name: variants beside the stage, trained, resumed, compared and evaluated by name."""

import json
import os
import re
import shutil

import pytest
import torch
from tiny_runs import SCRIPTS, interrupt, prepare, run, same

from data.chat import question
from data.evaluate import Config as Evaluation
from data.evaluate import evaluate
from data.talk import Config as Talk
from data.talk import Speaker, find_checkpoints
from data.talk import main as talk
from data.town.tasks import SHOWN, TRAIN_KINDS
from gpt import InputError


@pytest.fixture
def runs(chain, tmp_path):
    """A copy of the chain, to which a test may add variants."""
    return shutil.copytree(chain, tmp_path / "out")


def contents(folder):
    return {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file()}


def test_a_variant_has_its_own_folder_and_leaves_all_others_as_they_are(runs, capsys):
    before = contents(runs)
    run("ppo", runs, name="grpo-like", gamma=0.9)
    assert f"seconds, results in {runs}/grpo-like/" in capsys.readouterr().out
    after = contents(runs)
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(runs).as_posix() for path in after.keys() - before.keys()}
    new -= {"unfinished/.grpo-like.lock"}  # which says that nobody is at work there any more
    files = ("ckpt.pt", "cost.json", "curve.png", "log.csv", "samples.txt")
    assert new == {f"grpo-like/{name}" for name in files}
    assert not same(runs / "grpo-like", runs / "ppo")  # another gamma


def test_a_variant_reads_what_the_stage_would_read(runs):
    run("ppo", runs, name="twin")
    assert same(runs / "twin", runs / "ppo")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_stage_takes_a_name_and_its_own(chain, tmp_path, stage):
    prepare(chain, tmp_path, stage)
    run(stage, tmp_path, name="mine")
    assert same(tmp_path / "mine", chain / stage)
    run(stage, tmp_path, name=stage)
    assert same(tmp_path / stage, chain / stage)


@pytest.mark.parametrize(
    "name", "sft rm pretrain dpo other a/b /tmp/x .. . x/ a|b _x base quick report.md".split()
)
def test_a_name_of_another_stage_a_path_and_a_word_of_the_report_are_refused(runs, name):
    shutil.copytree(runs / "dpo", runs / "other")
    before = contents(runs.parent)
    with pytest.raises(InputError, match=f"--name {re.escape(name)}(: choose a plain| belongs to)"):
        run("ppo", runs, name=name)
    assert contents(runs.parent) == before


def test_a_stopped_variant_says_its_name_and_resumes_to_the_same_bits(
    chain, tmp_path, monkeypatch, capsys
):
    prepare(chain, tmp_path)
    interrupt("ppo", tmp_path, monkeypatch, name="mine")
    said = capsys.readouterr().out
    assert "`python train_ppo.py --name mine --resume`" in said
    assert f"resumes {tmp_path}/unfinished/mine/resume.pt" in said
    with pytest.raises(InputError, match="no run to resume in .*/unfinished/ppo"):
        run("ppo", tmp_path, resume=True)
    run("ppo", tmp_path, name="mine", resume=True)
    assert same(tmp_path / "mine", chain / "ppo")


def test_checkpoints_are_found_in_the_order_of_the_stages_each_before_its_variants(runs):
    for stage, name in (("ppo", "b"), ("ppo", "a"), ("sft", "z"), ("rm", "judge"), ("dpo", "ipo")):
        shutil.copytree(runs / stage, runs / name)
    (runs / "no run").mkdir()
    found = find_checkpoints(runs)
    assert list(found) == "pretrain sft z rm judge ppo a b dpo ipo".split()
    assert found["judge"] == ("rm", runs / "judge" / "ckpt.pt")
    assert list(find_checkpoints(runs / "nowhere")) == []


def test_the_newest_answers_a_prompt_and_all_can_be_compared(runs, capsys):
    shutil.copytree(runs / "dpo", runs / "ipo")
    os.utime(runs / "ipo" / "ckpt.pt")
    talk(Talk(out=str(runs), prompt=SHOWN[0]))
    once = capsys.readouterr().out
    assert once.strip()
    talk(Talk(out=str(runs), compare=True))
    compared = capsys.readouterr().out
    for name in ("pretrain", "sft", "ppo", "dpo", "ipo"):
        assert len(re.findall(f"^{name} ", compared, re.M)) == len(SHOWN)
    assert not re.search("^rm ", compared, re.M)  # it cannot talk
    assert f"\n{'ipo':9} {once}" in compared  # what the others said has not changed its answer


def test_a_prompt_may_be_empty_and_begins_no_conversation(runs, monkeypatch, capsys):
    """Nobody is there to answer a question, where a script has passed an empty text."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("a conversation"))
    for name in ("sft", "pretrain"):
        talk(Talk(ckpt=str(runs / name / "ckpt.pt"), prompt=""))
        speaker = Speaker(runs / name / "ckpt.pt")
        (reply,) = speaker.answer([question("")], 48, 0, temperature=0.7)
        assert capsys.readouterr().out.startswith(reply.text or "(nothing:")


def test_a_model_is_not_exported_over_a_run_and_stops_where_it_used_to(runs, tmp_path):
    """A base model at the end of its document, the others at the end of their turn."""
    before = contents(runs)
    with pytest.raises(InputError, match="sft is the folder of a run"):
        talk(Talk(out=str(runs), export=str(runs / "sft")))
    for name, end in (("pretrain", "<|endoftext|>"), ("sft", "<|end|>")):
        where = tmp_path / f"exported {name}"
        talk(Talk(ckpt=str(runs / name / "ckpt.pt"), export=str(where)))
        assert json.loads((where / "tokenizer_config.json").read_text())["eos_token"] == end
    assert contents(runs) == before


def test_a_base_model_goes_on_with_a_document_and_an_assistant_answers_a_question(
    chain, monkeypatch
):
    """Each until its own end: of the document, or of its turn."""
    stops = []
    monkeypatch.setattr("data.talk.sample_replies", lambda *_, stop, **how: stops.append(stop))
    base, sft = (Speaker(chain / name / "ckpt.pt") for name in ("pretrain", "sft"))
    tokenizer, ids = base.tokenizer, base.tokenizer.encode("Hi")
    assert base.encode(question("Hi")) == [tokenizer.eot, *ids]
    assert sft.encode(question("Hi")) == [tokenizer.user, *ids, tokenizer.assistant]
    for speaker in (base, sft):
        speaker.answer([question("Hi")], 12, seed=0)
    assert stops == [tokenizer.eot, tokenizer.end]


def test_a_conversation_goes_on_until_the_end_of_the_input(chain, monkeypatch, capsys):
    """With another seed for each answer; what is too long is not answered, and nothing ends. The
    second answer is one to both questions and the first answer."""
    inputs = ["Hello", "", "long " * 200, " Hello "]

    def type_in(_):
        if not inputs:
            raise EOFError
        return inputs.pop(0)

    monkeypatch.setattr("builtins.input", type_in)
    path, how = chain / "sft" / "ckpt.pt", dict(temperature=0.9, top_k=40, top_p=0.8)
    talk(Talk(ckpt=str(path), seed=5, max_new_tokens=7, **how))
    first, *said = capsys.readouterr().out.split("\n")
    assert first.startswith(f"You are talking to {path}.")
    speaker = Speaker(path)
    (reply,) = speaker.answer([question("Hello")], 7, 5, **how)
    both = [*question("Hello"), {"role": "assistant", "content": reply.text}, *question("Hello")]
    replies = [reply, *speaker.answer([both], 7, 8, **how)]
    words = [(r.text or "(nothing: for this model the text ends here)", r.ended) for r in replies]
    answers = [text + ("" if ended else " ...") for text, ended in words]
    tokens = len(speaker.encode(question(("long " * 200).strip())))
    too_long = f"that is {tokens} tokens, and the context of sft has 96"
    assert "\n".join(said) == "\n".join([answers[0], too_long, answers[1], "", ""])


def test_without_any_model_there_is_nobody_to_talk_to(tmp_path):
    with pytest.raises(InputError, match="no model is in .*run `python train_pretrain.py`"):
        talk(Talk(out=str(tmp_path)))


def test_the_report_has_a_column_for_every_variant(runs):
    run("ppo", runs, name="hot", temperature=1.5)
    shutil.copytree(runs / "rm", runs / "judge")
    few = dict(prompts=2 * len(TRAIN_KINDS), n=2, max_new_tokens=4)
    report = evaluate(Evaluation(out=str(runs), **few))
    assert list(report["stages"]) == "base sft best_of_n judge ppo hot dpo".split()
    assert list(report["reward_models"]) == ["rm", "judge"]
    hot, cost = (report["stages"]["hot"], json.loads((runs / "hot" / "cost.json").read_text()))
    assert hot["forward_equivalents"] == cost["forward_equivalents"]
    assert "| hot |" in (runs / "report.md").read_text()
    assert report["stages"]["judge"]["gold_mean"] == report["stages"]["best_of_n"]["gold_mean"]


def test_one_damaged_or_foreign_checkpoint_is_named_and_the_others_are_reported(
    runs, tmp_path, capsys
):
    for name in ("damaged", "foreign", "judge"):
        shutil.copytree(runs / ("rm" if name == "judge" else "ppo"), runs / name)
    whole = (runs / "damaged" / "ckpt.pt").read_bytes()
    (runs / "damaged" / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("foreign", "judge"):  # with a tokenizer of another text
        checkpoint = torch.load(runs / name / "ckpt.pt", weights_only=True)
        checkpoint["tokenizer"]["merges"][-1] = [0, 1]
        torch.save(checkpoint, runs / name / "ckpt.pt")
    report = evaluate(
        Evaluation(out=str(runs), prompts=2 * len(TRAIN_KINDS), n=2, max_new_tokens=4)
    )
    assert list(report["stages"]) == "base sft best_of_n ppo foreign dpo".split()
    assert report["stages"]["foreign"]["kl_to_sft"] is None  # of other tokens
    said = capsys.readouterr().out
    assert f"left out: {runs}/damaged/ckpt.pt is " in said
    assert "judge is left out" in said and "another tokenizer" in said
    talk(Talk(out=str(runs), ckpt=str(runs / "sft" / "ckpt.pt"), prompt="Hi"))
    assert "damaged" not in capsys.readouterr().out  # nobody asked for it
