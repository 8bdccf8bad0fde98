"""Machines that work together are of one version."""

import pytest

from pipeline.errors import UsageError
from pipeline.runtime import same_code
from pipeline.runtime.same_code import check_versions, versions


def test_builds_for_other_devices_are_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_code, "version", lambda package: "2.11.0+cu130")
    there = versions()
    monkeypatch.setattr(same_code, "version", lambda package: "2.11.0+cpu")
    assert there["torch"] == "2.11.0"
    check_versions({name: there[name] for name in there if name != "audioset-distill"})


def test_all_that_differs_is_named_and_nothing_else() -> None:
    here = versions()
    theirs = {**here, "torch": "2.10.0", "timm": "none"}
    told = rf" has torch {here['torch']}, timm {here['timm']}, but the run was started by torch 2\.10\.0, timm none\. "
    with pytest.raises(UsageError, match=told):
        check_versions(theirs)
