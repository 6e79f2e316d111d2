"""Launches before the kernel in front has ended.

The wait returns when that kernel has ended and what it wrote can be read; it had waited for its own, and so on, so all work
before is done. It holds back the threads that call it. The next kernel may come in once a thread of every program has let it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def let_next_kernel_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_kernel_before():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
