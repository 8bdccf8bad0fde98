"""The teachers that installed packages offer; listing them imports none."""

from importlib.metadata import entry_points

TEACHER_GROUP = "audioset_distill.teachers"
"""Entry-point group: name → function that builds a `Teacher`."""


def installed_teachers() -> dict[str, str]:
    """Returns what installed packages offer: name → where its builder is."""
    return {entry_point.name: entry_point.value for entry_point in entry_points(group=TEACHER_GROUP)}
