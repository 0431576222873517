"""Try an exercise: run its tests, and say which claims do not hold yet.

    python tests/try_exercise.py gae         one exercise (HANDOUT.md has their names)
    python tests/try_exercise.py             all of them, in the order of the lecture

The grader runs the same tests on your function alone, in a project whose other functions are right.
Here they run on all of your files: if attention is wrong, so is what samples from the model.
"""

import contextlib
import io
import json
import os
import symtable
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Written for students by tests/course.py: name -> {"file", "names" at its top level as it was
# handed out, "tests": {test: hint}}.
EXERCISES = HERE / "exercises.json"


class Recorder:
    """A plugin of pytest that notes how tests end: (test, whether it passed, message).

    Every test is noted as failed when it is found, and again when it has run: see `outcome`.
    """

    def __init__(self, note, folder: Path):
        self.note, self.folder = note, folder  # messages name the last line of a file in it

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.note(item.nodeid.rpartition("/")[2], False, "it did not run")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            said = "" if report.passed else message(report, self.folder)
            self.note(report.nodeid.rpartition("/")[2], report.passed, said)

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(report.nodeid.rpartition("/")[2], False, last_line(str(report.longrepr)))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("E").strip() if lines else "no message"


def message(report, folder: Path) -> str:
    """What a failed test says, in one line, with the last line of the function under test."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return last_line(str(report.longrepr))
    lines = [line.strip() for line in crash.message.splitlines() if line.strip()]
    text = lines[0] if lines else "it fails"
    # of torch.testing.assert_close, which compares tensors
    text += "".join(f"; {line}" for line in lines if line.startswith("Greatest absolute"))
    for entry in reversed(report.longrepr.reprtraceback.reprentries):
        place = getattr(entry, "reprfileloc", None)
        if place and in_folder(place.path, folder):
            return f"{text} ({Path(place.path).name}, line {place.lineno})"
    return text


def in_folder(file: str, folder: Path) -> bool:
    """Whether a line of this file may be a student's: no test, no library."""
    path = Path(file).resolve()
    return folder in path.parents and path.parent != HERE and "site-packages" not in path.parts


def run_tests(tests: list[str], note, folder: Path):
    """Run tests, file::name in this folder, in this process, and note each as `Recorder` says."""
    import pytest

    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--tb=short"]
    arguments += ["--capture=no", "--no-header"]
    tests = [f"{HERE / test}" for test in tests]
    pytest.main([*arguments, *tests], plugins=[Recorder(note, folder)])


def outcome(test: str, notes: list) -> tuple[int, int, str]:
    """How many cases of a test passed, of how many, and what the first of the others says.

    notes: those of `Recorder`. What was noted last about a case counts.
    """
    last = {case: how for case, *how in notes if case.partition("[")[0] == test}
    said = [text for passed, text in last.values() if not passed]
    said += [text for where, _, text in notes if "::" not in where]  # a file that cannot be read
    passed = sum(passed for passed, _ in last.values())
    return passed, len(last), (said or ["it did not run"])[0]


def claim(test: str) -> str:
    """The name of a test as the sentence that it is."""
    return test.partition("::test_")[2].partition("[")[0].replace("_", " ")


def top_names(path: Path) -> list[str]:
    """The names that a file defines or imports at its top level; none if it is no Python."""
    try:
        table = symtable.symtable(path.read_text("utf-8-sig"), path.name, "exec")
    except (OSError, SyntaxError, ValueError):  # the tests say so
        return []
    return sorted(symbol.get_name() for symbol in table.get_symbols() if symbol.is_local())


def main():
    """The command line."""
    if not EXERCISES.exists():
        sys.exit("run this in a student's copy: python tests/course.py --student DIR makes one")
    exercises = json.loads(EXERCISES.read_text("utf-8"))
    names = sys.argv[1:] or list(exercises)
    if unknown := [name for name in names if name not in exercises]:
        sys.exit(f"there is no exercise {unknown[0]}: there are {', '.join(exercises)}")
    os.chdir(HERE.parent)
    failed = 0
    for name in names:
        file, old, tests = exercises[name].values()
        notes = []
        with contextlib.redirect_stdout(io.StringIO()):  # python -m pytest shows all of it
            run_tests(list(tests), lambda *note, to=notes: to.append(note), HERE.parent)
        print(f"\n{name}")
        for test, hint in tests.items():
            passed, cases, said = outcome(test, notes)
            if passed == cases > 0:
                print(f"    holds: {claim(test)}")
                continue
            failed += 1
            print(f"    FAILS: {claim(test)}")
            for line in (said, f"hint: {hint}"):
                print(textwrap.indent(textwrap.fill(line, 90), " " * 8))
        if new := [x for x in top_names(HERE.parent / file) if x not in old]:
            said = f"note: {', '.join(new)} at the top level of {file} is new, and the grader takes"
            said += f" only the function itself: import and define what {name} needs inside it"
            print(textwrap.indent(textwrap.fill(said, 94), " " * 4))
    sys.exit(failed > 0)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
