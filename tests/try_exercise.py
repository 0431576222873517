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
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE / "exercises.json"  # name -> {test: hint}; written for students by tests/course.py


class Recorder:
    """A plugin of pytest that notes how every test ended: (test, whether it passed, message)."""

    def __init__(self, note):
        self.note = note

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            passed = report.passed
            self.note(report.nodeid.rpartition("/")[2], passed, "" if passed else message(report))

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(report.nodeid.rpartition("/")[2], False, last_line(str(report.longrepr)))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("E").strip() if lines else "no message"


def message(report) -> str:
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
        if place and Path(place.path).parent != HERE and "site-packages" not in place.path:
            return f"{text} ({Path(place.path).name}, line {place.lineno})"
    return text


def run_tests(tests: list[str], note):
    """Run tests, file::name in this folder, in this process, and note each as `Recorder` says."""
    import pytest

    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--tb=short"]
    arguments += ["--capture=no", "--no-header"]
    pytest.main([*arguments, *(f"{HERE / test}" for test in tests)], plugins=[Recorder(note)])


def claim(test: str) -> str:
    """The name of a test as the sentence that it is."""
    return test.partition("::test_")[2].partition("[")[0].replace("_", " ")


def main():
    """The command line."""
    exercises = json.loads(TESTS.read_text("utf-8"))
    names = sys.argv[1:] or list(exercises)
    if unknown := [name for name in names if name not in exercises]:
        sys.exit(f"there is no exercise {unknown[0]}: there are {', '.join(exercises)}")
    os.chdir(HERE.parent)
    failed = 0
    for name in names:
        results = []
        with contextlib.redirect_stdout(io.StringIO()):  # python -m pytest shows all of it
            run_tests(list(exercises[name]), lambda *result, to=results: to.append(result))
        print(f"\n{name}")
        for test, hint in exercises[name].items():
            mine = [r for r in results if r[0].partition("[")[0] == test]
            wrong = [text for _, passed, text in mine if not passed]
            if mine and not wrong:
                print(f"    holds: {claim(test)}")
                continue
            failed += 1
            broken = [text for where, _, text in results if "::" not in where]  # a file that fails
            print(f"    FAILS: {claim(test)}")
            for line in ((wrong or broken or ["it did not run"])[0], f"hint: {hint}"):
                print(textwrap.indent(textwrap.fill(line, 90), " " * 8))
    sys.exit(failed > 0)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
