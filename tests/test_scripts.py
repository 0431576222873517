"""The five scripts as a learner runs them, on a model so small that all take seconds."""

import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from tiny_runs import ROOT, SCRIPTS, TINY, run, same

import data.evaluate
import data.preferences
import gpt
import kernels
import train_pretrain
import train_rm
from data.chat import Reply, encode_prompt, question, sample_replies
from data.evaluate import evaluate
from data.files import held_out
from data.preferences import annotate, ask_human, make_preferences
from data.tasks import SHOWN, TRAIN_KINDS, demonstrate, draw_tasks
from data.tokenizer import load_tokenizer
from gpt import GPT, GPTConfig, ScalarModel, load_model, save_checkpoint
from train_pretrain import parse_config


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_stage_leaves_its_files_and_nothing_unfinished(chain, stage):
    files = {path.name for path in (chain / stage).iterdir()}
    assert {"ckpt.pt", "log.csv", "curve.png", "samples.txt", "cost.json"} <= files
    assert "unfinished" not in files
    checkpoint = torch.load(chain / stage / "ckpt.pt", weights_only=True)
    assert checkpoint["stage"] == stage
    cost = json.loads((chain / stage / "cost.json").read_text())
    assert cost["seconds"] > 0 and cost["forward_equivalents"] > 0


@pytest.mark.parametrize("stage", SCRIPTS)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    chain, tmp_path, monkeypatch, stage
):
    for name in ("pretrain", "sft", "rm"):
        if name != stage:
            shutil.copytree(chain / name, tmp_path / name)
    shutil.copy(chain / "preferences.jsonl", tmp_path)
    log = train_pretrain.Run.log

    def press_ctrl_c(self, step, **numbers):
        log(self, step, **numbers)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_pretrain.Run, "log", press_ctrl_c)
    with pytest.raises(SystemExit) as stopped:
        run(stage, tmp_path)
    assert stopped.value.code == 130
    assert (tmp_path / stage / "unfinished" / "curve.png").exists()
    monkeypatch.setattr(train_pretrain.Run, "log", log)
    run(stage, tmp_path, resume=True)
    assert same(tmp_path / stage, chain / stage)
    assert (tmp_path / stage / "log.csv").read_text() == (chain / stage / "log.csv").read_text()


def test_resuming_with_other_options_is_refused(chain, tmp_path, monkeypatch):
    log = train_pretrain.Run.log
    monkeypatch.setattr(
        train_pretrain.Run,
        "log",
        lambda self, step, **x: (log(self, step, **x), os.kill(os.getpid(), signal.SIGTERM)),
    )
    with pytest.raises(SystemExit):
        run("pretrain", tmp_path)
    with pytest.raises(SystemExit, match="had --batch_size 4, not 8"):
        run("pretrain", tmp_path, resume=True, batch_size=8)


def test_same_seed_trains_the_same_model_and_another_seed_another(chain, tmp_path):
    run("pretrain", tmp_path / "a")
    run("pretrain", tmp_path / "b", seed=1)
    assert same(tmp_path / "a" / "pretrain", chain / "pretrain")
    assert not same(tmp_path / "b" / "pretrain", chain / "pretrain")


def test_loss_that_is_not_finite_stops_and_leaves_the_earlier_results(tmp_path):
    run("pretrain", tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "pretrain").iterdir() if p.is_file()}
    with pytest.raises(SystemExit, match="at step [12].*last checkpoint is untouched"):
        run("pretrain", tmp_path, lr=1e30, optimizer="adamw")
    after = {p.name: p.read_bytes() for p in (tmp_path / "pretrain").iterdir() if p.is_file()}
    assert before == after


def test_reward_model_may_be_smaller_than_the_language_model(chain, tmp_path):
    run("pretrain", tmp_path, n_layer=2)
    run("sft", tmp_path)
    shutil.copy(chain / "preferences.jsonl", tmp_path)
    run("rm", tmp_path, n_layer=1)
    run("ppo", tmp_path, iterations=1)
    assert (
        torch.load(tmp_path / "rm" / "ckpt.pt", weights_only=True)["model_config"]["n_layer"] == 1
    )


def test_first_losses_are_those_of_models_that_have_learned_nothing_yet(chain):
    def first(stage):
        names, numbers = (
            line.split(",") for line in (chain / stage / "log.csv").read_text().split()[:2]
        )
        return {name: float(number) for name, number in zip(names, numbers) if number}

    assert first("rm")["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first("dpo")["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert first("dpo")["margin"] == pytest.approx(0, abs=1e-4)
    ppo = first("ppo")
    assert ppo["kl"] == ppo["kl_k3"] == ppo["kl_exact"] == 0
    assert ppo["first_ratio_error"] < 1e-5
    assert ppo["objective"] == pytest.approx(-2)  # no reply of the tiny model ends


def test_policy_leaves_its_reference(chain):
    """And the reference stays where it was, as an assertion at the end of train_ppo.py says."""
    rows = (chain / "ppo" / "log.csv").read_text().splitlines()
    kl_exact = [float(row.split(",")[rows[0].split(",").index("kl_exact")]) for row in rows[1:]]
    assert kl_exact[0] == 0 and kl_exact[-1] > 0


def test_ppo_takes_the_rounding_of_logits_that_lie_near_minus_80_for_what_it_is(chain, tmp_path):
    """GPT-2's do. Softmax cannot see the offset, but float32 has two digits less for the rest."""
    sft = torch.load(chain / "sft" / "ckpt.pt", weights_only=True)
    config = GPTConfig(**{**sft["model_config"], "n_layer": 2, "n_embd": 128})
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() == 2):
            matrix *= 5  # as far apart as those of a trained model
        direction = torch.randn(config.n_embd)
        model.ln_f.bias.copy_(-direction)
        model.wte.weight += 80 * direction / direction.square().sum()
    save_checkpoint(
        tmp_path / "sft" / "ckpt.pt",
        {**sft, "model": model.state_dict(), "model_config": asdict(config)},
    )
    last = run(
        "ppo", tmp_path, reward="gold", iterations=1, rollouts=32, minibatch=16, max_new_tokens=30
    )
    assert last["first_ratio_error"] < 1e-3  # 2e-5 where products of other sizes round otherwise


def test_ppo_without_learning_keeps_every_ratio_at_one(chain, tmp_path):
    for name in ("sft", "rm"):
        shutil.copytree(chain / name, tmp_path / name)
    last = run("ppo", tmp_path, lr=0.0)
    assert last["clipfrac"] == 0 and last["approx_kl"] < 1e-9 and last["kl_exact"] == 0
    assert same(tmp_path / "ppo", tmp_path / "sft")


def test_the_size_of_a_microbatch_does_not_change_what_ppo_learns(chain, tmp_path):
    norms = []
    for microbatch in (2, 4):
        out = tmp_path / str(microbatch)
        for name in ("sft", "rm"):
            shutil.copytree(chain / name, out / name)
        last = run("ppo", out, iterations=1, microbatch=microbatch)
        norms.append([last["policy_grad_norm"], last["critic_grad_norm"]])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_scores_of_sft_samples_have_mean_0_and_sd_1(chain):
    sft, checkpoint = load_model(chain / "sft" / "ckpt.pt")
    reward_model, _ = load_model(chain / "rm" / "ckpt.pt", kind=ScalarModel)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    rows = [json.loads(line) for line in (chain / "preferences.jsonl").read_text().splitlines()]
    rows, _ = held_out(rows)
    prompts = [encode_prompt(tokenizer, question(row["prompt"])) for row in rows]
    replies = sample_replies(sft, tokenizer, prompts, TINY["rm"]["max_new_tokens"], seed=0)
    sequences = [prompt + reply.ids for prompt, reply in zip(prompts, replies)]
    scores = train_rm.score_sequences(reward_model, sequences, tokenizer.pad)
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3


def test_ppo_takes_a_reward_that_needs_no_reward_model(chain, tmp_path):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    last = run("ppo", tmp_path, reward="gold", no_end_score=0.0)
    assert last["proxy"] == pytest.approx(last["gold"])
    rows = [{"prompt": f"Say {i}.", "response": f"#### {i}"} for i in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    last = run("ppo", tmp_path, reward="exact", data=str(tmp_path / "rows.json"))
    assert last["proxy"] == 0 and "gold" not in last  # the tiny model is never right
    for reward, data_file in (("gold", "rows.json"), ("exact", ""), ("best", "")):
        with pytest.raises(SystemExit, match=f"--reward {reward}: there are rm, gold"):
            run("ppo", tmp_path, reward=reward, data=data_file and str(tmp_path / data_file))
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "Hi"}] * 20))
    with pytest.raises(SystemExit, match=r"prompts.json:1 \(row 1\): --reward exact needs"):
        run("ppo", tmp_path, reward="exact", data=str(tmp_path / "prompts.json"))


@pytest.mark.parametrize("loss", ["cdpo", "ipo", "simpo"])
def test_every_variant_of_dpo_trains(chain, tmp_path, loss):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    shutil.copy(chain / "preferences.jsonl", tmp_path)
    numbers = run("dpo", tmp_path, loss=loss, nll=0.1)
    assert numbers["val_loss"] > 0


# ---------------------------------------------------------------------------------------------
# Evaluation, preferences, conversation


def test_evaluation_reports_every_stage(chain):
    evaluate(chain, n_prompts=2 * len(TRAIN_KINDS), n=2, max_new_tokens=6)
    report = json.loads((chain / "report.json").read_text())
    assert list(report["stages"]) == ["base", "sft", "best_of_n", "ppo", "dpo"]
    keys = {
        "gold_mean",
        "gold_ci95",
        "greedy_gold_mean",
        "win_rate_vs_sft",
        "win_rate_ci95",
        "exact_match",
        "f1",
        "refusal_rate",
        "false_refusal_rate",
        "kl_to_sft",
        "response_tokens",
        "no_end_rate",
        "train_seconds",
        "forward_equivalents",
        "by_task",
    }
    for numbers in report["stages"].values():
        assert keys <= numbers.keys()
        low, high = numbers["gold_ci95"]
        assert low <= numbers["gold_mean"] <= high
    sft = report["stages"]["sft"]
    assert sft["gold_mean"] == pytest.approx(0, abs=1e-9) and sft["win_rate_vs_sft"] == 0.5
    assert sft["kl_to_sft"] == 0
    assert {"accuracy", "bayes_accuracy", "ece", "spearman_gold"} <= report["rm"].keys()
    assert (
        report["prompts"] == 2 * len(TRAIN_KINDS)
        and report["seed"] == 0
        and report["temperature"] == 1.0
    )
    text = (chain / "report.md").read_text()
    assert "What is 4-2 and 3-1?" in text and (chain / "report.png").stat().st_size > 10_000


def test_evaluation_reports_what_there_is(chain, tmp_path):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    report = evaluate(tmp_path, n_prompts=2 * len(TRAIN_KINDS), n=2, max_new_tokens=4)
    assert list(report["stages"]) == ["sft"] and "rm" not in report
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(SystemExit, match="run `python train_sft.py` first"):
        evaluate(tmp_path)


def test_preferences_without_a_usable_pair_say_so(chain, tmp_path):
    with pytest.raises(SystemExit, match="no pair is left"):
        make_preferences(
            chain / "sft" / "ckpt.pt", tmp_path / "pairs.jsonl", pairs=10, max_new_tokens=2
        )
    assert not (tmp_path / "pairs.jsonl").exists()


def test_preferences_are_two_different_finished_replies_to_a_prompt(chain, tmp_path, monkeypatch):
    checkpoint = torch.load(chain / "sft" / "ckpt.pt", weights_only=True)
    end = load_tokenizer(checkpoint["tokenizer"]).end
    weights = checkpoint["model"]  # the tiny model never ends a reply: make the end likely
    weights["ln_f.bias"] += 4 * weights["wte.weight"][end] / weights["wte.weight"][end].norm() ** 2
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["x", f"--ckpt={tmp_path}/ckpt.pt", f"--out={tmp_path}/p"])
    sys.argv += ["--pairs=100", "--max_new_tokens=20"]
    data.preferences.main()
    rows = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    assert len(rows) > 20
    for row in rows:
        assert row["chosen"] != row["rejected"] and row["prompt"] and 0 < row["p"] < 1
    made = (tmp_path / "p").stat().st_mtime_ns
    data.preferences.ensure_preferences(tmp_path / "p", tmp_path / "ckpt.pt", 0, 20, "cpu")
    assert (tmp_path / "p").stat().st_mtime_ns == made  # newer than the model: left alone

    monkeypatch.setattr("builtins.input", lambda _: "q")
    sys.argv += ["--human", f"--prompts={tmp_path}/p"]
    data.preferences.main()
    sys.argv[1] = f"--ckpt={chain}/rm/ckpt.pt"
    with pytest.raises(SystemExit, match="rm/ckpt.pt is a reward model: another checkpoint"):
        data.preferences.main()


def test_annotated_rows_say_how_likely_their_label_was():
    rng = random.Random(0)
    tasks = draw_tasks(2000, 1)
    pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
    rows = annotate(tasks, pairs, tau=0.5, flip=0.1, seed=0)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    right = sum(row["gold"][0] > row["gold"][1] for row in rows) / sum(
        row["gold"][0] != row["gold"][1] for row in rows
    )
    sure = [max(row["p"], 1 - row["p"]) for row in rows if row["gold"][0] != row["gold"][1]]
    assert abs(right - sum(sure) / len(sure)) < 0.04


def test_human_preferences_are_written_at_once_and_can_be_stopped(tmp_path, monkeypatch, capsys):
    answers = iter(["2", "maybe", "s", "1", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    question = [{"role": "user", "content": "Hi"}]
    pairs = [(Reply([], f"a{i}", True), Reply([], f"b{i}", True)) for i in range(5)]
    ask_human([question] * 5, pairs, tmp_path / "mine.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b0", "a0"), ("a2", "b2")]


def python(*args, cwd=ROOT, text=None):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, input=text, capture_output=True, text=True
    )


def test_conversation_answers_once_compares_and_talks(chain):
    once = python("gpt.py", "--out", chain, "--prompt", SHOWN[0])
    assert once.returncode == 0 and once.stdout.strip()
    compared = python("gpt.py", "--out", chain, "--compare")
    assert compared.returncode == 0
    for stage in ("pretrain", "sft", "ppo", "dpo"):
        assert len(re.findall(f"^{stage} ", compared.stdout, re.M)) >= 8
    assert f"dpo      {once.stdout}" in compared.stdout  # the others have left its prompt alone
    talk = python(
        "gpt.py", "--ckpt", chain / "sft" / "ckpt.pt", text="Hello\n\n" + "long " * 200 + "\n"
    )
    assert talk.returncode == 0 and "the context of sft has 96" in talk.stdout


# ---------------------------------------------------------------------------------------------
# Bad input


def test_missing_earlier_stage_names_the_command_to_run(tmp_path):
    for stage, needed in (("sft", "pretrain"), ("rm", "sft"), ("ppo", "sft"), ("dpo", "sft")):
        with pytest.raises(SystemExit, match=f"run `python train_{needed}.py` first"):
            run(stage, tmp_path)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "argument --steps: must be at least 1, not 0"),
        (["--context", "1"], "--context 1: a text of two tokens is the shortest"),
        (["--device", "abacus"], "--device abacus: not available here"),
        (["--tokenizer", "words"], "--tokenizer words: there are bpe, char and gpt2"),
        (["--data", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--n_head", "3", "--n_embd", "128"], "--n_head 3 must divide --n_embd 128"),
        (["--optimizer", "sgd"], "--optimizer sgd: there are muon and adamw"),
    ],
)
def test_impossible_option_is_a_clear_error(tmp_path, args, message):
    result = python("train_pretrain.py", "--out", tmp_path, "--documents", 200, *args)
    assert result.returncode != 0 and message in result.stderr
    assert "Traceback" not in result.stderr


def test_option_that_makes_no_sense_is_a_clear_error(chain, tmp_path):
    for stage, option, value in (
        ("ppo", "temperature", 0),
        ("dpo", "beta", 0),
        ("rm", "n_layer", 9),
    ):
        with pytest.raises(SystemExit, match=f"--{option} {value}: "):
            run(stage, tmp_path, init=str(chain / "sft/ckpt.pt"), **{option: value})


def test_gradients_are_cut_to_a_largest_norm_and_0_means_any():
    for largest, expected in ((2.0, [1.2, 1.6]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])):
        model = torch.nn.Linear(2, 1, bias=False)
        (3 * model.weight[0, 0] + 4 * model.weight[0, 1]).backward()
        assert train_pretrain.average_gradients(model, largest) == 5.0
        torch.testing.assert_close(model.weight.grad, torch.tensor([expected]))


@pytest.mark.parametrize(
    "tool, args, message",
    [
        (train_pretrain, "--lr -0.1", "argument --lr: must be at least 0, not -0.1"),
        (train_pretrain, "--lr nan", "argument --lr: must be at least 0, not nan"),
        (gpt, "--top_p 0", "argument --top_p: must be from 0.01 to 1, not 0"),
        (gpt, "--top_k -1", "argument --top_k: must be at least 0, not -1"),
        (gpt, "--max_new_tokens 0", "argument --max_new_tokens: must be at least 1, not 0"),
        (data.preferences, "--flip 2", "argument --flip: must be from 0 to 1, not 2"),
        (data.preferences, "--tau 0", "argument --tau: must be at least 0.01, not 0"),
        (data.evaluate, "--prompts one", "argument --prompts: invalid int value: 'one'"),
        (data.evaluate, "--prompts 5", "argument --prompts: must be at least "),
        (gpt, "--device abacus", "--device abacus: not available here"),
        (data.evaluate, "--device abacus", "--device abacus: not available here"),
        (data.preferences, "--device abacus", "--device abacus: not available here"),
    ],
)
def test_option_out_of_range_is_a_clear_error(monkeypatch, capsys, tool, args, message):
    monkeypatch.setattr(sys, "argv", ["tool", *args.split()])
    with pytest.raises(SystemExit) as stopped:
        parse_config(tool.Config) if tool is train_pretrain else tool.main()
    assert message in capsys.readouterr().err + str(stopped.value)


def test_full_disk_is_a_clear_error_and_leaves_the_earlier_results(tmp_path, monkeypatch):
    run("pretrain", tmp_path)
    before = (tmp_path / "pretrain" / "log.csv").read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_pretrain, "plot", disk_full)
    options = [f"--{name}={value}" for name, value in TINY["pretrain"].items()]
    monkeypatch.setattr(sys, "argv", ["x", f"--out={tmp_path}", "--lr=0.001", *options])
    with pytest.raises(SystemExit, match="No space left.*earlier runs are untouched"):
        train_pretrain.run_script(train_pretrain.main, train_pretrain.Config)
    assert (tmp_path / "pretrain" / "log.csv").read_bytes() == before


def test_a_terminal_that_lacks_a_character_shows_question_marks_and_stops_no_run(
    tmp_path, monkeypatch
):
    options = [f"--{name}={value}" for name, value in TINY["pretrain"].items()]
    monkeypatch.setattr(sys, "argv", ["x", f"--out={tmp_path}", *options])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    train_pretrain.run_script(train_pretrain.main, train_pretrain.Config)
    samples = (tmp_path / "pretrain" / "samples.txt").read_text("utf-8")
    assert not samples.isascii()  # an untrained model writes bytes that are no characters
    sys.stdout.flush()
    assert samples.encode("ascii", "replace") in sys.stdout.buffer.getvalue()

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", ["x", "--ckpt", f"{tmp_path}/pretrain/ckpt.pt", "--prompt=Ü"])
    gpt.main()
    sys.stdout.flush()
    assert b"?" in sys.stdout.buffer.getvalue()


def test_help_lists_every_option_with_its_comment():
    text = python("train_ppo.py", "-h").stdout
    assert (
        "--no_end_score" in text
        and "score of a reply without end" in text
        and "default: -2.0" in text
    )


# ---------------------------------------------------------------------------------------------
# Your own data


def test_all_stages_run_on_files_of_your_own(tmp_path):
    text = "\n".join(f"Line {i} of some book, and {i} more." for i in range(800))
    (tmp_path / "book.txt").write_text(text)
    rows = [
        {
            "instruction": "Say a number.",
            "input": str(i),
            "output": f"{i}!",
            "chosen": f"{i}!",
            "rejected": "No.",
        }
        for i in range(100)
    ]
    rows[7]["instruction"] = "Say " * 200  # does not fit the context
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    run("pretrain", out, data=str(tmp_path / "book.txt"), context=48)
    for stage in ("sft", "rm", "ppo", "dpo"):
        numbers = run(stage, out, data=str(tmp_path / "rows.json"))
        header = (out / stage / "log.csv").read_text().split("\n")[0].split(",")
        assert "gold" not in header  # no gold reward here: no column, rather than zeros
        assert numbers
    assert "gold_order" not in torch.load(out / "rm" / "ckpt.pt", weights_only=True)["report"]


def test_characters_and_a_single_text_can_be_pretrained_on(tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, " * 100)
    numbers = run(
        "pretrain",
        tmp_path,
        data=str(tmp_path / "book.txt"),
        tokenizer="char",
        context=16,
        lr=0.01,
        steps=80,
        eval_every=80,
        save_every=80,
    )
    assert numbers["val_loss"] < 0.7  # ln 9 = 2.2 at the start; what it has read decides the rest
    bits = numbers["val_loss"] / math.log(2)  # one character is one byte here
    assert numbers["bits_per_byte"] == pytest.approx(bits)


# ---------------------------------------------------------------------------------------------
# README


def readme_commands():
    text = (ROOT / "README.md").read_text()
    lines = [
        line.strip()
        for block in re.findall(r"```(?:sh|bash)?\n(.*?)```", text, re.S)
        for line in block.split("\n")
    ]
    lines += re.findall(r"`(python [^`]+)`", text)
    commands = [part.strip() for line in lines for part in line.split("&&")]
    return sorted(
        {command.split(" #")[0].strip() for command in commands if command.startswith("python ")}
    )


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme_still_parse(command, monkeypatch, tmp_path):
    """Every program is started, up to the point where its options have been understood."""
    import argparse

    class Understood(Exception):
        pass

    def parse_args(self, *args):
        original(self, *args)
        raise Understood

    original = argparse.ArgumentParser.parse_args
    words = shlex.split(command)[1:]
    if words[:2] == ["-m", "pytest"]:
        return
    target = ROOT / (words[1].replace(".", "/") + ".py") if words[0] == "-m" else ROOT / words[0]
    monkeypatch.setattr(sys, "argv", [str(target), *words[2 if words[0] == "-m" else 1 :]])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    if target.stem in ("town", "tasks", "tokenizer"):  # these have no options: they just print
        monkeypatch.setattr("builtins.print", lambda *args, **options: None)
        runpy.run_path(str(target), run_name="__main__")
        return
    with pytest.raises(Understood):
        runpy.run_path(str(target), run_name="__main__")


def test_scripts_say_where_they_run_and_what_computes_the_head(capsys):
    train_pretrain.pick_device("cpu")
    assert capsys.readouterr().out == "running on cpu, the fused head in PyTorch\n"
    assert kernels.backend(torch.device("cuda")) == ("Triton" if kernels.triton else "PyTorch")


def test_line_counts_of_the_readme_are_about_right():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 15
    for file, count in rows:
        lines = len((ROOT / file).read_text().splitlines())
        assert abs(lines - int(count)) <= 0.1 * lines + 5, (file, lines)


def test_config_fields_all_have_help():
    for script in SCRIPTS.values():
        original, sys.argv = sys.argv, ["x"]
        try:
            assert parse_config(script.Config) == script.Config()
        finally:
            sys.argv = original
