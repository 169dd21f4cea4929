"""Selectors that know the families: they show how much there is to win.

python bench/ablate.py --world curriculum --arm "oracle=--selector toy/curriculum/oracle.py:best_order"
"""

import numpy as np

TARGETS = ("irn", "sl", "w")
PARTS = ("i", "r", "n", "ir", "rn")  # of the target that begins near 0


def of_families(rows, random, *families):
    """Prompts of these families in random order; one group of families after the other, then all others."""
    place = np.full(len(rows), len(families))
    for number, group in reversed(list(enumerate(families))):
        place[[row["family"] in group for row in rows]] = number
    return random.random(len(rows)) - place


def targets_only(rows, random):
    return of_families(rows, random, TARGETS)


def best_order(rows, random, stage):
    """The parts of `irn` in its place at first."""
    return of_families(rows, random, PARTS + TARGETS[1:]) if stage <= 2 else of_families(rows, random, TARGETS, PARTS)
