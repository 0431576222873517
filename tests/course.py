"""A course from this project: copies for students, grading, bug hunts, exam curves, a leaderboard.

    python tests/course.py --student DIR --weeks 1-3          a copy with blanks, and HANDOUT.md
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
import json
import os
import random
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

from exercises import EXERCISES  # noqa: E402
from grading import (  # noqa: E402
    find_function,
    grade,
    in_process,
    install,
    load_project,
)
from leaderboard import leaderboard  # noqa: E402

from data.run import run_script  # noqa: E402

SOLUTIONS = ("broken.csv", "broken.png")  # results that --curves asks about
HUNTED = ["gpt.py", "data/chat.py", *(f"train_{x}.py" for x in ("pretrain", "sft", "rm"))]
HUNTED += ["train_ppo.py", "train_dpo.py"]  # where --bug-hunt plants


def copy_project(where: Path):
    """The project without its tests, results of runs, and git history, into a new folder."""
    if where.exists() and (not where.is_dir() or any(where.iterdir())):
        raise SystemExit(f"{where} is there already, and not empty: choose another folder")
    where.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        ROOT / "data", where / "data", ignore=shutil.ignore_patterns("__pycache__", *SOLUTIONS)
    )
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]:
        shutil.copy(path, where)
    for name in ("LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, where)


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
    given = exercise.keep + (ast.get_docstring(function) is not None)
    first = function.body[given - 1].end_lineno  # the lines after it, as they are counted from 0
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
    """A copy for students: exercises of these weeks and of later ones are blank, those before are
    solved, since their deadline has passed."""
    copy_project(where)
    # Bugs, with what is right in their place, are solutions.
    bugs = where / "data/experiments/bugs.py"
    edit(bugs, lambda text: re.sub(r"^BUGS = \{.*?^\}", "BUGS = {}", text, flags=re.M | re.S))
    section = re.compile(r"^## Broken on purpose.*?(?=^## )", re.M | re.S)
    edit(where / "data/experiments/README.md", lambda text: section.sub("", text))
    for exercise in EXERCISES:
        if exercise.week >= weeks.start:
            edit(where / exercise.file, lambda text, e=exercise: blank(text, e))
    if seed:
        edit(where / "data/town/words.py", lambda text: other_facts(text, seed))

    mine = [exercise for exercise in EXERCISES if exercise.week in weeks]
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
    hints = {e.name: {test: hint for test, (_, hint) in e.tests.items()} for e in mine}
    (tests / "exercises.json").write_text(json.dumps(hints, indent=1), "utf-8")
    (where / "HANDOUT.md").write_text(handout(mine, weeks, seed), "utf-8", newline="\n")
    print(f"{where}: {len(mine)} exercises, {sum(e.points for e in mine)} points; see HANDOUT.md")


def handout(exercises: list, weeks: range, seed: str) -> str:
    """HANDOUT.md: what to do, and how it is graded."""
    minutes = sum(exercise.minutes for exercise in exercises)
    text = f"""# Weeks {weeks.start} to {weeks.stop - 1}: {len(exercises)} functions to write

README.md says what this project is and in which order to read it. In the files below, the bodies of
some functions are missing: `raise NotImplementedError`. Their docstrings say what they take and
return, with shapes. Write the bodies, about {minutes} minutes in all, and answer the questions.

    pip install -r requirements.txt pytest
    python tests/try_exercise.py {exercises[0].name if exercises else "NAME"}

tries one exercise and says which claims about it do not hold yet, with a hint. In a notebook, write
`!` before a command.

- **Grading.** Your function is taken out of your file by its name and put into a project that is
  otherwise right. So a mistake in one exercise costs no other, and neither does a syntax error in
  another file. Names and arguments must stay. What is outside of the function is not taken: import
  and define what you need inside it. The claims that you can try give 60 % of the points, in part
  if only some hold; hidden tests, with other shapes and values, give the rest after the deadline.
- **Stuck in an earlier week?** Ask for checkpoints.zip and unpack it here, with
  `python -m zipfile -e checkpoints.zip .`: then every later stage has a model to start from."""
    if seed:
        text += f"""
- **Your town** is number {seed}: its residents work, eat and live otherwise than in the published
  project, so checkpoints and figures must come from a town of the same number."""
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
        text += "".join(f"{n}. {question}\n" for n, (question, _) in enumerate(e.questions, 1))
    return text


def pack_checkpoints(path: Path, out: Path):
    """The models and preferences of finished default runs, as a zip to be unpacked in a copy."""
    files = [f"{stage}/ckpt.pt" for stage in ("pretrain", "sft", "rm", "ppo", "dpo")]
    files.append("preferences.jsonl")
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
    """Grade, print, and write what Gradescope or GitHub Classroom read. Returns the exit code."""
    if not handin.is_dir():
        raise SystemExit(f"--grade {handin}: there is no such folder")
    names = [exercise.name for exercise in exercises]
    results = grade(handin, names, args.secret)
    if args.results:
        write_results(args.results, results)
    visible = [r for r in results if r["visibility"] == "visible"]
    shown = visible if args.github else results
    for result in shown:
        print(f"{result['score']:5.1f} of {result['max_score']:4.1f}  {result['name']}")
        if result["status"] == "failed":
            print(indented(result["output"]))
    score, best = (sum(result[key] for result in shown) for key in ("score", "max_score"))
    print(f"{score:.1f} of {best:.1f} points")
    if not args.github:
        return 0
    lines = ["| exercise | points | of |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['score']} | {r['max_score']} |" for r in visible]
    lines.append(f"| **all** | **{score:.1f}** | **{best:.1f}** |")
    for result in visible:
        if result["status"] == "failed":
            lines += ["", f"**{result['name']}**", "", indented(result["output"])]
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return int(score < best)


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def write_results(path: Path, results: list[dict], **more):
    """Gradescope's results.json."""
    try:
        path.write_text(json.dumps({"tests": results, **more}, indent=1), "utf-8")
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
        paths = [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("data/**/*.*")]
        for source in [*paths, *ROOT.glob("tests/**/*.*")]:
            if source.suffix in (".py", ".txt", ".csv", ".md", ".patch") and source.is_file():
                file.write(source, f"project/{source.relative_to(ROOT).as_posix()}")
    print(f"{path}: upload it under Configure Autograder; it holds the secret seed, and the keys")


# ---------------------------------------------------------------------------------------------
# Bug hunt


def three_bugs(identity: str, secret: str) -> list:
    """Three mutants by hash, each in another file: [(mutant, name of its function)]."""
    from mutants import MUTANTS

    found = []
    for file in HUNTED:
        source = (ROOT / file).read_text("utf-8")
        for name, function in functions(source):
            text = "\n".join(source.split("\n")[function.lineno - 1 : function.end_lineno])
            if name == "main" or "super()" in text:  # only a whole run of the script could tell
                continue
            found += [(m, name) for m in MUTANTS if m.file == file and m.right in text]
    random.Random(f"bugs {secret} {identity}").shuffle(found)
    chosen = {mutant.file: (mutant, name) for mutant, name in found}
    order = dict.fromkeys(mutant.file for mutant, _ in found)
    return [chosen[file] for file in list(order)[:3]]


def functions(source: str):
    """Functions of a file, and methods of its classes: (name, definition)."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


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

    def visit_IfExp(self, node):
        self.generic_visit(node)
        if self.turns(node.test):
            return ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.orelse, node.body)
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


def hunt_copy(where: Path, identity: str, secret: str):
    """A copy with three bugs, in files that cannot be compared with the published ones."""
    copy_project(where)
    shutil.rmtree(where / "data/experiments/results")
    (where / "data/experiments/bugs.py").unlink()
    for mutant, _ in three_bugs(identity, secret):
        edit(where / mutant.file, lambda text, m=mutant: text.replace(m.right, m.wrong))
    for path in [*where.glob("*.py"), *where.glob("data/**/*.py")]:
        rng = random.Random(f"rewrite {secret} {identity} {path.name}")
        edit(path, lambda text, rng=rng: normalised(text, rng))
    (where / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", where / "tests")
    (where / "HANDOUT.md").write_text(HUNT.format(files=", ".join(HUNTED)), "utf-8", newline="\n")
    print(f"{where}: three bugs are in it; HANDOUT.md says what to hand in")


HUNT = '''# Three bugs

In this copy of the project, three functions are wrong, each in another of these files:
{files}.
None of them is `main`. All else is right, though it is written otherwise than in the published
files: comments are gone, and many expressions are turned round. Scripts run to their end, and
results are worse than they should be.

Hand in three files, `test_bug_1.py` to `test_bug_3.py`, one for each bug:

    """train_sft.py: sft_loss

    What is wrong, in a sentence, and what one would notice in training.
    """
    from train_sft import sft_loss

    def test_prompts_do_not_count(tiny):  # a small model; `tokenizer` is a tokenizer
        ...
        assert ...

The first line is the place: file and function (or Class.method). The test has to fail on this copy
and to pass once the bug is mended, without reading any source text. Try it with
`python -m pytest tests`. Three points each: one for the place, two for the test; one more for the
sentence, which people read.
'''


def run_hunted_test(path: str, bug, note):
    """In a process of its own: a student's test, with one bug in the project or with none."""
    import pytest
    from grading import fence, limit_memory
    from try_exercise import Recorder

    limit_memory()
    fence()
    if bug:
        file, right, wrong, name = bug
        source = (ROOT / file).read_text("utf-8").replace(right, wrong)
        install(file, name, find_function(source, name, file), file)
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "conftest", "--capture=no", "--tb=short"]
    pytest.main([*arguments, "--import-mode=importlib", path], plugins=[Recorder(note)])


def grade_hunt(handin: Path, identity: str, args):
    """Points of a bug hunt: does each test pass on the project, and fail on a bug?"""
    if not handin.is_dir():
        raise SystemExit(f"--grade {handin}: there is no such folder")
    load_project()
    bugs, left = three_bugs(identity, args.secret), [0, 1, 2]
    results = []
    for path in [handin / f"test_bug_{n}.py" for n in (1, 2, 3)]:
        points, lines = 0, []
        try:
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else f"no Python: {error}"
            results.append(hunt_entry(path.name, 0, [f"{path.name}: {problem}"]))
            continue
        place, _, sentence = docstring.strip().partition("\n")
        place = " ".join(place.replace("`", "").split())
        right, why = passes(path, None)
        places = [f"{mutant.file}: {name}" for mutant, name in bugs]
        named = [n for n in left if places[n] == place]
        points += bool(named)
        lines.append(
            f"the place, {place or 'not named'}: {'right' if named else 'no bug is there'}"
        )
        if not right:
            lines.append(f"the test fails on the project without a bug: {why}")
        failing = [n for n in named or left if right and not passes(path, bugs[n])[0]]
        if failing:
            points += 2
            lines.append("the test passes without the bug and fails on it")
        elif right:
            lines.append("the test passes on the bug, too: it does not notice it")
        for n in (failing or named)[:1]:
            left.remove(n)
        lines.append(f"to be read: {' '.join(sentence.split()) or 'no sentence'}")
        results.append(hunt_entry(path.name, points, lines))
    for result in results:
        print(f"{result['score']} of {result['max_score']}  {result['name']}")
        print(indented(result["output"]))
    if args.results:
        write_results(args.results, results)


def passes(path: Path, bug) -> tuple[bool, str]:
    """Whether a student's test passes, and if not what it says. bug: one of `three_bugs`, or
    None."""
    planted = bug and (bug[0].file, bug[0].right, bug[0].wrong, bug[1])
    notes, stopped = in_process(run_hunted_test, str(path.resolve()), planted, seconds=60)
    tests = [note for note in notes if "::" in note[0]]
    wrong = [text for _, passed, text in notes if not passed]
    if stopped or not tests:
        return False, stopped or (wrong or ["there is no test in it"])[0]
    return not wrong, (wrong or [""])[0]


def hunt_entry(name: str, points: int, lines: list[str]) -> dict:
    return {
        "name": name,
        "score": points,
        "max_score": 3,
        "status": "passed" if points == 3 else "failed",
        "output": "\n".join(lines),
        "visibility": "after_due_date",
    }


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
    add("--grade", type=Path, metavar="HANDIN", help="grade a folder")
    add("--weeks", default="1-9", help="of the exercises: 3, or 1-3 (default: all)")
    add("--seed", default="", help="of a copy's facts, of --curves")
    add("--secret", default="", help="of hidden tests, bug hunts and the leaderboard: any text")
    add("--exercise", metavar="NAMES", help="grade just these, as in gae,policy_loss")
    add("--results", type=Path, metavar="FILE", help="write Gradescope's results.json")
    add("--github", action="store_true", help="visible tests only, a summary, and an exit code")
    add("--gradescope", type=Path, metavar="ZIP", help="write Gradescope's autograder")
    add("--checkpoints", type=Path, metavar="ZIP", help="pack the models of --out")
    add("--out", type=Path, default=ROOT / "out", help="folder of finished default runs")
    add("--bug-hunt", metavar="ID", help="with --student or --grade: three bugs for this student")
    add("--curves", type=Path, metavar="PNG", help="draw runs of PPO without names")
    add("--leaderboard", type=Path, metavar="HANDIN", help="rerun and measure a training script")
    add("--stage", choices=("ppo", "dpo"), default="ppo", help="of --leaderboard")
    add("--budget", type=float, help="of --leaderboard, in forward passes over one token")
    args = parser.parse_args()
    weeks = parse_weeks(args.weeks)
    exercises = [exercise for exercise in EXERCISES if exercise.week in weeks]
    if args.exercise:
        names = [exercise.name for exercise in EXERCISES]
        if unknown := [name for name in args.exercise.split(",") if name not in names]:
            raise SystemExit(f"--exercise {unknown[0]}: there are {', '.join(names)}")
        exercises = [e for e in EXERCISES if e.name in args.exercise.split(",")]
    if args.bug_hunt and not args.secret:
        raise SystemExit("--bug-hunt needs --secret: else students could find their bugs by name")
    if args.gradescope and not args.secret:
        raise SystemExit("--gradescope needs --secret, the seed of the hidden tests: any text")
    if args.student and args.bug_hunt:
        hunt_copy(args.student, args.bug_hunt, args.secret)
    elif args.student:
        student_copy(args.student, weeks, args.seed)
    elif args.grade and args.bug_hunt:
        grade_hunt(args.grade, args.bug_hunt, args)
    elif args.grade:
        sys.exit(grade_handin(args.grade, exercises, args))
    elif args.gradescope:
        pack_gradescope(args.gradescope, weeks, args.secret)
    elif args.checkpoints:
        pack_checkpoints(args.checkpoints, args.out)
    elif args.curves:
        curves(args.curves, args.seed)
    elif args.leaderboard:
        given = args.stage, args.out, args.secret, args.results, args.budget
        sys.exit(leaderboard(args.leaderboard, *given))
    else:
        parser.error("say what to do: one of the lines that -h shows")


if __name__ == "__main__":
    run_script(main)
