"""The course kit: what students get, what grading says, and that nobody gains by cheating."""

import ast
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import types
import zipfile

import course
import grading
import leaderboard
import pytest
from exercises import BY_NAME, EXERCISES
from mutants import MUTANTS
from tiny_runs import ROOT, TINY, as_options

HERE = ROOT / "tests"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux only")


def run_python(*args, cwd=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """Grading goes to the project's folder; afterwards tests are where they were."""
    monkeypatch.chdir(ROOT)


def grade(handin, names):
    """Grade a folder. Returns the entries of results.json, two by exercise, under their names:
    "gae" is that of its visible tests, and "gae, hidden"."""
    args = types.SimpleNamespace(secret="s", results=handin.parent / "results.json", github=False)
    assert course.grade_handin(handin, [BY_NAME[name] for name in names], args) == 0
    tests = json.loads(args.results.read_text("utf-8"))["tests"]
    return {re.sub(r" \(.*?\)", "", test["name"]): test for test in tests}


def put(handin, file, text):
    """A file of a hand-in."""
    (handin / file).parent.mkdir(parents=True, exist_ok=True)
    (handin / file).write_text(text, "utf-8")


def with_function(exercise, code, source=None):
    """The source of an exercise's file, with code in place of its function."""
    source = source or (ROOT / exercise.file).read_text("utf-8")
    node = grading.find_function(source, exercise.function, exercise.file)
    lines = source.split("\n")
    code = "\n".join(" " * node.col_offset + line for line in code.strip().split("\n"))
    return "\n".join([*lines[: node.lineno - 1], code, *lines[node.end_lineno :]])


def call_course(monkeypatch, *args):
    """The command line, in this process: what it exits with."""
    monkeypatch.setattr(sys, "argv", ["course.py", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        course.run_script(course.main)
    return stopped.value.code


# ---------------------------------------------------------------------------------------------
# Exercises


def test_every_exercise_is_complete():
    assert len(BY_NAME) == len(EXERCISES) and sum(e.points for e in EXERCISES) == 100
    assert [e.week for e in EXERCISES] == sorted(e.week for e in EXERCISES)
    for e in EXERCISES:
        assert e.questions and all(re.fullmatch(r".+[.?]\n.+", both) for both in e.questions), (
            e.name
        )
        assert e.minutes > 0 and all(weight > 0 and hint for weight, hint in e.tests.values())
        for test in e.tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (HERE / file).read_text("utf-8"), test


@pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.name)
def test_a_blank_keeps_signature_docstring_and_all_else(e):
    source = (ROOT / e.file).read_text("utf-8")
    blank = course.blank(source, e)
    before, after = (grading.find_function(s, e.function, e.file) for s in (source, blank))
    assert ast.unparse(before.args) == ast.unparse(after.args)
    assert ast.get_docstring(before) == ast.get_docstring(after) is not None
    assert ast.unparse(after.body[-1]) == f"raise NotImplementedError('{e.name}: your code here')"
    assert len(after.body) == e.keep + 2 <= len(before.body)
    emptied = []
    for text in (source, blank):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.lineno == before.lineno:
                node.body = []
        emptied.append(ast.dump(tree))
    assert emptied[0] == emptied[1]


def test_known_mistakes_change_what_the_function_returns_and_differ_from_each_other():
    names = [e.name for e in EXERCISES]
    notes, stopped = grading.in_process(grading.right_answers, names, "s", seconds=300)
    assert not stopped
    answers = {}
    for name, kind, _, value in notes:
        answers.setdefault(name, {}).setdefault(kind, []).append(value)
    for e in EXERCISES:
        right = answers[e.name]["public"]
        assert not [value for value in right if isinstance(value, dict) and "error" in value]
        assert not grading.same(right, answers[e.name]["hidden"]) or e.name in ("lr_at",)
        known = grading.known_mistakes(e)
        for number, (sentence, _) in enumerate(known):
            wrong = answers[e.name][number]
            assert not grading.same(wrong, right), f"{e.name}: {sentence}"
            for other in range(number):
                alike = grading.same(wrong, answers[e.name][other])
                assert not alike or known[other][0] == sentence, f"{e.name}: {sentence}"


# ---------------------------------------------------------------------------------------------
# The students' copy


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """All exercises blank, in a folder with a space in its path."""
    where = tmp_path_factory.mktemp("a course") / "copy"
    course.student_copy(where, range(1, 10), "7")
    return where


def test_what_else_lies_in_a_teachers_folder_is_not_copied(tmp_path, monkeypatch):
    for where in (ROOT, *(ROOT / name for name in ("data", "tests"))):
        names = [path.name for path in where.iterdir() if path.suffix in (".py", ".md", ".txt")]
        (tmp_path / "own" / where.relative_to(ROOT)).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(where / name, tmp_path / "own" / where.relative_to(ROOT))
    for name in (".gitignore", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "own")
    for name in ("mine.py", "grades.txt", "notes.md"):
        (tmp_path / "own" / name).write_text("the key")
    monkeypatch.setattr(course, "ROOT", tmp_path / "own")
    course.copy_project(tmp_path / "copy")
    course.pack_gradescope(tmp_path / "g.zip", range(1, 3), "s")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    names |= {name.rpartition("/")[2] for name in zipfile.ZipFile(tmp_path / "g.zip").namelist()}
    assert "gpt.py" in names and not names & {"mine.py", "grades.txt", "notes.md"}


def test_a_students_copy_has_no_solution_key_mutant_or_history(copy):
    project = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]
    everywhere = "\n".join(path.read_text("utf-8") for path in project)
    files = [path for path in copy.rglob("*") if path.is_file()]
    texts = [path.read_text("utf-8") for path in files if path.suffix in (".py", ".md", ".json")]
    handed_out = "\n".join(texts)
    for e in EXERCISES:
        text = grading.function_text(e)
        body = ast.parse(textwrap.dedent(text)).body[0].body[e.keep + 1 :]
        lines = text.split("\n")[body[0].lineno - 1 :]
        own = [x.strip() for x in lines if len(x.strip()) > 25 and everywhere.count(x.strip()) == 1]
        assert own and not [line for line in own if line in handed_out], e.name
        assert not [both for both in e.questions if both.partition("\n")[2][:40] in handed_out]
    assert not [mutant for mutant in MUTANTS if mutant.symptom in handed_out]
    names = {path.relative_to(copy).as_posix() for path in files}
    secret = r"mutants|exercises\.py|course|grading|leaderboard|labs|\.git/|broken"
    assert not [name for name in names if re.search(secret, name)]
    for file in ("README.md", "data/experiments/README.md", "data/experiments/__init__.py"):
        text = (copy / file).read_text("utf-8")
        assert not re.search(r"\bbroken\b|mutants\.py|tests/README", text), file
    run = run_python("-m", "data.experiments", "--only", "broken", cwd=copy)
    assert "there are frontier, critics, overoptimisation, pairs, tasks, but not 'broken'" in (
        " ".join(run.stderr.split())
    )


def test_a_students_copy_has_its_tests_a_handout_and_another_town(copy):
    handout = (copy / "HANDOUT.md").read_text("utf-8")
    told = json.loads((copy / "tests/exercises.json").read_text("utf-8"))
    assert list(told) == [e.name for e in EXERCISES]
    assert "**Hand in** the files named in the table" in handout and "Copy `out/`" in handout
    for e in EXERCISES:
        assert f"python tests/try_exercise.py {e.name}`" in handout and e.equation in handout
        assert all(f". {both.partition(chr(10))[0]}\n" in handout for both in e.questions)
    found = run_python("-m", "pytest", "--collect-only", "-q", cwd=copy).stdout
    for e in EXERCISES:
        assert all(f"tests/{test}" in found for test in e.tests), e.name
    words = [(where / "data/town/words.py").read_text("utf-8") for where in (ROOT, copy)]
    tables = []
    for text in words:
        module = {"__name__": "words"}
        exec(compile(text, "words.py", "exec"), module)
        tables.append([tuple(resident) for resident in module["RESIDENTS"]])
    old, new = tables
    assert [r[:3] for r in old] == [r[:3] for r in new] and old[:2] == new[:2]
    for before, after in list(zip(zip(*old), zip(*new)))[3:]:  # places, foods, colours
        assert sorted(before) == sorted(after) and before != after
    assert course.other_facts(words[0], "7") == words[1] != course.other_facts(words[0], "8")


def test_a_student_tries_an_exercise_and_reads_which_claims_fail(copy):
    run = run_python("tests/try_exercise.py", "gae", cwd=copy)
    assert run.returncode == 1 and "Traceback" not in run.stdout + run.stderr
    assert "FAILS: values outside the response change no advantage" in run.stdout
    assert "NotImplementedError: gae: your code here (train_ppo.py, line" in run.stdout
    assert "hint: What the critic says where the mask is 0 is garbage" in run.stdout
    run = run_python("tests/try_exercise.py", "nothing", cwd=copy)
    assert run.returncode == 1 and run.stderr.startswith("there is no exercise nothing: there are")
    run = run_python("tests/try_exercise.py", "gae")
    assert run.returncode == 1 and run.stderr.startswith("run this in a student's copy")


def test_a_student_is_told_what_the_grader_will_not_take(tmp_path):
    course.student_copy(tmp_path / "copy", range(5, 6), "")
    helper = "def last(row):\n    return len(row) - 1\n\n\n"
    code = "def preference_loss(chosen_scores, rejected_scores):\n    return nn.logsigmoid("
    code += "chosen_scores - rejected_scores).mean().neg()\n"
    source = with_function(BY_NAME["preference_loss"], code)
    put(tmp_path / "copy", "train_rm.py", source + f"\n\n{helper}nn = F\n")
    run = run_python("tests/try_exercise.py", "preference_loss", cwd=tmp_path / "copy")
    assert run.returncode == 0 and "FAILS" not in run.stdout, run.stdout
    said = " ".join(run.stdout.split())
    assert "note: last, nn at the top level of train_rm.py is new, and the grader takes" in said
    said = grade(tmp_path / "copy", ["preference_loss"])["preference_loss"]["output"]
    assert "name 'nn' is not defined; only the function itself is taken" in said


def test_exercises_of_other_weeks_are_solved_since_scripts_need_them(tmp_path):
    course.student_copy(tmp_path / "copy", range(4, 6), "")
    for e in EXERCISES:
        text = (tmp_path / "copy" / e.file).read_text("utf-8")
        assert (f"{e.name}: your code here" in text) == (e.week in (4, 5))
    told = json.loads((tmp_path / "copy/tests/exercises.json").read_text("utf-8"))
    assert list(told) == [e.name for e in EXERCISES if e.week in (4, 5)]
    with pytest.raises(SystemExit, match="is there already, and not empty"):
        course.student_copy(tmp_path / "copy", range(4, 6), "")


def test_a_solved_copy_has_everything_in_another_town(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_python(HERE / "course.py", "--solved", "town 3", "--seed", "3", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    where = tmp_path / "town 3"
    files = {path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.p*"))}
    files |= {path.relative_to(ROOT) for path in ROOT.glob("data/**/*.py")}
    files = {path for path in files if "__pycache__" not in path.parts}
    changed = [p for p in files if (where / p).read_bytes() != (ROOT / p).read_bytes()]
    assert [path.as_posix() for path in changed] == ["data/town/words.py"]


@pytest.mark.thorough
def test_a_stage_needs_no_exercise_of_a_later_week(tmp_path, chain):
    course.student_copy(tmp_path / "copy", range(8, 9), "")  # PPO needs the gradient of week 9
    options = as_options({**TINY["ppo"], "out": str(chain), "name": "of_a_student"})
    run = run_python("train_ppo.py", *options, cwd=tmp_path / "copy")
    assert run.returncode == 0, run.stderr


@pytest.mark.thorough
def test_all_tests_of_the_town_pass_in_another_town(tmp_path):
    course.solved_copy(tmp_path / "copy", "3")
    files = ["test_town.py", "test_chat.py", "test_preferences.py"]
    run = run_python(
        "-m", "pytest", "-q", *(f"tests/{file}" for file in files), cwd=tmp_path / "copy"
    )
    assert run.returncode == 0, run.stdout[-3000:]


# ---------------------------------------------------------------------------------------------
# Grading


def test_the_project_itself_gets_every_point():
    results = grading.grade(ROOT, [e.name for e in EXERCISES], "s")
    assert [r["name"] for r in results if r["status"] != "passed"] == []
    assert sum(r["score"] for r in results) == pytest.approx(100)


# How students get it wrong: (exercise, their function, what they are told).
WRONG = [
    (
        "gae",
        """
def gae(rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(rewards)
    running = 0
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask
""",
        "Advantages of last tokens depend on what the critic says about padding",
    ),
    (
        "policy_loss",
        """
def policy_loss(logprobs, old_logprobs, advantages, clip):
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    return torch.min(-ratio * advantages, -clipped * advantages), ratio
""",
        "the policy jumps away as if there were no clipping",
    ),
    (
        "policy_loss",
        """
def policy_loss(logprobs, old_logprobs, advantages, clip):
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), ratio
""",
        "You return the mean: a loss per token",
    ),
    (
        "dpo_loss",
        """
def dpo_loss(logprobs, ref_logprobs, lengths, cfg):
    h = (logprobs[0] - ref_logprobs[0]) - (logprobs[1] - ref_logprobs[1])
    return -F.logsigmoid(cfg.beta * h).mean()
""",
        "Only DPO, and its mean",
    ),
    (
        "dpo_loss",
        """
def dpo_loss(logprobs, ref_logprobs, lengths, cfg):
    return -F.logsigmoid(cfg.beta * (logprobs[0] - logprobs[1]))
""",
        "The reference is left out",
    ),
    (
        "sft_loss",
        """
def sft_loss(model, tokens, mask, reduction="mean"):
    logits = model(tokens) @ model.head.T
    return F_cross_entropy(logits[mask], tokens[mask], reduction=reduction)
""".replace("F_cross", "torch.nn.functional.cross"),
        "Not shifted",
    ),
    (
        "sft_loss",
        """
def sft_loss(model, tokens, mask, reduction="mean"):
    hidden = model(tokens[:, :-1]).flatten(0, 1)
    return linear_cross_entropy(hidden, model.head, tokens[:, 1:].flatten(), reduction=reduction)
""",
        "The loss is lower than expected, since padding is easy to predict",
    ),
    (
        "preference_loss",
        """
def preference_loss(chosen_scores, rejected_scores):
    return -torch.log(torch.sigmoid(chosen_scores - rejected_scores)).mean()
""",
        "Training is fine until one pair is very wrong; then everything is nan",
    ),
    (
        "preference_loss",
        """
def preference_loss(chosen_scores, rejected_scores):
    return -F.logsigmoid(rejected_scores - chosen_scores).mean()
""",
        "Held-out accuracy is well below one half",
    ),
    (
        "attention",
        """
def forward(self, x, layer=None, cache=None, positions=None, mask=None):
    B, T, C = x.shape
    q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
    if cache is not None:
        k, v = cache.update(layer, positions, mask, k, v)
    scores = q @ k.transpose(2, 3)
    if mask is None:
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    else:
        scores = scores + mask
    return self.c_proj((scores.softmax(3) @ v).transpose(1, 2).reshape(B, T, C))
""",
        "attention looks at single tokens only",
    ),
    (
        "attention",
        """
def forward(self, x, layer=None, cache=None, positions=None, mask=None):
    B, T, C = x.shape
    hs = C // self.n_head
    q, k, v = self.c_attn(x).split(C, dim=2)
    q, k, v = (part.view(B, T, self.n_head, hs).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(2, 3) / hs**0.5
    scores = scores.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
    return self.c_proj((scores.softmax(3) @ v).transpose(1, 2).reshape(B, T, C))
""",
        "The cache is left out",
    ),
]


FIRST = {name: (code, hint) for name, code, hint in reversed(WRONG)}
SECOND = {name: (code, hint) for name, code, hint in WRONG if (code, hint) != FIRST[name]}


@pytest.mark.parametrize("answers", [FIRST, SECOND], ids=["first", "second"])
def test_each_of_eleven_typical_wrong_answers_loses_points_and_is_told_why(tmp_path, answers):
    assert len(FIRST) + len(SECOND) == 11
    handin = tmp_path / "hand in"
    for name, (code, _) in answers.items():
        path = handin / BY_NAME[name].file
        source = path.read_text("utf-8") if path.exists() else None
        put(handin, BY_NAME[name].file, with_function(BY_NAME[name], code, source))
    results = grade(handin, answers)
    for name, (_, hint) in answers.items():
        said = results[name]["output"]
        assert hint in said and "FAILS:" in said and "hint:" in said, said
        assert "the smallest case: " in said and "expected" in said and "got" in said
        assert results[name]["score"] < results[name]["max_score"]
        assert results[f"{name}, hidden"]["score"] < results[f"{name}, hidden"]["max_score"]


HOSTILE = """
def preference_loss(chosen_scores, rejected_scores):
    {}
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()
"""


@pytest.mark.parametrize(
    "line, said",
    [
        ("open('/tmp/x', 'w').write('')", "PermissionError: /tmp/x may not be written"),
        ("import socket; socket.create_connection(('192.0.2.1', 80))", "socket.getaddrinfo is not"),
        ("import subprocess; subprocess.run(['ls'])", "subprocess.Popen is not allowed"),
        ("import os; os.kill(os.getppid(), 9)", "os.kill is not allowed here"),
        ("import os; os.killpg(0, 9)", "os.killpg is not allowed here"),
        ("import os; os.forkpty()", "os.forkpty is not allowed here"),
        ("import os; os.spawnv(os.P_WAIT, '/bin/true', ['true'])", "is not allowed here"),
        ("return open('train_rm.py').read()", "PermissionError: train_rm.py is closed"),
        (
            "return open('__pycache__/train_rm.cpython-311.pyc')",
            "train_rm.cpython-311.pyc is closed",
        ),
        ("return open('tests/exercises.py').read()", "PermissionError: tests/exercises.py is"),
        ("return open('.git/HEAD').read()", "PermissionError: .git/HEAD is closed"),
        ("return open('/proc/self/cmdline').read()", "PermissionError: /proc/self/cmdline is"),
        ("return open('/autograder/source/run_autograder').read()", "run_autograder is closed"),
        ("raise ValueError(__import__('exercises').EXERCISES[0].questions)", "ValueError: None"),
        ("torch.zeros(2**33)", "allocate memory"),
        ("while True: pass", "stopped after 4 seconds: does a loop ever end?"),
        ("import os; os._exit(0)", "the process ended before its tests did (exit code 0)"),
        ("return helper(chosen_scores)", "NameError: name 'helper' is not defined; only the func"),
        ("return chosen_scores.mean().item()", "AttributeError: 'float' object has no attribute"),
    ],
)
def test_what_a_function_does_to_the_grader_fails_and_is_said(tmp_path, line, said):
    handin = tmp_path / "handin"
    e = BY_NAME["preference_loss"]
    put(handin, e.file, with_function(e, HOSTILE.format(line)))
    visible, hidden = grading.grade(handin, [e.name], "s", seconds=4 if "while" in line else 60)
    assert said in visible["output"], visible["output"]
    assert visible["score"] == hidden["score"] == 0


SEARCH = """(lambda sys, gc: 'found ' + str(
        [f.__code__.co_filename for f in gc.get_objects() if type(f).__name__ == 'function'
         and f.__name__ == 'preference_loss' and 'chosen_scores' in f.__code__.co_varnames
         and 'hand' not in f.__code__.co_filename]
        + [name for depth in range(9) for name in sys._getframe(depth).f_locals
           if name in ('answers', 'expected')]
    ))(__import__('sys'), __import__('gc'))"""


def test_neither_the_projects_own_function_nor_an_answer_is_in_the_memory_of_a_hand_in(tmp_path):
    """In a process of its own: in this one, other tests hold the functions that they test."""
    e = BY_NAME["preference_loss"]
    hostile = HOSTILE.format(f"raise ValueError({SEARCH})")
    put(tmp_path / "handin", e.file, with_function(e, hostile))
    options = ["--grade", "handin", "--exercise", e.name, "--secret", "s"]
    run = run_python(HERE / "course.py", *options, cwd=tmp_path)
    assert "got      ValueError: found []" in run.stdout, run.stdout + run.stderr


def test_half_a_message_keeps_nobody_waiting():
    notes, stopped = grading.in_process(say_half, seconds=3)
    assert notes == [["whole"]] and stopped == "stopped after 3 seconds: does a loop ever end?"


def say_half(note):
    note("whole")
    pipe = next(a for a in sys._getframe(1).f_locals.values() if hasattr(a, "send_bytes"))
    os.write(pipe.fileno(), b"\0\0\0\x09half")
    time.sleep(60)


def test_a_nested_folder_and_a_mark_at_the_beginning_of_a_file_cost_nothing(tmp_path):
    e = BY_NAME["encode_chat"]
    source = (ROOT / e.file).read_text("utf-8")
    put(tmp_path / "handin", f"week4/{e.file}", "\ufeff" + source)
    put(tmp_path / "handin", f"__MACOSX/week4/data/._{e.file[5:]}", "resource")
    assert {test["status"] for test in grade(tmp_path / "handin", [e.name]).values()} == {"passed"}
    put(tmp_path / "handin", "old/chat.py", source)
    said = grade(tmp_path / "handin", [e.name])[e.name]["output"]
    assert said == "data/chat.py is there 2 times: hand in one"
    (tmp_path / "linked/data").mkdir(parents=True)
    (tmp_path / "linked" / e.file).symlink_to(ROOT / e.file)  # the solution, in any container
    said = grade(tmp_path / "linked", [e.name])[e.name]["output"]
    assert said == "data/chat.py is a link: hand in the file itself"


def test_paths_are_those_of_the_callers_folder(tmp_path):
    put(tmp_path / "hand in", "train_rm.py", (ROOT / "train_rm.py").read_text("utf-8"))
    options = ["--grade", "hand in", "--exercise", "preference_loss", "--results", "r.json"]
    run = run_python(HERE / "course.py", *options, "--secret", "x", cwd=tmp_path)
    assert run.stdout.endswith("4.0 of 4.0 points\n"), run.stdout + run.stderr
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["tests"]


def test_a_secret_is_not_in_a_process_in_which_code_of_students_runs(tmp_path):
    e = BY_NAME["preference_loss"]
    look = """
    import sys, traceback
    frames = [frame.f_locals for frame, _ in traceback.walk_stack(None)]
    found = [name for some in frames for name in some if 'sword' + 'fish' in str(some[name])]
    raise ValueError(found + sys.argv[1:])
    """
    put(tmp_path / "handin", e.file, with_function(e, HOSTILE.format(look.strip())))
    options = ["--grade", "handin", "--exercise", e.name, "--secret", "swordfish"]
    run = run_python(HERE / "course.py", *options, cwd=tmp_path)
    assert "got      ValueError: []" in run.stdout, run.stdout + run.stderr


def test_feedback_names_the_number_and_the_line_that_are_wrong(tmp_path):
    """Among many numbers, in cases of which some are right, and below the standard library."""
    e = BY_NAME["gae"]
    code = grading.function_text(e)
    blanks = "    if len(rewards) > 1:\n        raise NotImplementedError('later')\n"
    code = code.replace("    advantages = torch.zeros", blanks + "    advantages = torch.zeros", 1)
    put(tmp_path / "some", e.file, with_function(e, code))
    said = grade(tmp_path / "some", ["gae"])["gae"]["output"]
    assert "the smallest case: gae(" in said and "FAILS:" in said
    line = code.split("\n").index("        raise NotImplementedError('later')")
    node = grading.find_function((tmp_path / "some" / e.file).read_text("utf-8"), "gae", e.file)
    assert f"NotImplementedError: later (train_ppo.py, line {node.lineno + line})" in said

    e = BY_NAME["preference_loss"]
    put(tmp_path / "lib", e.file, with_function(e, HOSTILE.format("__import__('json').loads('x')")))
    said = grade(tmp_path / "lib", [e.name])[e.name]["output"]
    assert said.count("(train_rm.py, line ") == 5 and "decoder.py" not in said, said

    large = {"shape": [4, 5], "numbers": [float(i) for i in range(20)]}
    wrong = {"shape": [4, 5], "numbers": [float(i + (i == 13)) for i in range(20)]}
    assert grading.difference([large, large], [large, wrong]) == (
        "result 1: at [2, 3]: 13",
        "result 1: at [2, 3]: 14",
    )


def test_a_case_that_did_not_run_is_none_that_passed():
    test = next(iter(BY_NAME["train_bpe"].tests))
    notes = [("test", f"{test}[{n}]", False, "it did not run") for n in range(5)]
    notes += [("test", f"{test}[0]", True, "")]
    total = sum(weight for weight, _ in BY_NAME["train_bpe"].tests.values())
    reached, lines = grading.try_claims(BY_NAME["train_bpe"], notes)
    assert reached == pytest.approx(BY_NAME["train_bpe"].tests[test][0] / 5 / total)
    assert "(1 of 5)" in lines[0] and lines[1].strip() == "it did not run"


@pytest.mark.parametrize(
    "name, code",
    [
        (
            "token_rewards",
            """
def token_rewards(scores, logprobs, ref_logprobs, mask, beta, estimate="k1"):
    rewards = -beta * kl_estimate(logprobs - ref_logprobs, estimate)
    rewards = torch.where(mask, rewards, 0.0)
    for row, score in enumerate(scores):
        rewards[row, mask[row].nonzero()[-1, 0]] += score
    return rewards
""",
        ),
        (
            "lr_at",
            """
def lr_at(step, steps, warmup, floor=0.0):
    if step < warmup:
        up = (step + 1) / warmup
    else:
        up = 1.0
    return min(up, 1, floor + (1 - floor) * (steps - step) / max(steps - warmup, 1))
""",
        ),
        (
            "group_advantages",
            """
def group_advantages(totals, prompts, how):
    result = torch.zeros_like(totals)
    for prompt in set(prompts.tolist()):
        mine = prompts == prompt
        x = totals[mine]
        a = x - x.mean()
        if how == "rloo":
            a = x - (x.sum() - x) / (len(x) - 1)
        if how == "grpo":
            a = a / (x.std(correction=0) + 1e-4)
        result[mine] = a
    return result
""",
        ),
        (
            "sample",
            """
def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids]
    logits = logits.double() / max(temperature, 1e-9)
    order = logits.argsort(-1, descending=True)
    p = logits.gather(1, order).softmax(-1)
    rank = torch.arange(p.shape[1])
    out = (p.cumsum(-1) - p >= top_p) & (top_p < 1) & (rank > 0)
    if top_k:
        out = out | (rank >= top_k)
    p = p.masked_fill(out, 0)
    p = p / p.sum(-1, keepdim=True)
    at = torch.multinomial(p, 1, generator=generator)
    return order.gather(1, at).squeeze(1), p.gather(1, at).squeeze(1).log().float()
""",
        ),
    ],
)
def test_what_the_handout_says_is_enough(tmp_path, name, code):
    """Written by the equation, in another way than ours."""
    e = BY_NAME[name]
    put(tmp_path / "handin", e.file, with_function(e, code))
    results = grade(tmp_path / "handin", [name])
    assert {test["status"] for test in results.values()} == {"passed"}, results


def test_one_broken_file_costs_its_exercises_alone(tmp_path):
    """A syntax error, a missing file, a missing function, code outside of it, a flat hand-in."""
    handin = tmp_path / "handin"
    put(handin, "train_rm.py", (ROOT / "train_rm.py").read_text("utf-8").replace("):", ")", 1))
    put(handin, "train_dpo.py", "raise SystemExit('nothing outside of a function is run')\n\n")
    with open(handin / "train_dpo.py", "a", encoding="utf-8") as file:
        file.write(grading.function_text(BY_NAME["sequence_logprobs"]))
    put(handin, "chat.py", (ROOT / "data/chat.py").read_text("utf-8"))  # not in data/
    names = "encode_chat,sft_loss,preference_loss,sequence_logprobs,dpo_loss"
    results = grade(handin, names.split(","))
    assert results["encode_chat"]["status"] == results["sequence_logprobs"]["status"] == "passed"
    said = {name: test["output"] for name, test in results.items() if test["score"] == 0}
    assert re.fullmatch(r"train_rm.py, line \d+: expected ':'", said["preference_loss"])
    assert said["sft_loss"] == "train_sft.py is missing: hand it in under this name"
    assert said["dpo_loss"].startswith("train_dpo.py has no dpo_loss: keep the names")
    assert len(said) == 6  # visible and hidden
    assert {test["visibility"] for test in results.values()} == {"visible", "after_due_date"}


def test_github_sees_the_visible_tests_a_summary_and_an_exit_code(tmp_path, monkeypatch, capsys):
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    e = BY_NAME["lr_at"]
    for code, text in (
        (0, None),
        (1, "def lr_at(step, steps, warmup, floor=0.0):\n    return 1.0"),
    ):
        handin = tmp_path / f"handin {code}"
        put(handin, e.file, with_function(e, text) if text else (ROOT / e.file).read_text("utf-8"))
        args = types.SimpleNamespace(secret="s", results=None, github=True)
        assert course.grade_handin(handin, [e], args) == code
    said = capsys.readouterr().out
    assert "1.8 of 1.8 points" in said and "0.0 of 1.8 points" in said and "hidden" not in said
    assert "0.0 of  1.8  lr_at (data/run.py: lr_at)" in summary.read_text("utf-8")
    assert "hint: Linear up to 1" in summary.read_text("utf-8")


def test_hidden_tests_follow_from_the_secret_and_public_ones_do_not():
    e, found = BY_NAME["gae"], {}
    for seed in ("", "a", "b", "a"):
        texts = []
        texts += [text for text, _ in grading.make_cases(e, seed)]
        assert found.setdefault(seed, texts) == texts
    assert len({tuple(texts) for texts in found.values()}) == 3


@pytest.mark.thorough
def test_nineteen_in_twenty_mutants_of_an_exercise_lose_points(tmp_path):
    """In rounds: one mutant of every function that has so many."""
    mutants = {e.name: grading.mutants_of(e) for e in EXERCISES}
    lost = {}
    for number in range(max(map(len, mutants.values()))):
        handin = tmp_path / str(number)
        names = [name for name, some in mutants.items() if len(some) > number]
        for name in names:
            e, mutant = BY_NAME[name], mutants[name][number]
            path = handin / e.file
            source = path.read_text("utf-8") if path.exists() else None
            code = grading.function_text(e).replace(mutant.right, mutant.wrong)
            put(handin, e.file, with_function(e, textwrap.dedent(code), source))
        for result in grading.grade(handin, names, "s"):
            if result["score"] < result["max_score"]:
                lost.setdefault((result["name"].split()[0], number), result["output"])
    everything = [(name, n) for name, some in mutants.items() for n in range(len(some))]
    kept = [mutants[name][n].wrong for name, n in everything if (name, n) not in lost]
    assert len(everything) >= 35 and len(kept) <= 0.05 * len(everything), kept


@pytest.mark.thorough
@pytest.mark.parametrize("odd", [0, 1])
def test_a_blank_fails_its_own_exercise_and_no_other(tmp_path, odd):
    sources = {e.file: (ROOT / e.file).read_text("utf-8") for e in EXERCISES}
    blanks = EXERCISES[odd::2]
    for e in blanks:
        sources[e.file] = course.blank(sources[e.file], e)
    for file, text in sources.items():
        put(tmp_path / "handin", file, text)
    results = grading.grade(tmp_path / "handin", [e.name for e in EXERCISES], "s")
    for e, visible, hidden in zip(EXERCISES, results[::2], results[1::2]):
        expected = 0 if e in blanks else e.points
        assert visible["score"] + hidden["score"] == pytest.approx(expected), visible


def test_an_autograder_for_gradescope_is_one_zip(tmp_path):
    course.pack_gradescope(tmp_path / "grader.zip", range(4, 6), "term 3")
    with zipfile.ZipFile(tmp_path / "grader.zip") as file:
        run = file.read("run_autograder").decode()
        assert "--weeks 4-5 --secret 'term 3' --results /autograder/results/results.json" in run
        assert file.getinfo("run_autograder").external_attr >> 16 & 0o111
        assert "\r" not in run + file.read("setup.sh").decode()
        file.extractall(tmp_path / "unpacked")
    put(tmp_path / "handin", "train_sft.py", (ROOT / "train_sft.py").read_text("utf-8"))
    where = tmp_path / "unpacked/project"
    options = ["--grade", tmp_path / "handin", "--exercise", "sft_loss"]
    run = run_python("tests/course.py", *options, cwd=where)
    assert run.stdout.endswith("6.0 of 6.0 points\n"), run.stdout + run.stderr


def test_checkpoints_are_packed_where_a_copy_looks_for_them(tmp_path):
    for name in ("pretrain", "sft", "rm", "ppo", "dpo"):
        put(tmp_path, f"out/{name}/ckpt.pt", name)
    with pytest.raises(SystemExit, match="there is no .*preferences.jsonl: run the seven"):
        course.pack_checkpoints(tmp_path / "c.zip", tmp_path / "out", 10)
    put(tmp_path, "out/preferences.jsonl", "{}")
    with pytest.raises(SystemExit, match="no model is made before week 3"):
        course.pack_checkpoints(tmp_path / "c.zip", tmp_path / "out", 3)
    for week, n_files in ((4, 1), (5, 2), (6, 4), (8, 5), (10, 6)):
        course.pack_checkpoints(tmp_path / "c.zip", tmp_path / "out", week)
        with zipfile.ZipFile(tmp_path / "c.zip") as file:
            assert len(file.namelist()) == n_files
    with zipfile.ZipFile(tmp_path / "c.zip") as file:
        assert file.read("out/sft/ckpt.pt") == b"sft"


@pytest.mark.parametrize(
    "args, message",
    [
        ("--weeks 44 --student x", "--weeks 44: exercises are in the weeks 1-9; write 3, or 1-3"),
        ("--weeks two --student x", "--weeks two: exercises are in"),
        ("--grade nowhere", "--grade HERE/nowhere: there is no such folder"),
        ("--grade tests --exercise gae,x", "--exercise x: there are train_bpe, attention"),
        ("--bug-hunt ada --grade tests", "--bug-hunt needs --secret"),
        ("--bug-hunt a --secret s --grade nowhere", "--grade HERE/nowhere: there is no such"),
        ("--gradescope x.zip", "--gradescope needs --secret"),
        ("--gradescope x.zip --secret s --exercise gae", "--exercise is for --grade"),
        ("--curves nowhere/x.png", "--curves HERE/nowhere/x.png: there is no folder HERE"),
        ("--leaderboard tests", "--leaderboard HERE/tests: train_ppo.py is missing"),
        ("--leaderboard . --out nowhere", "there is no HERE/nowhere/sft/ckpt.pt: run the seven"),
        ("--leaderboard nowhere", "--leaderboard HERE/nowhere: there is no such folder"),
        ("--student tests", "HERE/tests is there already, and not empty"),
        ("--solved tests", "HERE/tests is there already, and not empty"),
    ],
)
def test_bad_input_gets_one_line(monkeypatch, args, message):
    monkeypatch.chdir(ROOT)
    said = call_course(monkeypatch, *args.split())
    assert str(said).startswith(message.replace("HERE", str(ROOT))) and "\n" not in str(said)


# ---------------------------------------------------------------------------------------------
# Bug hunts and curves


BUGS = course.hunted_bugs(None)


def test_bugs_follow_from_identity_and_secret_and_lie_in_three_files():
    hunts = [course.three_bugs(BUGS, *who) for who in (("ada", "s"), ("bob", "s"), ("ada", "t"))]
    assert course.three_bugs(BUGS, "ada", "s") == hunts[0]
    assert hunts[0] != hunts[1] != hunts[2] != hunts[0]
    for hunt in hunts:
        assert len({mutant.file for mutant, _ in hunt}) == 3
        for mutant, name in hunt:
            source = (ROOT / mutant.file).read_text("utf-8")
            mutated = source.replace(mutant.right, mutant.wrong)
            texts = [
                ast.dump(grading.find_function(s, name, mutant.file)) for s in (source, mutated)
            ]
            assert texts[0] != texts[1]


def test_published_bugs_that_are_drawn_are_many_and_stop_no_script():
    places = [f"{bug.file}: {name}" for bug, name in BUGS]
    listed = {f"{file}: {name}" for file, names in course.HUNTED.items() for name in names.split()}
    assert set(places) == listed and len(places) >= 30
    assert not [bug.symptom for bug, _ in BUGS if re.search("crash|nan", bug.symptom)]


def test_a_teacher_hunts_with_bugs_of_their_own(tmp_path, monkeypatch):
    bugs = [
        ("train_sft.py", "hidden = model(tokens[:, :-1])", "hidden = model(tokens[:, 1:])"),
        ("train_rm.py", "len(row) - 1", "len(row) - 2"),
        ("train_dpo.py", ".sum(1)\n\n\ndef dpo_margin", ".mean(1)\n\n\ndef dpo_margin"),
    ]
    text = "from data.experiments.bugs import Bug\n\nMUTANTS = [\n"
    put(tmp_path, "lost.py", text + "".join(f"Bug(*{b}, '', '', ''),\n" for b in bugs) + "]")
    bugs[2] = ("train_dpo.py", "(target).sum(1)", "(target).mean(1)")
    put(tmp_path, "mine.py", text + "".join(f"Bug(*{b}, '', '', ''),\n" for b in bugs) + "]")
    hunt = ["--bug-hunt", "ada", "--secret", "s"]
    for number, file in enumerate(("lost.py", "mine.py")):
        options = ["--student", tmp_path / str(number), "--bugs", tmp_path / file]
        run = run_python(HERE / "course.py", *hunt, *options)
        if not number:
            assert re.match("--bugs .*lost.py: .* is in no function of train_dpo.py", run.stderr)
    handout = (tmp_path / "1/HANDOUT.md").read_text("utf-8")
    assert "train_dpo.py, train_rm.py, train_sft.py.\nNone of them is `main`" in handout
    texts = [(tmp_path / "1" / file).read_text("utf-8") for file, *_ in bugs]
    assert re.search(r"model\(tokens\[0?:, 1:\]\)", texts[0]) and ".mean(1)" in texts[2]


@pytest.fixture(scope="module")
def hunt(tmp_path_factory):
    where = tmp_path_factory.mktemp("a hunt") / "copy"
    course.hunt_copy(where, BUGS, "ada", "s")
    return where


def test_a_hunt_cannot_be_solved_by_comparing_files(hunt):
    bugs = course.three_bugs(BUGS, "ada", "s")
    for mutant, _ in bugs:
        mine, theirs = (
            ast.unparse(ast.parse((where / mutant.file).read_text("utf-8"))).split("\n")
            for where in (ROOT, hunt)
        )
        assert len(set(theirs) - set(mine)) >= 6, mutant.file  # one of them is the bug
    names = [path.name for path in hunt.rglob("*")]
    assert "mutants.py" not in names and "broken.py" not in names
    text = (hunt / "data/experiments/bugs.py").read_text("utf-8")
    assert not [bug for bug, _ in BUGS if bug.symptom in text]
    assert not [name for name in names if name.startswith("test_")]


@pytest.mark.thorough
def test_files_that_are_turned_round_mean_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "three_bugs", lambda found, identity, secret: [])
    course.hunt_copy(tmp_path / "copy", BUGS, "ada", "s")
    tests = ["test_gpt", "test_losses", "test_ppo", "test_chat", "test_tokenizer", "test_kernels"]
    for path in HERE.glob("*.py"):
        (tmp_path / "copy/tests" / path.name).write_bytes(path.read_bytes())
    files = [f"tests/{name}.py" for name in tests]
    run = run_python("-m", "pytest", "-q", *files, cwd=tmp_path / "copy")
    assert run.returncode == 0, run.stdout[-3000:]


GOOD_TEST = """
import torch
import gpt, train_rm, train_sft, train_dpo, train_ppo, train_pretrain, data.chat

def test_it(tiny, tokenizer):
"""


@pytest.mark.thorough
def test_a_hunt_is_graded_by_place_and_by_a_test_that_fails_on_the_bug_alone(
    tmp_path, monkeypatch, capsys
):
    wrong = ["-F.logsigmoid(rejected_scores - chosen_scores).mean()", "next_value = values[:, t]"]
    wrong.append("target, learned = tokens[:, :-1], mask[:, :-1]")
    zoo = [(bug, name) for bug, name in BUGS if bug.wrong in wrong]
    assert len(zoo) == 3
    monkeypatch.setattr(course, "three_bugs", lambda found, identity, secret: zoo)
    tests = [
        '"""`train_rm.py:preference_loss`\n\nIt is swapped."""'
        + GOOD_TEST
        + "    assert train_rm.preference_loss(torch.ones(1), torch.zeros(1)) < 0.5\n",
        '"""train_sft.py: main\n\nWho knows."""' + GOOD_TEST + "    assert False\n",
        '"""In train_ppo.py: gae.\n\nWho knows."""' + GOOD_TEST + "    assert True\n",
    ]
    assert hunt_points(tmp_path / "hand in", tests) == [3, 0, 1]
    said = capsys.readouterr().out
    assert "the place, `train_rm.py:preference_loss`: right" in said
    assert "to be read: It is swapped." in said
    assert "the place, train_sft.py: main: no bug is left there" in said
    assert "the test passes on the bug, too: it does not notice it" in said

    # Tests that tell a bug by something else than what the function does.
    path = "not __import__('os').path.isabs(m.preference_loss.__code__.co_filename)"
    text = "'rejected_scores - chosen' in __import__('inspect').getsource(m.preference_loss)"
    head = '"""train_rm.py: preference_loss"""' + GOOD_TEST + "    m = train_rm\n"
    assert hunt_points(tmp_path / "path", [f"{head}    assert not {path}\n"] * 3) == [1, 0, 0]
    linecache.getlines(str(ROOT / "train_rm.py"))  # a fork has what its parent has read
    assert hunt_points(tmp_path / "text", [f"{head}    assert not {text}\n"] * 3) == [1, 0, 0]
    said = capsys.readouterr().out
    assert "the test fails on the project without a bug" in said


def hunt_points(handin, tests):
    for number, text in enumerate(tests, 1):
        put(handin, f"test_bug_{number}.py", text)
    args = types.SimpleNamespace(secret="s", results=handin.parent / "results.json")
    course.grade_hunt(handin, BUGS, "ada", args)
    return [test["score"] for test in json.loads(args.results.read_text("utf-8"))["tests"]]


def test_curves_have_no_names_and_a_key_by_seed(tmp_path, capsys):
    course.curves(tmp_path / "curves.png", "1")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    key = capsys.readouterr().out.strip().split("\n")
    orders = [[name for name, _ in course.shuffled_runs(seed)] for seed in ("1", "2")]
    assert key == [f"{letter}  {name}" for letter, name in zip("ABCDEFG", orders[0])]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert "as it should be" in orders[0] and len(orders[0]) == 7


# ---------------------------------------------------------------------------------------------
# The leaderboard


def tiny_script(stage):
    """A training script whose defaults are those of the tests' tiny runs."""
    text = (ROOT / f"train_{stage}.py").read_text("utf-8")
    for name, value in TINY[stage].items():
        text, n = re.subn(rf"^(    {name}: \S+) = \S+", rf"\1 = {value!r}", text, flags=re.M)
        assert n == 1 or "bool | None" in text, name
    return text


@pytest.fixture
def few_prompts(monkeypatch):
    monkeypatch.setattr(leaderboard, "PROMPTS", 20)
    monkeypatch.setattr(leaderboard, "knows_the_town", lambda out: True)  # tiny models know nothing


def run_leaderboard(tmp_path, chain, stage, text, budget=None):
    """The exit code, and results.json."""
    put(tmp_path / "hand in", f"train_{stage}.py", text)
    results = tmp_path / "results.json"
    code = leaderboard.leaderboard(tmp_path / "hand in", stage, chain, "s", results, budget)
    return code, json.loads(results.read_text("utf-8"))


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_a_script_is_rerun_and_measured(tmp_path, chain, few_prompts, capsys, stage):
    code, results = run_leaderboard(tmp_path, chain, stage, tiny_script(stage))
    said = capsys.readouterr().out.splitlines()[-1]
    assert code == 0 and results["output"] == said
    found = re.fullmatch(
        r"gold (\S+) \((\S+), (\S+), (\S+)\)  KL \S+  at most (\S+) forward passes", said
    )
    mean, *golds = (float(found[n]) for n in (1, 2, 3, 4))
    assert mean == pytest.approx(sum(golds) / 3, abs=0.01)
    assert stage == "dpo" or len(set(golds)) == 3  # so tiny a run of DPO changes no response
    gold, kl = results["leaderboard"]
    assert gold["value"] == pytest.approx(mean, abs=0.01) and abs(mean) < 5 and kl["value"] < 2
    passes = int(found[5].replace(",", ""))
    assert 1000 < passes < leaderboard.BUDGET[stage]
    code, results = run_leaderboard(tmp_path, chain, stage, tiny_script(stage), passes * 0.9)
    assert code == 1 and results["output"].startswith("not measured: over the budget of")


@pytest.mark.thorough
def test_a_model_of_another_town_is_refused(chain):
    with pytest.raises(SystemExit, match="knows another town: run this in the copy of --solved"):
        leaderboard.leaderboard(ROOT, "ppo", chain, "s", None)


CHEATS = {
    "reads gold": (
        "from data.town.gold import gold as g; g(None, 'x')",
        "data.town.gold.gold is closed while the leaderboard trains",
    ),
    "reads the grader's gold": (
        f"open({str(ROOT / 'data/town/gold.py')!r}).read()",
        "gold.py is closed",
    ),
    "trains on the test split": (
        "from data.town.tasks import draw_tasks as d; d(9, 'x', split='test')",
        "data.town.tasks.draw_tasks is closed while the leaderboard trains",
    ),
    "reads its own hand-in": (
        "open(HANDIN + '/weights.pt')",
        "weights.pt is closed",
    ),
    "brings weights along": ("#" + 60_000 * "x", "the script is larger than 60,000 bytes"),
    "writes results": ("open('../results.json', 'w').write('{}')", "may not be written"),
    "changes the grader": (
        f"open({str(HERE / 'leaderboard.py')!r}, 'a').write('#')",
        "leaderboard.py is closed",
    ),
    "starts a program": ("import os; os.system('true')", "os.system is not allowed here"),
    "takes more passes": (
        "import torch, gpt; model, _ = gpt.load_model('out/sft/ckpt.pt')\n"
        "    while True: model(torch.zeros(64, 90, dtype=torch.long))",
        "over the budget of 4,200,000 forward passes",
    ),
    "takes more passes and hides it": (
        "import torch, gpt; model, _ = gpt.load_model('out/sft/ckpt.pt')\n"
        "    while True:\n"
        "        try: model(torch.zeros(64, 90, dtype=torch.long))\n"
        "        except BaseException: pass",
        "over the budget of 4,200,000 forward passes",
    ),
    "calls blocks one by one": (
        "import torch, gpt; model, _ = gpt.load_model('out/sft/ckpt.pt')\n"
        "    while True: [block(torch.zeros(64, 90, 32)) for block in model.h]",
        "over the budget of 4,200,000 forward passes",
    ),
    "leaves another model": (
        "import torch; torch.save({}, 'out/dpo.pt'); import os; os._exit(0)",
        "there is no checkpoint out/dpo/ckpt.pt",
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("cheat", CHEATS)
def test_cheating_fails_and_is_named(tmp_path, chain, few_prompts, cheat):
    line, said = CHEATS[cheat]
    start = "def main(cfg: Config) -> dict:\n"
    assert start in tiny_script("dpo")
    line = line.replace("HANDIN", repr(str(tmp_path / "hand in")))
    text = tiny_script("dpo").replace(start, f"{start}    {line}\n")
    before = (HERE / "leaderboard.py").read_bytes()
    code, results = run_leaderboard(tmp_path, chain, "dpo", text)
    assert code == 1 and said in results["output"], results
    assert [row["value"] for row in results["leaderboard"]] == ["-", "-"]
    assert (HERE / "leaderboard.py").read_bytes() == before


@pytest.mark.thorough
def test_the_arena_has_no_answers_no_gold_and_nothing_of_the_test_split(tmp_path, chain):
    from data.files import held_out, read_rows

    leaderboard.build_arena(tmp_path / "arena", ROOT / "train_ppo.py", chain, "ppo", "s")
    rows = read_rows(tmp_path / "arena/out/preferences.jsonl")
    _, test = held_out(read_rows(chain / "preferences.jsonl"))
    asked = {str(row["messages"]) for row in test}
    assert rows and not [row for row in rows if str(row["messages"]) in asked]
    assert {name for row in rows for name in row} - {"where"} == {
        "messages",
        "chosen",
        "rejected",
        "sampled_from",
    }
    prompts = read_rows(tmp_path / "arena/prompts.jsonl")
    assert {name for row in prompts for name in row} == {"messages", "where"}
    assert not list((tmp_path / "arena").rglob("mutants.py"))


# ---------------------------------------------------------------------------------------------
# Labs

LABS = {  # patch -> the command of tests/README.md, with tiny options
    "lora": ("train_dpo.py", "dpo", {"rank": 2, "name": "lora"}),
    "kto": ("train_dpo.py", "dpo", {"loss": "kto", "name": "kto"}),
    "best_of_n": ("train_sft.py", "sft", {"best_of": 2, "name": "best", "demonstrations": 40}),
    "fill_in_the_middle": ("train_pretrain.py", "pretrain", {"fim": 0.5, "name": "fim"}),
    "distil": ("train_pretrain.py", "pretrain", {"name": "small", "n_embd": 16}),
    "new_task": ("train_sft.py", "sft", {"tasks": "sort", "name": "sort"}),
    "soft_prompt": ("soft_prompt.py", "", {"tokens": 2, "examples": 20, "steps": 3}),
}


def patched(where, name):
    """A copy of the project with the patch of a lab."""
    course.copy_project(where)
    patch = HERE / "labs" / f"{name}.patch"
    subprocess.run(["git", "apply", patch], cwd=where, check=True)  # needs no repository there
    return where


@pytest.mark.parametrize("name", LABS)
def test_the_patch_of_a_lab_applies_and_the_guide_explains_it(tmp_path, name):
    where = patched(tmp_path / "copy", name)
    text = (HERE / "labs" / f"{name}.patch").read_text("utf-8")
    for file in re.findall(r"^\+\+\+ b/(.+)$", text, re.M):
        source = (where / file).read_text("utf-8")
        compile(source, file, "exec")
        assert max(map(len, source.split("\n"))) <= 100
    assert f"labs/{name}.patch" in (HERE / "README.md").read_text("utf-8")
    assert {path.stem for path in (HERE / "labs").glob("*.patch")} == set(LABS)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LABS)
def test_a_lab_runs(tmp_path, chain, name):
    where = patched(tmp_path / "copy", name)
    script, stage, options = LABS[name]
    if stage:
        options = {**TINY[stage], "out": str(chain), **options}
    else:
        options |= {"init": str(chain / "pretrain/ckpt.pt")}
    if name == "best_of_n":
        options["init"] = str(chain / "sft/ckpt.pt")
    if name == "distil":
        options["teacher"] = str(chain / "pretrain/ckpt.pt")
    run = run_python(script, *as_options(options), cwd=where)
    assert run.returncode == 0, run.stderr
    if name == "lora":
        assert "weights are trained" in run.stdout
    if name == "kto":
        run = run_python(script, *as_options({**options, "loss": "orpo"}), cwd=where)
        assert run.returncode == 0, run.stderr
    if name == "soft_prompt":
        assert re.search(r"written template \d.\d\d, 2 soft tokens", run.stdout)
