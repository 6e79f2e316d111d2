"""What a kernel module tells the ahead-of-time compiler: one ``CompileCase`` for every binary that it launches."""

from collections.abc import Sequence
from typing import NamedTuple

import triton

from trinix.kernels.triton._launch import Launch


class CompileCase(NamedTuple):
    """One binary that the library launches, as ``trinix.lab.aot`` compiles it without a GPU."""

    name: str  # op/variant/pass/dtype
    kernel: triton.JITFunction
    signature: dict  # every parameter and its Triton type
    constexprs: dict
    options: dict
    aligned: tuple  # parameters divisible by 16
    access_bits: int  # what the widest load and the widest store have to reach
    bytes_per_element: float


def compile_case(
    name: str,
    launch: Launch,
    bytes_per_element: float,
    tensors: Sequence[str],
    integers: Sequence[int] = (),
    access_bits: int = 128,
) -> CompileCase:
    """The case of a bound launch: Triton types of its tensors ("*bf16"), values of its leading integers (others are runtime).

    The specialisation is Triton's: pointers are aligned, an integer 1 is a constant, multiples of 16 are marked.
    """
    signature, constexprs, aligned = {}, dict(launch.constants), []
    values = iter((*tensors, *integers))
    for p in launch.kernel.params:
        value = next(values, None)
        if value == 1:
            constexprs[p.name] = 1
        elif isinstance(value, str) or (value is not None and value % 16 == 0):
            aligned.append(p.name)
        pointer = value if isinstance(value, str) else None
        signature[p.name] = "constexpr" if p.name in constexprs else pointer or p.annotation_type or "i32"
    return CompileCase(
        name, launch.kernel, signature, constexprs, launch.options, tuple(aligned), access_bits, bytes_per_element
    )


POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
