"""Command lines: every option is checked and explained, wherever a script is started from."""

import argparse
import ast
import concurrent.futures
import io
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from tiny_runs import ROOT, SCRIPTS, TINY, as_options, prepare, same

import data.download
import data.evaluate
import data.preferences
import data.run
import data.talk
import kernels
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from data.check import Check
from data.run import Run, parse_config, printable, run_script, start
from gpt import InputError


def python(*args, **how):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **how)


# ---------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    "tool, args, message",
    [
        (train_pretrain, "--stepz 3", "unrecognized arguments: --stepz"),
        (train_pretrain, "--steps many", "argument --steps: invalid int value: 'many'"),
        (train_pretrain, "--steps 0", "argument --steps: must be at least 1, not 0"),
        (train_pretrain, "--lr -0.1", "argument --lr: must be at least 0, not -0.1"),
        (train_pretrain, "--lr nan", "argument --lr: must be finite, not nan"),
        (train_pretrain, "--lr inf", "argument --lr: must be finite, not inf"),
        (train_pretrain, "--seed 99999999999", "argument --seed: must be less than 2^31, not 9999"),
        (train_pretrain, "--context 1", "error: --context 1: a text of two tokens is the shortest"),
        (train_pretrain, "--n_head 3", "error: --n_head 3 must divide --n_embd 128"),
        (train_pretrain, "--optimizer sgd", "error: --optimizer sgd: there are muon and adamw"),
        (train_pretrain, "--tokenizer words", "--tokenizer words: there are bpe, char and gpt2"),
        (train_pretrain, "--data nowhere.txt", "cannot read nowhere.txt"),
        (train_pretrain, "--device abacus", "--device abacus: there are auto, cpu, cuda and mps"),
        (data.talk, "--top_p 0", "error: --top_p is a probability, above 0 and at most 1, not 0"),
        (data.talk, "--top_k -1", "argument --top_k: must be at least 0, not -1"),
        (data.talk, "--max_new_tokens 0", "argument --max_new_tokens: must be at least 1, not 0"),
        (data.talk, "--device abacus", "--device abacus: there are auto, cpu, cuda and mps"),
        (data.preferences, "--flip 2", "error: --flip is a fraction, from 0 to 1, not 2"),
        (data.preferences, "--tau 0", "error: --tau must be at least 0.01, not 0"),
        (data.preferences, "--prompts x.jsonl", "error: --prompts needs --human"),
        (data.preferences, "--device abacus", "--device abacus: there are auto, cpu, cuda and mps"),
        (data.evaluate, "--prompts one", "argument --prompts: invalid int value: 'one'"),
        (data.evaluate, "--prompts 5", "error: --prompts must be at least "),
        (data.evaluate, "--device abacus", "--device abacus: there are auto, cpu, cuda and mps"),
        (data.download, "--megabytes -1", "argument --megabytes: must be at least 0, not -1"),
        (data.talk, "--trace Hi --prompt Ho", "--prompt and --trace cannot be done at once"),
        (data.talk, "--export x --compare", "--compare and --export cannot be done at once"),
        (data.talk, "--trace Hi --ckpt x.pt", "--trace reads all stages of --out"),
    ],
)
def test_impossible_option_is_a_clear_error(tmp_path, monkeypatch, capsys, tool, args, message):
    where = {data.download: [], train_pretrain: [f"--out={tmp_path}", "--documents=200"]}
    options = where.get(tool, [f"--out={tmp_path}"])
    monkeypatch.setattr(sys, "argv", ["tool", *options, *args.split()])
    with pytest.raises(SystemExit) as stopped:
        run_script(tool.main, getattr(tool, "Config", None))
    assert message in capsys.readouterr().err + str(stopped.value)


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    result = python("train_pretrain.py", "--out", tmp_path, "--device", "abacus")
    assert result.returncode != 0
    assert result.stderr == "--device abacus: there are auto, cpu, cuda and mps\n"


@pytest.mark.parametrize(
    "command, said",
    [
        ("-m data.download tinytales", "there is no source 'tinytales'; there are "),
        ("-m data.experiments.expected nowhere", "one run has no range"),
        ("-m data.experiments.expected nowhere here", "cannot read or write: "),
    ],
)
def test_tools_without_a_config_say_errors_in_one_line_too(command, said):
    result = python(*command.split())
    assert result.returncode and result.stderr.startswith(said) and result.stderr.count("\n") == 1


def test_bytes_that_are_no_text_at_the_keyboard_end_no_conversation(chain):
    command = [sys.executable, "gpt.py", "--out", chain]
    result = subprocess.run(command, cwd=ROOT, input=b"What is \xff?\n", capture_output=True)
    assert result.returncode == 0 and result.stdout.count(b"> ") == 2


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_an_error_in_one_line(error):
    def main():
        raise error("Unable to allocate 9 TiB")

    with pytest.raises(SystemExit, match="out of memory: try a smaller --microbatch.* 9 TiB"):
        run_script(main)


def test_options_are_not_abbreviated_and_may_be_negative_where_their_default_is(
    monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["x", "--no_end_score=-3"])
    assert parse_config(train_ppo.Config).no_end_score == -3
    monkeypatch.setattr(sys, "argv", ["x", "--step", "3"])
    with pytest.raises(SystemExit):
        parse_config(train_pretrain.Config)
    assert "unrecognized arguments: --step 3" in capsys.readouterr().err


def test_devices_are_taken_if_they_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert data.run.find_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert data.run.find_device("auto").type == "cpu"
    with pytest.raises(InputError, match="--device cuda: not available here; try --device cpu"):
        data.run.find_device("cuda")


def test_just_the_five_scripts_share_their_work_among_processes(monkeypatch):
    monkeypatch.setattr(data.run, "WORLD", 2)
    for tool in (data.evaluate, data.preferences, data.talk):
        with pytest.raises(InputError, match="this runs as one process: start it with python"):
            start(tool.Config(device="cpu"))


def test_threads_are_at_most_as_many_as_cpus(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", (taken := []).append)
    start(train_sft.Config(device="cpu", threads=10**6))
    assert taken == [os.cpu_count()]


def test_compile_without_a_compiler_is_a_clear_error(tiny, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="--compile needs a C.. compiler"):
        data.run.set_speed(train_sft.Config(compile=True, bf16=False), tiny)


@pytest.mark.parametrize("name", ["best_of_n", "experiments", "quick", "unfinished", "report.md"])
def test_names_that_the_project_uses_itself_are_taken(tmp_path, name):
    with pytest.raises(InputError, match=f"--name {name}: choose a plain name"):
        data.run.run_path(str(tmp_path), name)


def test_a_name_that_is_a_file_is_refused_before_training(chain, tmp_path):
    prepare(chain, tmp_path, "sft")
    with pytest.raises(InputError, match="preferences.jsonl"):
        Run("sft", train_sft.Config(out=str(tmp_path), name="preferences.jsonl"), {})


def test_memory_is_in_gigabytes_of_1000_to_the_third_bytes():
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert data.run.peak_gb() == pytest.approx(most / 1e9, rel=0.02)


def test_every_option_has_a_help_text():
    """It is the comment beside its field: a field without one fails here."""
    for module in (*SCRIPTS.values(), data.talk, data.preferences, data.evaluate):
        original, sys.argv = sys.argv, ["x"]
        try:
            assert parse_config(module.Config) == module.Config()
        finally:
            sys.argv = original
    text = python("train_ppo.py", "-h").stdout
    assert "score of a response without an end" in text and "(default: -2.0)" in text


def test_scripts_say_where_they_run_only_if_it_is_not_one_process_on_the_cpu(capsys, monkeypatch):
    start(train_sft.Config())
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(data.run, "find_device", lambda name: torch.device("cuda"))
    start(train_sft.Config())
    backend = "Triton" if kernels.triton and torch.version.cuda else "PyTorch"
    assert capsys.readouterr().out == f"running on cuda; kernels.py uses {backend}\n"


def test_check_takes_a_default_that_is_spelled_out_for_the_default(capsys):
    Check("sft", train_sft.Config(init="out/pretrain/ckpt.pt"))
    Check("rm", train_rm.Config(init="out/sft/ckpt.pt", data="out/preferences.jsonl"))
    Check("dpo", train_dpo.Config(init="here/sft/ckpt.pt", out="here", name="mine"))
    assert capsys.readouterr().out == ""
    Check("dpo", train_dpo.Config(init="there/sft/ckpt.pt", out="here"))
    said = "check: the bands are of --init 'here/sft/ckpt.pt', not of 'there/sft/ckpt.pt'\n"
    assert capsys.readouterr().out == said


# ---------------------------------------------------------------------------------------------
# Where a script may be started, and where its output may go


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_stage_runs_in_a_notebook(chain, tmp_path, monkeypatch, stage):
    """No terminal, an output stream that cannot be reconfigured, and a thread that gets no signals:
    the stage runs to its end, and learns the same to the last bit."""
    prepare(chain, tmp_path, stage)
    monkeypatch.setattr(sys, "argv", ["notebook", *as_options({**TINY[stage], "out": tmp_path})])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not hasattr(sys.stdout, "reconfigure")
    script = SCRIPTS[stage]
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(run_script, script.main, script.Config).result()
    assert f"results in {tmp_path}/{stage}/" in sys.stdout.getvalue()
    assert same(tmp_path / stage, chain / stage)


def test_a_reader_who_has_gone_ends_a_program_without_a_traceback():
    """As in `python -m data.town | head`."""
    reader, writer = os.pipe()
    os.close(reader)  # whatever is written now has nobody to go to
    command = [sys.executable, "-m", "data.town"]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.stderr == "" and result.returncode == 1


def test_a_terminal_that_lacks_a_character_shows_question_marks_and_stops_no_run(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["x", *as_options({**TINY["pretrain"], "out": tmp_path})])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_script(train_pretrain.main, train_pretrain.Config)
    samples = (tmp_path / "pretrain" / "samples.txt").read_text("utf-8")
    assert not samples.isascii()  # an untrained model writes bytes that are no characters
    assert printable(samples).encode("ascii", "replace") in sys.stdout.buffer.getvalue()

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", ["x", "--ckpt", f"{tmp_path}/pretrain/ckpt.pt", "--prompt=Ü"])
    run_script(data.talk.main, data.talk.Config)
    assert b"?" in sys.stdout.buffer.getvalue()


def test_control_sequences_of_a_file_or_a_model_reach_no_terminal(tmp_path, monkeypatch, capsys):
    """Else a row of a file could clear the screen, or write somebody's password into its title."""
    run_script(lambda: print("\x1b[31mred\x07 \x9b2J, two\r\n\tlines: Zürich 🦉"))
    assert capsys.readouterr().out == "\\x1b[31mred\\x07 \\x9b2J, two\\r\n\tlines: Zürich 🦉\n"
    for stage in ("sft", "rm", "ppo", "dpo"):
        monkeypatch.setattr(sys, "argv", [stage, "--out", str(tmp_path)])
        monkeypatch.setattr(SCRIPTS[stage], "load_init", lambda *_: fail_with("\x1b[2J"))
        with pytest.raises(SystemExit, match=r"^\\x1b\[2J$"):
            run_script(SCRIPTS[stage].main, SCRIPTS[stage].Config)


def fail_with(message):
    raise InputError(message)


def test_an_error_of_ours_is_a_value_error_and_a_mistake_in_the_code_keeps_its_traceback():
    """The first a user can mend; of the second only the traceback says where it is."""
    with pytest.raises(SystemExit, match="^mend me$"):
        run_script(lambda: fail_with("mend me"))
    assert issubclass(InputError, ValueError)
    with pytest.raises(ValueError, match="^not enough values to unpack"):
        run_script(lambda: exec("a, b = [1]"))


# ---------------------------------------------------------------------------------------------
# Commands that are written down somewhere


def written_commands():
    """Every command that starts a program of ours, in the README and in the files' docstrings."""
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = re.findall(r"`((?:python|torchrun)\s[^`]+)`", readme)
    for block in re.findall(r"```(?:sh|bash|console)?\n(.*?)```", readme, re.S):
        lines += block.replace("\\\n", " ").split("\n")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]:
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        lines += re.findall(r"^ *(?:run +)?((?:python|torchrun) .+?)(?:   .*)?$", docstring, re.M)
    commands = set()
    for line in lines:
        for part in re.split(r"&&|;|\|", line.split(" #")[0]):
            part = " ".join(part.split())
            part = re.sub(r"^(\$ )?(\w+=\S+ )*", "", part)  # a prompt, VARIABLE=value
            if re.match(r"python (\S+\.py|-m data[.\w]+)( |$)|torchrun .+\.py", part):
                commands.add(part)
    return sorted(commands)


@pytest.mark.parametrize("command", written_commands())
def test_commands_that_are_written_down_are_understood(command, monkeypatch):
    """Every program is started, up to the point where it knows its options."""

    class Understood(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def stop_after_parsing(self, *args):
        parse_args(self, *args)
        raise Understood

    def stop_after_config(main, config_class=None):  # instead of run_script
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        if config_class:
            parse_config(config_class)
        raise Understood

    words = shlex.split(command)[1:]
    while words[0] != "-m" and not words[0].endswith(".py"):
        words.pop(0)  # torchrun's own options
    if words[0] == "-m":
        words.pop(0)
        target = ROOT / words[0].replace(".", "/")
        target = next(x for x in (target.with_suffix(".py"), target / "__main__.py") if x.exists())
    else:
        target = ROOT / words[0]
    monkeypatch.setattr(sys, "argv", [str(target), *words[1:]])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
    monkeypatch.setattr(data.run, "run_script", stop_after_config)
    if "run_script" not in target.read_text() and "ArgumentParser" not in target.read_text():
        runpy.run_path(str(target), run_name="__main__")  # no options: it just prints
        return
    with pytest.raises(Understood):
        runpy.run_path(str(target), run_name="__main__")
