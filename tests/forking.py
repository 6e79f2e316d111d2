"""A Python with PyTorch and Triton, imported without the interpreter, that runs code in forks of itself.

``conftest.forked_process`` starts it and asks it for one piece of code a line: importing both takes three seconds.
"""

import json
import os
import signal
import sys
import traceback

import torch  # noqa: F401
import triton  # noqa: F401
from triton.runtime.cache import triton_key

TIMEOUT = 600

triton_key()  # reads all of Triton's files, once a process
for line in sys.stdin:
    code, out, err = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(TIMEOUT)
        for file, stream in ((out, 1), (err, 2)):
            os.dup2(os.open(file, os.O_WRONLY), stream)
        status = 1
        try:
            exec(compile(code, "<a test's code>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
