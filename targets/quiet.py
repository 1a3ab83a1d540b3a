"""Keep what converters print, natively and from Python, off the screen; show its end when one of them fails."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

_TAIL = 2000


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Send file descriptors 1 and 2 to a temporary file; on an exception, add the last lines to its notes.

    Converters log from C++, through `logging`, `rich` and `print`; only the descriptors catch them all.
    """
    if verbose:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = os.dup(1), os.dup(2)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        except Exception as problem:
            sys.stdout.flush()
            sys.stderr.flush()
            size = os.fstat(sink.fileno()).st_size
            problem.add_note(os.pread(sink.fileno(), _TAIL, max(0, size - _TAIL)).decode(errors="replace"))
            raise
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
