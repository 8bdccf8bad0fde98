"""Settings that were called otherwise, or that there were none of: what was made with the old ones is still read."""

import logging
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "decode_threads": "decode_workers",
    "optimizer.most_gradient_norm": "optimizer.max_gradient_norm",
    "view.most_gain_db": "view.max_gain_db",
    "view.most_shift_ms": "view.max_shift_ms",
}
"""Old name → present name; both in the same table."""

ADDED = {
    "consistent_views": True,
    "deterministic": False,
    "distill.teacher_weight": 0.9,
    "distill.temperature": 1.0,
    "distill.without_logits": "full",
    "label_share": 1.0,
}
"""Settings that earlier versions did not have → what they did, so that a run of theirs goes on."""

_log = logging.getLogger(__name__)


def present_flag(token: str) -> str:
    """Returns a token of a command line with a renamed flag under its present name, and logs that."""
    flag, equals, value = token.partition("=")
    now = RENAMED.get(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else None
    if now is None:
        return token
    now = f"--{now.replace('_', '-')}"
    _log.warning("%s is called %s now", flag, now)
    return f"{now}{equals}{value}"


def present_settings(settings: Mapping[str, Any], source: str, table: str = "") -> dict[str, Any]:
    """Returns a recipe with renamed keys under their present names, and logs that.

    Args:
        settings: the keys, nested tables as mappings.
        source: names the recipe.
        table: the dotted name of the table that `settings` is, with a dot behind it.
    """
    present: dict[str, Any] = {}
    for key, value in settings.items():
        now = RENAMED.get(f"{table}{key}".replace("-", "_"))
        if now is not None:
            _log.warning("%s: %s%s is called %s now", source, table, key, now)
        name = key if now is None else now.rpartition(".")[2]
        present[name] = present_settings(value, source, f"{table}{key}.") if isinstance(value, Mapping) else value
    return present
