"""Large packages, imported in less time: torch alone makes 240,000 objects, which Python searches for garbage."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import what stays to the end of the process: nobody looks for garbage in it, now or later.

    A search goes through all objects there are, several times while torch is imported, more often behind that, and once
    more when the process ends: together a fifth of the time that `pipeline tag` takes for one sound. Only new modules
    are taken out of it, and with them what else is there at that moment, so that the block should hold imports alone.
    """
    searches, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if searches:
            gc.enable()
