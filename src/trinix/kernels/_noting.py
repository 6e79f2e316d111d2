"""Who notes a thread's launches (``triton/_record.py``): all that launches looks here."""

import contextlib
import threading

recorders = {}  # thread -> recorder; while there is any, launches of kept binaries take Triton's own path


@contextlib.contextmanager
def noted_by(recorder):
    """This thread's launches are the recorder's to note."""
    thread = threading.get_ident()
    recorders[thread] = recorder
    try:
        yield
    finally:
        del recorders[thread]


def recorder():
    """This thread's, or None."""
    return recorders.get(threading.get_ident()) if recorders else None
