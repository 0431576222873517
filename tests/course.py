"""A course from this project: copies for students, grading, bug hunts, exam curves, a leaderboard.

    python tests/course.py --student DIR --weeks 1-3          a copy with blanks, and HANDOUT.md
    python tests/course.py --solved DIR --seed 17             the whole project in another town
    python tests/course.py --checkpoints FILE.zip             models of out/ for those who have none
    python tests/course.py --grade HANDIN --weeks 1-3         points, and what is wrong
    python tests/course.py --gradescope FILE.zip --weeks 1-3 --secret S
    python tests/course.py --bug-hunt ID --student DIR --secret S
    python tests/course.py --bug-hunt ID --grade HANDIN --secret S
    python tests/course.py --curves FILE.png --seed S         seven runs of PPO: which is which?
    python tests/course.py --leaderboard HANDIN --stage ppo   rerun a student's script, and measure

tests/README.md is the teacher's guide; tests/exercises.py has the exercises, with keys to the
questions, and is not for students.
"""

import argparse
import ast
import csv
import functools
import hashlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

from exercises import EXERCISES  # noqa: E402
from grading import (  # noqa: E402
    CLOSED,
    PYTHON,
    HandInError,
    entry,
    fence,
    find_function,
    grade,
    in_process,
    install,
    limit_memory,
    load_project,
    read_file,
)
from leaderboard import leaderboard  # noqa: E402
from try_exercise import top_names  # noqa: E402

from data.experiments.bugs import TOP  # noqa: E402
from data.run import run_script  # noqa: E402

# Where --bug-hunt plants published mutants: in functions that every default run calls.
HUNTED = {
    "gpt.py": "Attention.forward GPT.forward ScalarModel.forward _continue_together",
    "data/chat.py": "encode_reply encode_chat pad sorted_batches sample_replies",
    "train_sft.py": "sft_loss",
    "train_rm.py": "preference_loss last_token_scores",
    "train_ppo.py": "whiten token_rewards gae policy_loss value_loss proxy_reward",
    "train_dpo.py": "sequence_logprobs",
}
MADE_IN = {  # file of out/ -> the week in which students make it
    "pretrain/ckpt.pt": 3,
    "sft/ckpt.pt": 4,
    "preferences.jsonl": 5,
    "rm/ckpt.pt": 5,
    "ppo/ckpt.pt": 7,
    "dpo/ckpt.pt": 8,
}


def copy_project(where: Path, seed: str = ""):
    """The project without its tests, runs and git history, into a new folder. seed: of its town."""
    if where.exists() and (not where.is_dir() or any(where.iterdir())):
        raise SystemExit(f"{where} is there already, and not empty: choose another folder")
    where.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "data", where / "data", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*TOP, "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, where)
    if seed:
        edit(where / "data/town/words.py", lambda text: other_facts(text, seed))


def solved_copy(where: Path, seed: str):
    """All of the project in another town, for a teacher: to train its models, to grade there."""
    copy_project(where, seed)
    shutil.copytree(ROOT / "tests", where / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    print(f"{where}: everything is solved in it, and its tests have the keys")


def hide_solutions(where: Path):
    """Take out of a copy bugs, with what is right in their place, and what --curves asks about."""
    folder = where / "data/experiments"
    for name in ("broken.py", "results/broken.csv", "results/broken.png"):
        (folder / name).unlink()
    edit(folder / "bugs.py", lambda text: re.sub(r"(?ms)^BUGS = \{.*?^\}", "BUGS = {}", text))
    edit(folder / "__init__.py", lambda text: text.replace("tasks,broken", "tasks,pairs "))
    edit(folder / "README.md", lambda text: without_section(text, "Broken on purpose"))
    for name in ("__init__.py", "__main__.py", "README.md"):
        edit(folder / name, lambda text: re.sub(r"(?m)^.*\bbroken\b.*\n", "", text))
    edit(where / "README.md", lambda text: without_section(text, "Test it"))


def without_section(text: str, title: str) -> str:
    return re.sub(rf"(?ms)^## {title}.*?(?=^## )", "", text)


def edit(path: Path, change):
    """Replace a file's text by change(text)."""
    path.write_text(change(path.read_text("utf-8")), "utf-8", newline="\n")


# ---------------------------------------------------------------------------------------------
# The students' copy


def blank(source: str, exercise) -> str:
    """A source text in which the body of the exercise's function raises NotImplementedError.

    Its docstring stays, and the statements that the exercise gives (`keep`).
    """
    function = find_function(source, exercise.function, exercise.file)
    n_kept = exercise.keep + (ast.get_docstring(function) is not None)
    first = function.body[n_kept - 1].end_lineno  # the lines after it, as they are counted from 0
    lines = source.split("\n")
    indent = " " * function.body[0].col_offset
    what = f'{indent}raise NotImplementedError("{exercise.name}: your code here")'
    return "\n".join([*lines[:first], what, *lines[function.end_lineno :]])


def only_tests(source: str, wanted: set[str]) -> str:
    """A file of tests with those that are wanted, and what is no test."""
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        name = getattr(node, "name", "")
        if name.startswith("test_") and name not in wanted:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            del lines[first - 1 : node.end_lineno]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines))


def other_facts(source: str, seed: str) -> str:
    """data/town/words.py with other facts: who works where, eats what, and lives behind which door.

    Places, foods and colours change hands, so there are as many of each as before. Mila and Otto
    keep theirs, since prompts in tasks.py and tests speak of them.
    """
    rows = [
        ast.literal_eval(f"({row})") for row in re.findall(r"^    Resident\((.+)\),$", source, re.M)
    ]
    movers = [row for row in rows if row[0] not in ("Mila", "Otto")]
    columns, rng = list(zip(*movers)), random.Random(f"town {seed}")
    columns[3:] = [rng.sample(column, len(column)) for column in columns[3:]]
    moved = iter(zip(*columns))
    rows = [row if row[0] in ("Mila", "Otto") else next(moved) for row in rows]
    lines = [", ".join(f'"{word}"' for word in row) for row in rows]
    table = "".join(f"    Resident({line}),\n" for line in lines)
    return re.sub(r"(?<=^RESIDENTS = \[\n)(    Resident.+\n)+", table, source, flags=re.M)


def student_copy(where: Path, weeks: range, seed: str):
    """A copy for students: the exercises of these weeks are blank, all others are solved, since
    scripts need them."""
    mine = [exercise for exercise in EXERCISES if exercise.week in weeks]
    copy_project(where, seed)
    hide_solutions(where)
    for exercise in mine:
        edit(where / exercise.file, lambda text, e=exercise: blank(text, e))
    tests = where / "tests"
    tests.mkdir()
    for name in ("conftest.py", "tiny_runs.py", "try_exercise.py"):
        shutil.copy(ROOT / "tests" / name, tests)
    wanted = {}
    for exercise in mine:
        for test in exercise.tests:
            wanted.setdefault(test.partition("::")[0], set()).add(test.partition("::")[2])
    for file, names in wanted.items():
        text = only_tests((ROOT / "tests" / file).read_text("utf-8"), names)
        (tests / file).write_text(text, "utf-8", newline="\n")
    told = {}  # see tests/try_exercise.py
    for e in mine:
        hints = {test: hint for test, (_, hint) in e.tests.items()}
        told[e.name] = {"file": e.file, "names": top_names(where / e.file), "tests": hints}
    (tests / "exercises.json").write_text(json.dumps(told, indent=1), "utf-8")
    (where / "HANDOUT.md").write_text(handout(mine, seed), "utf-8", newline="\n")
    print(f"{where}: {len(mine)} exercises, {sum(e.points for e in mine)} points; see HANDOUT.md")


def handout(exercises: list, seed: str) -> str:
    """HANDOUT.md: what to do, and how it is graded."""
    minutes = sum(exercise.minutes for exercise in exercises)
    weeks = ", ".join(map(str, sorted({exercise.week for exercise in exercises})))
    text = f"""# Functions to write: week {weeks}

README.md says what this project is and in which order to read it. In the files below, the bodies of
some functions are missing: `raise NotImplementedError`. Their docstrings say what they take and
return, with shapes. Write the bodies, about {minutes} minutes in all, and answer the questions.

    pip install -r requirements.txt pytest
    python tests/try_exercise.py {exercises[0].name}

tries one exercise and says which claims about it do not hold yet, with a hint. In a notebook, write
`!` before a command.

- **Grading.** Your function is taken out of your file by its name and put into a project that is
  otherwise right. So a mistake in one exercise costs no other, and neither does a syntax error in
  another file. Names and arguments must stay. What is outside of the function is not taken: import
  and define what you need inside it. The claims that you can try give 60 % of the points, in part
  if only some hold; hidden tests, with other shapes and values, give the rest after the deadline.
- **Hand in** the files named in the table, under their names, and your answers in `ANSWERS.md`,
  where your teacher says.
- **One exercise may need another.** If a message names another one (`cache: your code here`), write
  that one first; attention, cache and sample belong together.
- **Models.** Copy `out/` from your last copy into this one: later stages start from these models.
  If you have none, ask for checkpoints.zip and unpack it here, with
  `python -m zipfile -e checkpoints.zip .`"""
    if seed:
        text += f"""
- **Your town** is number {seed}: its residents work, eat and live differently from those of the
  published project, so checkpoints and figures must come from a town of the same number."""
    text += """
- **Assistants.** You may ask a person or a program to explain an idea, a message or a line of this
  project. What you hand in, code and answers, you have written yourself and can explain, line by
  line. Say at the end of your answers whom or what you asked, and about what.

| week | exercise | function | points | minutes |
|---|---|---|---|---|
"""
    for e in exercises:
        text += (
            f"| {e.week} | {e.name} | `{e.function}` in `{e.file}` | {e.points} | {e.minutes} |\n"
        )
    for e in exercises:
        text += f"\n## {e.name}: {e.points} points\n\n`{e.function}` in `{e.file}`\n\n"
        text += f"    {e.equation}\n\nClaims:\n\n"
        for test in e.tests:
            text += f"- {test.partition('::test_')[2].replace('_', ' ')}\n"
        text += f"\nTry it: `python tests/try_exercise.py {e.name}`\n\nIn writing:\n\n"
        questions = [both.partition("\n")[0] for both in e.questions]
        text += "".join(f"{n}. {question}\n" for n, question in enumerate(questions, 1))
    return text


def pack_checkpoints(path: Path, out: Path, week: int):
    """What finished default runs have made of what students make before a week, as a zip."""
    files = [name for name, made_in in MADE_IN.items() if made_in < week]
    if not files:
        raise SystemExit(f"--checkpoints: no model is made before week {week}")
    if missing := [name for name in files if not (out / name).exists()]:
        raise SystemExit(
            f"there is no {out / missing[0]}: run the seven commands of README.md first"
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in files:
            file.write(out / name, f"out/{name}")
    print(f"{path}: unpack it in a copy with `python -m zipfile -e {path.name} .`")


# ---------------------------------------------------------------------------------------------
# Grading


def grade_handin(handin: Path, exercises: list, args) -> int:
    """Grade, print, and write what Gradescope or GitHub reads. Returns the exit code."""
    results = grade(handin, [exercise.name for exercise in exercises], args.secret)
    if args.results:
        write_results(args.results, results)
    if not args.github:
        print(as_text(results))
        return 0
    visible = [result for result in results if result["visibility"] == "visible"]
    print(as_text(visible))
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"```\n{as_text(visible)}\n```\n")
    return int(any(result["status"] == "failed" for result in visible))


def as_text(results: list[dict]) -> str:
    """Entries of results.json for people: points, what is to be said about them, and their sum."""
    lines = []
    for result in results:
        lines.append(f"{result['score']:5.1f} of {result['max_score']:4.1f}  {result['name']}")
        lines.append(textwrap.indent(result["output"], "    "))
    score, best = (sum(result[key] for result in results) for key in ("score", "max_score"))
    return "\n".join([*lines, f"{score:.1f} of {best:.1f} points"])


def write_results(path: Path, results: list[dict]):
    """Gradescope's results.json."""
    try:
        path.write_text(json.dumps({"tests": results}, indent=1), "utf-8")
    except OSError as error:
        raise SystemExit(f"--results {path}: {error.strerror}")


SETUP = """#!/usr/bin/env bash
set -eu
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu \\
    -r /autograder/source/project/requirements.txt pytest
"""
RUN = """#!/usr/bin/env bash
cd /autograder/source/project
export OMP_NUM_THREADS=1
/autograder/venv/bin/python tests/course.py --grade /autograder/submission \\
    --weeks {weeks} --secret {secret} --results /autograder/results/results.json
"""


def pack_gradescope(path: Path, weeks: range, secret: str):
    """A zip to upload as Gradescope's autograder."""
    run = RUN.format(weeks=f"{weeks.start}-{weeks.stop - 1}", secret=shlex.quote(secret))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in (("setup.sh", SETUP), ("run_autograder", run)):
            script = zipfile.ZipInfo(name)
            script.external_attr = 0o755 << 16  # it may be run
            file.writestr(script, text)
        paths = [*(ROOT / name for name in TOP), *ROOT.glob("data/**/*.*")]
        for source in [*paths, *ROOT.glob("tests/**/*.*")]:
            if source.suffix in (".py", ".txt", ".csv", ".md", ".patch") and source.is_file():
                file.write(source, f"project/{source.relative_to(ROOT).as_posix()}")
    print(f"{path}: upload it under Configure Autograder; it holds the secret seed, and the keys")


# ---------------------------------------------------------------------------------------------
# Bug hunt


@functools.cache
def functions(file: str) -> list[tuple[str, str]]:
    """The functions of a file of the project, and the methods of its classes: (name, text)."""
    source = (ROOT / file).read_text("utf-8")
    lines, found = source.split("\n"), []
    for node in ast.parse(source).body:
        a_class = isinstance(node, ast.ClassDef)
        for inner in node.body if a_class else [node]:
            if isinstance(inner, ast.FunctionDef):
                text = "\n".join(lines[inner.lineno - 1 : inner.end_lineno]) + "\n"
                found.append((f"{node.name}.{inner.name}" if a_class else inner.name, text))
    return found


def hunted_bugs(path: Path | None) -> list:
    """What --bug-hunt draws from, ours or those of a teacher's file: [(bug, name of function)]."""
    where = path or ROOT / "tests/mutants.py"
    try:
        bugs, found = runpy.run_path(str(where))["MUTANTS"], []
    except (OSError, SyntaxError, NameError, KeyError) as error:
        raise SystemExit(f"--bugs {where}: not a file with a list MUTANTS ({error!r})")
    for bug in bugs:
        if path and (n := (ROOT / bug.file).read_text("utf-8").count(bug.right)) != 1:
            raise SystemExit(f"--bugs {path}: {bug.right!r} is {n} times in {bug.file}, not once")
        for name, text in functions(bug.file):
            # Only whole runs tell of main, and super() works inside of its class alone.
            fits = bug.right in text and name != "main" and "super()" not in text
            seen = name in HUNTED.get(bug.file, "").split()
            if fits and (path or seen and not re.search("crash|nan", bug.symptom)):
                found.append((bug, name))
    if path and (lost := [bug for bug in bugs if bug not in dict(found)]):
        where = f"{lost[0].file} that can be taken alone (main cannot)"
        raise SystemExit(f"--bugs {path}: {lost[0].right!r} is in no function of {where}")
    return found


def three_bugs(found: list, identity: str, secret: str) -> list:
    """Three of `hunted_bugs` by hash, each in another file."""
    chosen = {}
    for bug, name in random.Random(f"bugs {secret} {identity}").sample(found, len(found)):
        chosen.setdefault(bug.file, (bug, name))
    if len(chosen) < 3:
        raise SystemExit("--bugs: three bugs in three files are drawn, and there are fewer files")
    return list(chosen.values())[:3]


class Rewrite(ast.NodeTransformer):
    """Write many expressions in another way that means the same, so that a comparison with the
    published files finds changes everywhere: a < b as b > a, a * b as b * a, x[:n] as x[0:n]."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def turns(self, *parts) -> bool:
        """Whether to. Not where the order in which the parts are evaluated might matter."""
        calls = [any(isinstance(n, (ast.Call, ast.NamedExpr)) for n in ast.walk(p)) for p in parts]
        return sum(calls) < 2 and self.rng.random() < 0.7

    def visit_FunctionDef(self, node):
        if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
            return node
        return self.generic_visit(node)

    def visit_Compare(self, node):
        self.generic_visit(node)
        mirrored = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}
        mirrored |= {ast.Eq: ast.Eq, ast.NotEq: ast.NotEq}
        kind = mirrored.get(type(node.ops[0]))
        if len(node.ops) == 1 and kind and self.turns(node.left, node.comparators[0]):
            return ast.Compare(node.comparators[0], [kind()], [node.left])
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        sides = node.left, node.right
        number = any(isinstance(s, ast.Constant) and type(s.value) in (int, float) for s in sides)
        commutes = isinstance(node.op, ast.Mult) or isinstance(node.op, ast.Add) and number
        if commutes and self.turns(*sides):
            return ast.BinOp(node.right, node.op, node.left)
        return node

    def visit_Slice(self, node):
        self.generic_visit(node)
        if node.lower is None and node.step is None and self.turns():
            node.lower = ast.Constant(0)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        named = all(word.arg for word in node.keywords)
        if len(node.keywords) > 1 and named and self.turns(*(w.value for w in node.keywords)):
            self.rng.shuffle(node.keywords)
        return node


def normalised(source: str, rng: random.Random) -> str:
    """A file as Python would write it, without comments, and with expressions turned round.

    A Config stays as it is: the comments in it are the help texts of a script.
    """
    tree, configs = ast.parse(source), []
    for number, node in enumerate(tree.body):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            configs.append("\n".join(source.split("\n")[first - 1 : node.end_lineno]))
            tree.body[number] = ast.parse(f"'Config {len(configs) - 1}'").body[0]
    text = ast.unparse(ast.fix_missing_locations(Rewrite(rng).visit(tree)))
    for number, config in enumerate(configs):
        text = text.replace(f"'Config {number}'", config)
    return text + "\n"


def hunt_copy(where: Path, found: list, identity: str, secret: str):
    """A copy with three bugs, in files that cannot be compared with the published ones."""
    bugs = three_bugs(found, identity, secret)
    copy_project(where)
    hide_solutions(where)
    for bug, _ in bugs:
        edit(where / bug.file, lambda text, b=bug: text.replace(b.right, b.wrong))
    for path in [*where.glob("*.py"), *where.glob("data/**/*.py")]:
        rng = random.Random(f"rewrite {secret} {identity} {path.name}")
        edit(path, lambda text, rng=rng: normalised(text, rng))
    (where / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", where / "tests")
    files = ", ".join(sorted({bug.file for bug, _ in found}))
    (where / "HANDOUT.md").write_text(HUNT.format(files=files), "utf-8", newline="\n")
    print(f"{where}: three bugs are in it; HANDOUT.md says what to hand in")


HUNT = '''# Three bugs

In this copy of the project, three functions are wrong, each in a different one of these files:
{files}.
None of them is `main`. All else is right, though it is written differently from the published
files: comments are gone, and many expressions are rewritten in an equivalent form. Scripts may run
to their end, with results that look almost right; and where a check in the project stops one, its
message is a symptom, not the place.

Hand in three files, `test_bug_1.py` to `test_bug_3.py`, one for each bug:

    """train_sft.py: sft_loss

    What is wrong, in a sentence, and what one would notice in training.
    """
    from train_sft import sft_loss

    def test_prompts_do_not_count(tiny):  # a small model; `tokenizer` is a tokenizer
        ...
        assert ...

The first line is the place: file and function (or Class.method). The test has to fail on this copy
and to pass once the bug is mended, and to tell by what the function does. Try it with
`python -m pytest tests`. In grading a test may read no file of the project, write no files and
start no programs, and has 60 seconds. Three points each: one for the place, and if it is right two
for the test; one more for the sentence, which people read, with the test.
'''


def run_hunted_test(path: str, file: str, name: str, changes: tuple[str, str], note):
    """In a process of its own: a student's test, with a piece of one function replaced."""
    import pytest
    from try_exercise import Recorder

    source = (ROOT / file).read_text("utf-8").replace(*changes)
    definition = find_function(source, name, file)
    limit_memory()
    fence(closed=CLOSED, opened=(*PYTHON, path, ROOT / "tests/conftest.py"))
    install(file, name, definition, ROOT / file)
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "conftest", "--capture=no", "--tb=short"]
    recorder = Recorder(note, ROOT)
    pytest.main([*arguments, "--import-mode=importlib", path], plugins=[recorder])


def grade_hunt(handin: Path, found: list, identity: str, args):
    """Points of a bug hunt: is a bug there, and does the test fail on it, and only on it?"""
    load_project()
    left = {(bug.file, name): bug for bug, name in three_bugs(found, identity, args.secret)}
    results = []
    for file in ("test_bug_1.py", "test_bug_2.py", "test_bug_3.py"):
        try:
            source, path = read_file(handin, file)
            docstring = ast.get_docstring(ast.parse(source, file)) or ""
        except (HandInError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            results.append(entry(file, 0, 3, [str(error)], "after_due_date"))
            continue
        place, _, sentence = docstring.strip().partition("\n")
        words = re.search(r"([\w/]+\.py)\W+(\w+(?:\.\w+)?)", place.replace("\\", "/"))
        bug = left.pop(words.groups(), None) if words else None
        points, lines = 0, [f"the place, {place or 'not named'}: no bug is left there"]
        if bug:
            points, lines = 1, [f"the place, {place}: right"]
            passes, said = try_hunted(path, *words.groups(), (bug.right, bug.right))
            fails = passes and not try_hunted(path, *words.groups(), (bug.right, bug.wrong))[0]
            points += 2 * fails
            if fails:
                lines.append("the test passes without the bug and fails on it")
            elif passes:
                lines.append("the test passes on the bug, too: it does not notice it")
            else:
                lines.append(f"the test fails on the project without a bug: {said}")
        lines.append(f"to be read: {' '.join(sentence.split()) or 'no sentence'}")
        results.append(entry(file, points, 3, lines, "after_due_date"))
    print(as_text(results))
    if args.results:
        write_results(args.results, results)


def try_hunted(path: Path, file: str, name: str, changes: tuple[str, str]) -> tuple[bool, str]:
    """Whether a student's test passes with a piece of a function replaced, and what it says."""
    work = run_hunted_test, str(path.resolve()), file, name, changes
    notes, stopped = in_process(*work, seconds=60)
    last = {test: how for test, *how in notes}  # what was noted last about a test counts
    said = [text for passed, text in last.values() if not passed]
    if stopped or not any("::" in test for test in last):
        said = [stopped or (said or ["there is no test in it"])[0]]
    return not said, (said or [""])[0]


# ---------------------------------------------------------------------------------------------
# Curves


def shuffled_runs(seed: str) -> list[tuple[str, list[dict]]]:
    """The runs of the experiment `broken`, by name, in the order of the letters."""
    from data.experiments.plots import grouped

    with open(ROOT / "data/experiments/results/broken.csv", newline="") as file:
        rows = [
            {name: x if name == "bug" else float(x) for name, x in row.items()}
            for row in csv.DictReader(file)
        ]
    runs = list(grouped(rows, "bug").items())
    random.Random(f"curves {seed}").shuffle(runs)
    return runs


def curves(path: Path, seed: str):
    """Draw the runs of PPO of the experiment `broken` without their names, and print the key."""
    from data.experiments.plots import UNITS, band, panels

    if not path.resolve().parent.is_dir():
        raise SystemExit(f"--curves {path}: there is no folder {path.parent}")
    runs = shuffled_runs(seed)
    figure, axes = panels(len(runs) * len(UNITS), len(UNITS), size=(2.7, 1.9))
    for number, (_, some) in enumerate(runs):
        for axis, (column, unit) in zip(axes[number * len(UNITS) :], UNITS.items()):
            band(axis, some, "step", column)
            axis.set_title(f"{'ABCDEFGHIJ'[number]}: {unit}", fontsize=8)
            axis.tick_params(labelsize=7)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise SystemExit(f"--curves {path}: {error.strerror}")
    for letter, (name, _) in zip("ABCDEFGHIJ", runs):
        print(f"{letter}  {name}")


# ---------------------------------------------------------------------------------------------


def parse_weeks(text: str) -> range:
    """ "1-3" or "2" -> the weeks, as a range."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    weeks = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not any(exercise.week in weeks for exercise in EXERCISES):
        last = max(exercise.week for exercise in EXERCISES)
        raise SystemExit(f"--weeks {text}: exercises are in the weeks 1-{last}; write 3, or 1-3")
    return weeks


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--student", type=Path, metavar="DIR", help="write a copy for students")
    add("--solved", type=Path, metavar="DIR", help="write a copy for teachers, with all solutions")
    add("--grade", type=Path, metavar="HANDIN", help="grade a folder")
    add("--weeks", help="of the exercises: 3, or 1-3 (default: all)")
    add("--seed", default="", help="of a copy's facts, of --curves")
    add("--secret", default="", help="of hidden tests, bug hunts and the leaderboard: any text")
    add("--exercise", metavar="NAMES", help="grade just these, as in gae,policy_loss")
    add("--results", type=Path, metavar="FILE", help="write Gradescope's results.json")
    add("--github", action="store_true", help="visible tests only, a summary, and an exit code")
    add("--gradescope", type=Path, metavar="ZIP", help="write Gradescope's autograder")
    add("--checkpoints", type=Path, metavar="ZIP", help="pack models of --out made before --weeks")
    add("--out", type=Path, default=ROOT / "out", help="folder of finished default runs")
    add("--bug-hunt", metavar="ID", help="with --student or --grade: three bugs for this student")
    add("--bugs", type=Path, metavar="FILE", help="of --bug-hunt, a list as in tests/mutants.py")
    add("--curves", type=Path, metavar="PNG", help="draw runs of PPO without names")
    add("--leaderboard", type=Path, metavar="HANDIN", help="rerun and measure a training script")
    add("--stage", choices=("ppo", "dpo"), default="ppo", help="of --leaderboard")
    args = parser.parse_args()
    for name, value in list(vars(args).items()):
        if isinstance(value, Path):  # since grading goes to the project's folder
            setattr(args, name, value.resolve())
    weeks = parse_weeks(args.weeks or f"1-{EXERCISES[-1].week}")
    exercises = [exercise for exercise in EXERCISES if exercise.week in weeks]
    if args.exercise:
        names = [exercise.name for exercise in EXERCISES]
        if unknown := [name for name in args.exercise.split(",") if name not in names]:
            raise SystemExit(f"--exercise {unknown[0]}: there are {', '.join(names)}")
        exercises = [e for e in EXERCISES if e.name in args.exercise.split(",")]
    if args.exercise and not args.grade:
        raise SystemExit("--exercise is for --grade; choose exercises of other uses by --weeks")
    if args.bug_hunt and not args.secret:
        raise SystemExit("--bug-hunt needs --secret: else students could find their bugs by name")
    if args.gradescope and not args.secret:
        raise SystemExit("--gradescope needs --secret, the seed of the hidden tests: any text")
    for option, folder in (("--grade", args.grade), ("--leaderboard", args.leaderboard)):
        if folder and not folder.is_dir():
            raise SystemExit(f"{option} {folder}: there is no such folder")
    if args.gradescope:
        pack_gradescope(args.gradescope, weeks, args.secret)
        return
    if args.secret:
        # Code of students runs in forks of this process. What it may find there is of use for
        # nothing else: not for the bugs of others, if it is graded for an exercise.
        purpose = "bugs" if args.bug_hunt else "leaderboard" if args.leaderboard else "exercises"
        args.secret = hashlib.sha256(f"{purpose} {args.secret}".encode()).hexdigest()[:16]
        del sys.argv[1:]
    if args.bug_hunt and (args.student or args.grade):
        bugs = hunted_bugs(args.bugs)
        if args.student:
            hunt_copy(args.student, bugs, args.bug_hunt, args.secret)
        else:
            grade_hunt(args.grade, bugs, args.bug_hunt, args)
    elif args.student:
        student_copy(args.student, weeks, args.seed)
    elif args.solved:
        solved_copy(args.solved, args.seed)
    elif args.grade:
        sys.exit(grade_handin(args.grade, exercises, args))
    elif args.checkpoints:
        pack_checkpoints(args.checkpoints, args.out, weeks.start if args.weeks else 10)
    elif args.curves:
        curves(args.curves, args.seed)
    elif args.leaderboard:
        sys.exit(leaderboard(args.leaderboard, args.stage, args.out, args.secret, args.results))
    else:
        parser.error("say what to do: one of the lines that -h shows")


if __name__ == "__main__":
    run_script(main)
