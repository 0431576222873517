"""Grade a hand-in: each exercise's function alone, in a process of its own, with a project that is
otherwise right.

All of the project is imported once. For every exercise a fork of this process, in which a fence
goes up (no network, no programs, no files to write, none of the project to read but the tests),
compiles the function of the hand-in, puts it in place of the project's, and runs cases and tests.
So nothing that one function does reaches another, and what a file has outside of the named function
is never run. What is right is computed from the project's own function, in another process and
later: while a function of a hand-in runs, there is no answer to be found.

The process tells its results as it goes, so those that it has are counted if it is stopped.

The fence holds what a student would try, not somebody who attacks Python: a function can find out
in which process it runs, and claim that a visible test has passed. Where that matters, grade each
hand-in in a container (Gradescope does), and read functions that do strange things.
"""

import ast
import importlib
import json
import linecache
import math
import multiprocessing
import os
import secrets
import signal
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # of an exercise
MEMORY = 3 * 2**30  # bytes, beyond what the project itself takes
# What the code of a student may not read, and what of that it may: Python, where it lies inside.
CLOSED, PYTHON = (ROOT, Path("/autograder"), Path("/proc")), (sys.prefix, sys.base_prefix)


class HandInError(Exception):
    """Why something cannot be taken from a hand-in: one line for its student."""


# ---------------------------------------------------------------------------------------------
# A function from a file


def find_function(source: str, name: str, path) -> ast.FunctionDef:
    """The definition of a function, or of Class.method, in a source text.

    Raises HandInError, with file and line, if the text is no Python or has no such function.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise HandInError(f"{path}, line {line}: {getattr(error, 'msg', error)}")
    *classes, function = name.split(".")
    for wanted in classes:
        body = [n for node in body if is_named(node, ast.ClassDef, wanted) for n in node.body]
    for node in reversed(body):  # of several the last one counts, as in Python
        if is_named(node, ast.FunctionDef, function):
            return node
    raise HandInError(f"{path} has no {name}: keep the names, and write inside the bodies")


def is_named(node, kind, name) -> bool:
    return isinstance(node, kind) and node.name == name


def find_file(handin: Path, file: str) -> Path:
    """A file of a hand-in: at its place, flat in the folder, or the only one of its name below it,
    as in a folder that has been zipped. Raises HandInError if there is none, or a choice, or if it
    is a link to a file elsewhere, such as the project's."""
    name = Path(file).name
    found = [path for path in (handin / file, handin / name) if path.is_file()][:1]
    found = found or [path for path in handin.rglob(name) if path.is_file()]
    if len(found) > 1:
        raise HandInError(f"{file} is there {len(found)} times: hand in one")
    if not found:
        raise HandInError(f"{file} is missing: hand it in under this name")
    if not found[0].resolve().is_relative_to(handin.resolve()):
        raise HandInError(f"{file} is a link: hand in the file itself")
    return found[0]


def read_file(handin: Path, file: str) -> tuple[str, Path]:
    """The text of a file of a hand-in, and where it is. Raises HandInError if it cannot be read."""
    path = find_file(handin, file)
    try:
        return path.read_text("utf-8-sig"), path  # editors on Windows put a mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        raise HandInError(f"{file} cannot be read: {error}")


def install(file: str, name: str, definition: ast.FunctionDef, path):
    """Compile a function among the names of its module, and put it wherever that one is used.

    Of a hand-in nothing else is taken: no decorators, and no code outside of the function.
    """
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    definition.decorator_list, made = [], {}
    code = compile(ast.Module([definition], []), str(path), "exec")
    exec(code, vars(module), made)
    *classes, function = name.split(".")
    if classes:
        setattr(getattr(module, classes[0]), function, made[function])
        return
    old = getattr(module, function)
    for other in list(sys.modules.values()):  # who has written `from data.run import lr_at`
        if vars(other).get(function) is old:
            setattr(other, function, made[function])


# ---------------------------------------------------------------------------------------------
# Cases: what a function returns, in a form that can be sent and compared


def make_cases(exercise, seed: str):
    """The cases of a seed: pairs (the call as text, a function that makes it)."""
    import torch

    rng = torch.Generator().manual_seed(zlib.crc32(f"{exercise.name} {seed}".encode()))
    return exercise.cases(rng)


def run_cases(cases, note, folder: Path | None = None):
    """Call the function as it is installed now. folder: the hand-in, whose lines errors name."""
    for text, run in cases:
        try:
            value = plain(run())
        except Exception as error:
            value = {"error": describe(error, folder)}
        note(text, value)


def plain(value):
    """A result made of lists, numbers and texts; a tensor is {"shape", "numbers"}."""
    import torch

    if isinstance(value, torch.Tensor):
        numbers = value.detach().double().flatten().tolist()
        return {"shape": list(value.shape), "numbers": [round_off(x) for x in numbers]}
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, float):
        return round_off(value)
    if isinstance(value, int) and abs(value) >= 2**63:  # not to be compared as a float
        return f"an integer of {value.bit_length()} bits"
    return value if isinstance(value, (int, str, bool, type(None))) else repr(value)[:80]


def round_off(x: float):
    """Seven digits; nan and infinities by name, since JSON has none."""
    return float(f"{x:.7g}") if math.isfinite(x) else str(x)


def describe(error: BaseException, folder: Path | None) -> str:
    """An error in one line: what it is, and the last line of the hand-in in its traceback."""
    from try_exercise import in_folder

    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if isinstance(error, NameError):
        text += "; only the function itself is taken: import and define what it needs inside it"
    place, trace = "", error.__traceback__
    while trace and folder:
        file = trace.tb_frame.f_code.co_filename
        if in_folder(file, folder):
            place = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return text[:300] + place


def same(a, b) -> bool:
    """Whether two plain results are equal, but for rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-5 + 1e-4 * abs(b)
    return a == b


def readable(value) -> str:
    """A plain result for people: tensors as nested lists of four digits."""
    if is_tensor(value):
        shape, numbers = value["shape"], [short(x) for x in value["numbers"]]
        if len(numbers) > 16:
            return f"(a tensor {tuple(shape)} that begins {', '.join(numbers[:6])} ...)"
        for size in reversed(shape):
            groups = range(0, len(numbers), size) if size else []
            numbers = [f"[{', '.join(numbers[i : i + size])}]" for i in groups]
        return numbers[0] if numbers else f"(a tensor {tuple(shape)})"
    if isinstance(value, dict):
        if "error" in value:
            return str(value["error"])
        return ", ".join(f"{name} {readable(x)}" for name, x in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(readable, value))}]"
    return short(value)


def is_tensor(value) -> bool:
    return isinstance(value, dict) and value.keys() == {"shape", "numbers"}


def short(x) -> str:
    return f"{x + 0.0:.4g}" if isinstance(x, float) else str(x)  # never -0


def difference(expected, got) -> tuple[str, str]:
    """Of two different results, the first part in which they differ, as texts."""
    if is_tensor(expected) and is_tensor(got):
        if expected["shape"] != got["shape"]:
            return f"shape {tuple(expected['shape'])}", f"shape {tuple(got['shape'])}"
        numbers = expected["numbers"], got["numbers"]
        if len(numbers[0]) > 16:  # too many to look through
            at = next(i for i, pair in enumerate(zip(*numbers)) if not same(*pair))
            where = [int(i) for i in np.unravel_index(at, expected["shape"])]
            return tuple(f"at {where}: {short(x[at])}" for x in numbers)
    elif isinstance(expected, (dict, list)) and type(expected) is type(got):
        keys = [list(x) if isinstance(x, dict) else list(range(len(x))) for x in (expected, got)]
        if keys[0] == keys[1] and not all(isinstance(x, int) for x in expected):
            key = next(key for key in keys[0] if not same(expected[key], got[key]))
            label = f"result {key}" if isinstance(key, int) else key
            return tuple(f"{label}: {x}" for x in difference(expected[key], got[key]))
    return tuple(text[:300] for text in (readable(expected), readable(got)))


# ---------------------------------------------------------------------------------------------
# Processes


def fence(writable: Path | None = None, closed=(), opened=()):
    """From now on, and for good, this process reaches no network and starts no programs; it writes
    nothing that is not below `writable`, and reads nothing below a folder of `closed`, unless that
    is below a folder, or is a file, of `opened` in turn."""
    writable = os.path.realpath(writable) if writable else None
    closed, opened = ([os.path.realpath(path) for path in some] for some in (closed, opened))
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    never = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    never += ("subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork")
    never += ("os.forkpty", "os.kill", "os.killpg")
    moving = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
    moving += ("os.truncate", "os.chmod", "os.chown", "os.utime")

    def inside(path, folder):
        return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)

    def watch(event, args):
        if event in never:
            raise PermissionError(f"{event} is not allowed here")
        paths, writes = [], event in moving
        if event == "open":
            paths, writes = [args[0]], bool((args[2] or 0) & changing)
        elif writes:
            paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
        for path in paths:
            if not isinstance(path, (str, bytes, os.PathLike)):
                continue  # an open file
            name, path = os.fsdecode(path), os.path.realpath(os.fsdecode(path))
            around = [folder for folder in (*closed, *opened) if inside(path, folder)]
            if max(around, key=len, default=None) in closed:  # the innermost decides
                raise PermissionError(f"{name} is closed")
            if writes and not (writable and inside(path, writable) or name == os.devnull):
                raise PermissionError(f"{name} may not be written")

    linecache.clearcache()  # of files that are closed now
    sys.dont_write_bytecode = True
    sys.addaudithook(watch)


def limit_memory():
    """Let this process take MEMORY bytes more than it has; Windows has no such limit."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def load_project():
    """Import all that exercises and their tests need: behind the fence it cannot be read."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for folder in (ROOT, ROOT / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    os.chdir(ROOT)
    import exercises
    import pytest  # noqa: F401
    import tiny_runs  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401  (else every fork would, in half a second)

    import data.evaluate  # noqa: F401  (and what that imports)

    torch.set_num_threads(1)
    return exercises


def in_process(work, *args, seconds: float):
    """Do `work(*args, note)` in a process of its own. Returns what it has noted, and why it was
    stopped ("" if it was not)."""
    # Elsewhere a fork of a process that has loaded torch is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, work, *args), daemon=True)
    process.start()
    there.close()
    # Not a limit on waiting for a note: it could come by halves, and never end.
    clock, until = threading.Timer(seconds, process.kill), time.monotonic() + seconds
    clock.start()
    notes, finished, late = [], False, False
    try:
        while (note := json.loads(here.recv_bytes(2**26))) != "done":
            notes.append(note)
        finished = True
    except (EOFError, OSError, ValueError):
        late = time.monotonic() >= until
        process.join(1)  # for its exit code
    finally:
        clock.cancel()
        process.kill()  # also if it is done: to tidy up takes it a second
        process.join()
    if finished:
        return notes, ""
    if late:
        return notes, f"stopped after {seconds:.0f} seconds: does a loop ever end?"
    return notes, f"the process ended before its tests did (exit code {process.exitcode})"


def _work(pipe, work, *args):
    load_project()
    if sys.platform != "win32":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setpgid(0, 0)  # a signal to its own group reaches no grader
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)

    def note(*what):
        pipe.send_bytes(json.dumps(what).encode())

    work(*args, note)
    pipe.send_bytes(b'"done"')


def grade_function(name: str, handin: str, secret: str, note):
    """In a process of its own: take the function of an exercise from a hand-in, and try it."""
    from exercises import BY_NAME
    from try_exercise import run_tests

    exercise, folder = BY_NAME[name], Path(handin)
    try:
        source, path = read_file(folder, exercise.file)
        definition = find_function(source, exercise.function, exercise.file)
    except HandInError as error:
        note("refused", str(error))
        return
    seeds = {"public": "", "hidden": secret}
    cases = {kind: list(make_cases(exercise, seed)) for kind, seed in seeds.items()}
    for other in BY_NAME.values():  # keys, and pieces of solutions
        other.questions = other.mistakes = None
    files = {"conftest.py", *(test.partition("::")[0] for test in exercise.tests)}
    limit_memory()
    fence(closed=(*CLOSED, folder), opened=(*PYTHON, *(ROOT / "tests" / file for file in files)))
    try:
        install(exercise.file, exercise.function, definition, path)
    except Exception as error:  # a default value or an annotation that fails
        said = describe(error, folder)
        note("refused", f"{exercise.file}, line {definition.lineno}: {said}")
        return
    for kind, some in cases.items():
        run_cases(some, lambda text, value, kind=kind: note(kind, text, value), folder)
    run_tests(list(exercise.tests), lambda *result: note("test", *result), folder)


def right_answers(names: list[str], secret: str, note):
    """In a process of its own: what the project's functions return, and what changes of them do."""
    from exercises import BY_NAME

    for name in names:
        exercise = BY_NAME[name]
        for kind, seed in (("public", ""), ("hidden", secret)):
            cases = make_cases(exercise, seed)
            run_cases(cases, lambda text, value, k=kind, n=name: note(n, k, text, value))
        for number, (_, changes) in enumerate(known_mistakes(exercise)):
            definition = changed(exercise, changes)
            # An assertion of ours would stop what a student's own function goes through with.
            definition.body = [s for s in definition.body if not isinstance(s, ast.Assert)]
            install(exercise.file, exercise.function, definition, exercise.file)
            cases = make_cases(exercise, "")
            run_cases(cases, lambda text, value, k=number, n=name: note(n, k, text, value))
        install(exercise.file, exercise.function, changed(exercise, {}), exercise.file)


def function_text(exercise) -> str:
    """The project's own function, as lines of its file."""
    source = (ROOT / exercise.file).read_text("utf-8")
    function = find_function(source, exercise.function, exercise.file)
    return "\n".join(source.split("\n")[function.lineno - 1 : function.end_lineno]) + "\n"


def changed(exercise, changes: dict[str, str]) -> ast.FunctionDef:
    """The project's own function with pieces of it replaced."""
    text = function_text(exercise)
    for right, wrong in changes.items():
        assert right in text, f"a mistake replaces what is not in {exercise.name}: {right}"
        text = text.replace(right, wrong)
    return ast.parse(textwrap.dedent(text)).body[0]


def known_mistakes(exercise) -> list[tuple[str, dict[str, str]]]:
    """Those of the exercise, and the mutants that lie inside its function: (sentence, changes)."""
    found = [(said, change) for said, several in exercise.mistakes.items() for change in several]
    for mutant in mutants_of(exercise):
        said = f"In training you would notice it by this: {mutant.symptom}"
        found.append((said, {mutant.right: mutant.wrong}))
    return found


def mutants_of(exercise) -> list:
    """The mutants of tests/mutants.py that change this function and nothing else."""
    from mutants import MUTANTS

    text = function_text(exercise)
    return [m for m in MUTANTS if m.file == exercise.file and m.right in text]


# ---------------------------------------------------------------------------------------------
# Points and feedback


def grade(handin: Path, names: list[str], secret: str = "", seconds: float = SECONDS) -> list[dict]:
    """Points and feedback of a hand-in: two entries of Gradescope's results.json per exercise, of
    the visible tests and of the hidden ones, which are shown after the deadline."""
    given, secret = str(handin.resolve()), secret or secrets.token_hex(4)
    exercises = load_project().BY_NAME
    done = {}  # name -> (notes, why it was stopped)
    for name in names:
        done[name] = in_process(grade_function, name, given, secret, seconds=seconds)
    # Last, so that no function of a hand-in runs in a process that has inherited the answers.
    notes, stopped = in_process(right_answers, names, secret, seconds=10 * seconds)
    if stopped:
        raise RuntimeError(f"the project's own functions: {stopped}")
    answers = {}  # name -> "public", "hidden" or the number of a mistake -> [(text, value)]
    for name, kind, text, value in notes:
        answers.setdefault(name, {}).setdefault(kind, []).append((text, value))
    return [e for name in names for e in judge(exercises[name], *done[name], answers[name])]


def judge(exercise, notes: list, stopped: str, answers: dict) -> list[dict]:
    """The two entries of one exercise."""
    from exercises import HIDDEN

    refused = [rest[0] for kind, *rest in notes if kind == "refused"]
    said = refused + ([stopped] if stopped else [])
    _, wrong = compare("public", notes, answers)
    if wrong:
        said += describe_case("the smallest case", wrong[0])
        said += [f"    {what}" for what in diagnosis(exercise, notes, answers)]
    reached, failures = try_claims(exercise, notes)
    blank = [got["error"] for *_, got in wrong if is_blank(got)]
    if blank and len(blank) == len(answers["public"]):
        said = blank[:1]
    elif not refused:
        said += failures

    right, wrong = compare("hidden", notes, answers)
    after = [f"{right} of {len(answers['hidden'])} hidden cases are right"]
    if wrong:
        after += describe_case("the smallest of the others", wrong[0])
    title = f"{exercise.name} ({exercise.file}: {exercise.function})"
    visible, hidden = exercise.points * (1 - HIDDEN), exercise.points * HIDDEN
    share = right / len(answers["hidden"])
    return [
        entry(title, visible * reached, visible, said, "visible"),
        entry(f"{title}, hidden", hidden * share, hidden, refused or after, "after_due_date"),
    ]


def compare(kind: str, notes: list, answers: dict) -> tuple[int, list]:
    """Of the cases of a kind, how many are right, and those that are not: (text, expected, got)."""
    mine = [rest for k, *rest in notes if k == kind]  # fewer than there are, if it was stopped
    both = [(text, expected, got) for (text, expected), (_, got) in zip(answers[kind], mine)]
    wrong = [case for case in both if not same(*case[1:])]
    return len(both) - len(wrong), wrong


def describe_case(title: str, case) -> list[str]:
    text, *results = case
    expected, got = difference(*results)
    return [f"{title}: {text}", f"    expected {expected}", f"    got      {got}"]


def try_claims(exercise, notes: list) -> tuple[float, list[str]]:
    """The visible tests: the fraction of their weight that is reached, and what fails, in lines."""
    from try_exercise import claim, outcome

    results = [rest for kind, *rest in notes if kind == "test"]
    reached, lines = 0.0, []
    for test, (weight, hint) in exercise.tests.items():
        passed, cases, said = outcome(test, results)
        reached += weight * passed / max(cases, 1)
        if not passed == cases > 0:
            part = f" ({passed} of {cases})" if passed else ""
            lines += [f"FAILS: {claim(test)}{part}", f"    {said}", f"    hint: {hint}"]
    return reached / sum(weight for weight, _ in exercise.tests.values()), lines


def entry(name: str, score: float, best: float, lines: list[str], visibility: str) -> dict:
    """One of the "tests" of Gradescope's results.json."""
    score = round(score, 2)
    return {
        "name": name,
        "score": score,
        "max_score": round(best, 2),
        "status": "passed" if score == round(best, 2) else "failed",
        "output": "\n".join(lines) or "all tests pass",
        "visibility": visibility,
    }


def diagnosis(exercise, notes: list, answers: dict) -> list[str]:
    """What is wrong, if the hand-in returns in all public cases what a known mistake returns."""
    mine = [value for kind, *rest in notes if kind == "public" for value in rest[1:]]
    for number, (sentence, _) in enumerate(known_mistakes(exercise)):
        wrong = [value for _, value in answers.get(number, [])]
        if len(wrong) == len(mine) and all(map(same, wrong, mine)):
            return [sentence]
    return []


def is_blank(value) -> bool:
    """Whether a result is what a blank says: "NotImplementedError: gae: your code here"."""
    said = value.get("error", "") if isinstance(value, dict) else ""
    return str(said).startswith("NotImplementedError")
