"""The list of mutants stays true: what each replaces is there, and so is the test that kills it."""

import ast
import re

from mutants import MUTANTS
from tiny_runs import ROOT


def test_every_mutant_fits_its_file_and_names_a_test_that_is_there():
    sources, tests = {}, {}
    for mutant in MUTANTS:
        if mutant.file not in sources:
            sources[mutant.file] = (ROOT / mutant.file).read_text("utf-8")
        source = sources[mutant.file]
        assert source.count(mutant.right) == 1, f"{mutant.file}: {mutant.right}"
        ast.parse(source.replace(mutant.right, mutant.wrong))  # it is still Python
        file, _, name = mutant.test.partition("::")
        if file not in tests:
            text = (ROOT / "tests" / file).read_text("utf-8")
            tests[file] = set(re.findall(r"^def (test_\w+)", text, re.M))
        assert name.partition("[")[0] in tests[file], mutant.test


def test_every_mutant_is_another_change_with_a_symptom():
    changes = [(mutant.file, mutant.right, mutant.wrong) for mutant in MUTANTS]
    assert len(set(changes)) == len(changes)
    assert all(mutant.symptom.endswith(".") and mutant.right != mutant.wrong for mutant in MUTANTS)
