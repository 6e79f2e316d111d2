"""One file an implementation: ``prepare(case)`` gives a callable on the case's inputs, the reason why there is none for this
case, or None where the implementation has no such op (and then no line).
"""

from collections.abc import Callable

from trinix.lab.case import Case
from trinix.lab.peers import compile, cudnn, eager, fa2, fa4, flashmlp, flex, liger, quack, seed_formula, trinix

# the order of tables and of the interleaved timing
PREPARE: dict[str, Callable[[Case], Callable | str | None]] = {
    "trinix": trinix.prepare_auto,
    "trinix:hopper": trinix.prepare_hopper,
    "trinix:triton": trinix.prepare_triton,
    "eager": eager.prepare,
    "compile": compile.prepare,
    "liger": liger.prepare,
    "quack": quack.prepare,
    "flashmlp": flashmlp.prepare,
    "cudnn": cudnn.prepare,
    "fa2": fa2.prepare,
    "fa4": fa4.prepare,
    "flex": flex.prepare,
    "seed_formula": seed_formula.prepare,
}
# "the best rival" is one of these; seed_formula is reported, never the bar
RIVALS = ("eager", "compile", "liger", "quack", "flashmlp", "cudnn", "fa2", "fa4", "flex")
# other people's code: whatever it raises is a failed row, not a mistake of ours
FOREIGN = ("compile", "liger", "quack", "flashmlp", "cudnn", "fa2", "fa4", "flex")


def overwrites(impl: str, case: Case) -> bool:
    """Whether an implementation writes into its inputs or incoming gradients: it gets copies of its own."""
    return impl == "liger" and case.op in liger.OVERWRITES
