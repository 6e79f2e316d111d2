"""How the kernels of rows in clusters read and write a program's piece of a row: VECTORS of 16 bytes a thread, SPAN elements apart.

The first FULL lie within every program's piece; of the others a mask says what does.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def load(x, u, at, end, other, FULL: gl.constexpr, SPAN: gl.constexpr):
    """The u-th vector; ``other`` behind the piece's end."""
    if u < FULL:
        vector = gl.load(x + u * SPAN + at)
    else:
        vector = gl.load(x + u * SPAN + at, mask=at + u * SPAN < end, other=other)
    return vector


@gluon.jit
def load_all(x, at, end, other, VECTORS: gl.constexpr, FULL: gl.constexpr, SPAN: gl.constexpr):
    vectors = ()
    for u in gl.static_range(VECTORS):
        vectors = vectors + (load(x, u, at, end, other, FULL, SPAN),)  # noqa: RUF005 - what Triton knows of tuples
    return vectors


@gluon.jit
def store(y, u, at, end, value, FULL: gl.constexpr, SPAN: gl.constexpr):
    value = value.to(y.dtype.element_ty)
    if u < FULL:
        gl.store(y + u * SPAN + at, value)
    else:
        gl.store(y + u * SPAN + at, value, mask=at + u * SPAN < end)
