"""Settings ↔ TOML: what a run was made with, written so that the same file, given as `--config`, makes it again."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import tomli_w

from pipeline.redaction import redact
from pipeline.runtime.renamed_settings import ADDED, RENAMED

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def to_toml(config: "DataclassInstance") -> str:
    """Returns a settings object as TOML, defaults included: its fields as keys, nested settings as tables.

    A field that is None is left out: TOML has no word for it, and None is the default of every field that may be so.
    Credentials in URLs are masked; who runs the settings again has to give them again.
    """
    return redact(tomli_w.dumps(_known(asdict(config))))


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _known(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value is not None
    }


def differences(old: str, new: str, *, free: frozenset[str]) -> list[str]:
    """Returns the settings in which two TOML texts differ, such as `batch_size: 32 → 64`.

    Args:
        old: the earlier settings.
        new: the present ones.
        free: top-level keys that may differ.
    """
    before, after = flat_settings(tomllib.loads(old)), flat_settings(tomllib.loads(new))
    before = {RENAMED.get(key, key): value for key, value in before.items()}
    before = {key: value for key, value in ADDED.items() if key in after} | before
    return [
        f"{key}: {before.get(key, 'none')} → {after.get(key, 'none')}"
        for key in sorted(before.keys() | after.keys())
        if key not in free and before.get(key) != after.get(key)
    ]


def flat_settings(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as one table: `{"optimizer": {"kind": "adam"}}` → `{"optimizer.kind": "adam"}`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read keywords for a model as a command line hands them over: `{"width-mult": "0.3"}` → `{"width_mult": 0.3}`.

    A text that is no TOML value stands for itself; values that are no texts pass unchanged.
    """
    return {key.replace("-", "_"): _read_option(value) for key, value in options.items()}


def _read_option(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_read_option(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value.lower() if value in ('True', 'False') else value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
