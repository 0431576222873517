"""Imports go one way only: a file can be read without those above it, and none is in a circle."""

import ast

import pytest
from tiny_runs import ROOT

import data

# From the ground up: a module may import those of its own layer and of lower ones.
LAYERS = [
    "gpt kernels",
    "data.tokenizer data.chat data.files data.alarms data.check data.run data.metrics "
    "data.preferences data.gpt2 data.download data.town",
    "train_pretrain train_sft train_rm train_ppo train_dpo",
    "data.evaluate data.experiments data.talk data.trace",
]


def layer(module: str) -> int:
    """The floor on which a module, or the package that it is in, lives."""
    for floor, rooms in enumerate(LAYERS):
        if any(f"{module}.".startswith(f"{room}.") for room in rooms.split()):
            return floor
    raise AssertionError(f"{module} is on no layer: name it in {__file__}")


def read_project() -> dict[str, str]:
    """path -> source, of the files that a learner imports: not of the tests."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_main_block(node) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def find_arrows(sources: dict[str, str]) -> dict[str, set[str]]:
    """module -> modules of ours that it imports, anywhere in it.

    Left out is one block alone: `python gpt.py` talks, and `import gpt` does not run that.
    """
    modules = {module_name(path) for path in sources}
    arrows = {}
    for path, source in sources.items():
        name, tree = module_name(path), ast.parse(source)
        package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
        if name == "gpt":
            tree.body = [node for node in tree.body if not is_main_block(node)]
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
                base = ".".join(part for part in (base, node.module) if part)
                for alias in node.names:  # from data import run: the module, not a name in `data`
                    inner = f"{base}.{alias.name}"
                    found.add(inner if inner in modules else base)
        arrows[name] = found & modules
    return arrows


def upward(arrows) -> list[str]:
    """Arrows that go up."""
    pairs = [(a, b) for a in sorted(arrows) for b in sorted(arrows[a])]
    pairs = [(a, b) for a, b in pairs if a != "data"]  # the map of the folder, which has no code
    return [f"{a} imports {b}, from above it" for a, b in pairs if layer(b) > layer(a)]


def circles(arrows) -> list[str]:
    """A walk along the arrows that comes back, for every module from which there is one."""
    found = []
    for start in sorted(arrows):
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop(0)
            for step in sorted(arrows[way[-1]]):
                if step == start:
                    found.append(" -> ".join([*way, start]))
                    ways = []
                    break
                if step not in seen:
                    seen.add(step)
                    ways.append([*way, step])
    return found


def test_imports_only_go_down():
    wrong = upward(find_arrows(read_project()))
    assert not wrong, "\n".join(wrong)


def test_model_and_kernels_import_nothing_of_ours():
    arrows = find_arrows(read_project())
    assert arrows["gpt"] == arrows["kernels"] == set()


def test_no_modules_import_each_other_in_a_circle():
    wrong = circles(find_arrows(read_project()))
    assert not wrong, "\n".join(wrong)


def test_the_map_of_data_names_every_file_of_it():
    named = {line.split()[0].rstrip("/") for line in data.__doc__.split("\n") if line[:4] == "    "}
    there = {path.name for path in (ROOT / "data").iterdir() if path.name[:2] != "__"}
    assert there <= named


@pytest.mark.parametrize(
    "path, source, arrow",
    [
        ("data/run.py", "import train_sft", "data.run imports train_sft"),
        ("data/chat.py", "import os, data.talk as t", "data.chat imports data.talk"),
        ("data/chat.py", "from data import talk", "data.chat imports data.talk"),
        ("data/chat.py", "from .talk import main", "data.chat imports data.talk"),
        ("data/town/gold.py", "from ..talk import main", "data.town.gold imports data.talk"),
        ("train_sft.py", "from data.talk import Speaker", "train_sft imports data.talk"),
        ("train_sft.py", "def f():\n  import data.talk", "train_sft imports data.talk"),
        ("gpt.py", "from data.chat import pad", "gpt imports data.chat"),
        ("gpt.py", "if True:\n  import data.talk", "gpt imports data.talk"),
        (
            "data/chat.py",
            "if __name__ == '__main__':\n  import train_sft",
            "data.chat imports train",
        ),
    ],
)
def test_an_arrow_that_goes_up_is_seen_wherever_it_hides(path, source, arrow):
    empty = dict.fromkeys(("data/talk.py", "data/chat.py", "train_sft.py", "gpt.py"), "")
    assert upward(find_arrows(empty)) == []
    (wrong,) = upward(find_arrows({**empty, path: source}))
    assert wrong.startswith(arrow) and wrong.endswith("from above it")


def test_what_may_be_imported_is_not_complained_about():
    sources = {
        "gpt.py": "import torch\nif __name__ == '__main__':\n  from data.talk import main",
        "data/chat.py": "import gpt",
        "train_rm.py": "from data.chat import pad",
        "train_ppo.py": "from train_rm import score_sequences\nfrom gpt import GPT",
        "data/talk.py": "from data import chat\nimport train_ppo",
    }
    arrows = find_arrows(sources)
    assert upward(arrows) == circles(arrows) == [] and arrows["gpt"] == set()
    assert arrows["data.talk"] == {"data.chat", "train_ppo"}


def test_a_circle_is_seen_even_if_functions_hide_it():
    a, b, c = "import data.b", "def f():\n  from data import c", "from data.a import x"
    arrows = find_arrows({"data/a.py": a, "data/b.py": b, "data/c.py": c, "data/d.py": a})
    assert (
        circles(arrows)[0] == "data.a -> data.b -> data.c -> data.a" and len(circles(arrows)) == 3
    )
