"""One file an implementation: ``prepare(case)`` gives a callable on the case's inputs, or the reason why there is none."""

from collections.abc import Callable

from trinix.lab.case import Case
from trinix.lab.peers import compile, eager, seed_formula, trinix

# the order of tables and of the interleaved timing
PREPARE: dict[str, Callable[[Case], Callable | str]] = {
    "trinix": trinix.prepare_auto,
    "trinix:triton": trinix.prepare_triton,
    "eager": eager.prepare,
    "compile": compile.prepare,
    "seed_formula": seed_formula.prepare,
}
RIVALS = ("eager", "compile")  # what "the best rival" is taken from; seed_formula is reported, never the bar
