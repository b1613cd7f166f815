"""tests/mutate.py: every mutant has its place and its tests, whatever has been rewritten since."""

from __future__ import annotations

import mutate


def test_every_mutants_text_stands_once_in_its_file_and_its_tests_are_there():
    lost = []
    for mutant in (m for area in mutate.MUTANTS.values() for m in area):
        what, tests, edits, file = mutate.parts(mutant)
        lost += [
            f"{what}: no {word}"
            for word in mutate.tests_of(tests)
            if word.endswith(".py") and not (mutate.ROOT / word).is_file()
        ]
        try:
            assert mutate.edited(mutate.ROOT, edits, file) != (mutate.ROOT / file).read_text(encoding="utf-8"), what
        except LookupError as e:
            lost.append(f"{what}: {e}")
    assert not lost, "\n".join(lost)
