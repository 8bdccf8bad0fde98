"""Servers that are away for a while: whoever has time waits for them."""

import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import StorageUnavailableError

Result = TypeVar("Result")
_PAUSE_SECONDS = 2.0


def outlast(
    action: Callable[[], Result], patience: float, tell: Callable[[StorageUnavailableError], object] = lambda _: None
) -> Result:
    """Do something, again and again while a server is away.

    Args:
        action: what; whatever else it raises than that a server is away ends it.
        patience: how long a server may be away, in seconds, counted from the first failure.
        tell: told of each failure that is waited out.

    Raises:
        StorageUnavailableError: it was away for longer.
    """
    away_since: float | None = None
    while True:
        try:
            return action()
        except StorageUnavailableError as error:
            now = time.monotonic()
            away_since = now if away_since is None else away_since
            if now - away_since + _PAUSE_SECONDS > patience:
                raise
            tell(error)
        time.sleep(_PAUSE_SECONDS)
