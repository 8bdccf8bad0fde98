"""What a user installs: the wheel's contents, the lock, the licence, and the size of a clone."""

import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from email.parser import Parser
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _pins() -> list[tuple[str, str]]:
    """Read the lock: (`name==version ; marker`, its hash options)."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    return [(pin, hashes) for line in text.splitlines() for pin, _, hashes in [line.partition(" --hash=")]]


def test_wheel_holds_the_packages_the_class_list_and_the_recipes(wheel: zipfile.ZipFile) -> None:
    recipes = {f"manifests/recipes/{path.name}" for path in (ROOT / "manifests/recipes").glob("*.toml")}
    expected = {"pipeline/cli.py", "teacher/__init__.py", "student/__init__.py", "manifests/audioset_classes.csv"}
    tables = {f"manifests/models/{stage}s.jsonl" for stage in ("student", "teacher")}
    assert expected | recipes | tables <= set(wheel.namelist())


def test_wheel_leaves_out_the_sample_the_tests_and_the_caches(wheel: zipfile.ZipFile) -> None:
    unwanted = re.compile(r"^(manifests/sample|tests|benchmarks|docs)/|__pycache__")
    assert not [name for name in wheel.namelist() if unwanted.search(name)]


def test_wheel_states_its_licence_its_version_and_its_command(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == PROJECT["version"]
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "pipeline = pipeline.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_licence_is_the_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert re.match(r"\s+Apache License\s+Version 2.0, January 2004\s+http://www.apache.org/licenses/\s", text)
    assert all(f"   {number}. " in text for number in range(1, 10))
    assert text.rstrip().endswith("limitations under the License.")


def test_installed_command_is_the_projects() -> None:
    assert version("audioset-distill") == PROJECT["version"]
    (command,) = entry_points(group="console_scripts", name="pipeline")
    assert command.value == "pipeline.cli:main"


def test_changelog_has_the_version() -> None:
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_lock_pins_each_package_with_hashes() -> None:
    assert _pins()
    for pin, hashes in _pins():
        assert re.match(r"[a-z0-9-]+(\[[a-z,]+\])?==\S+", pin), pin
        assert re.fullmatch(r"sha256:[0-9a-f]{64}(\s+--hash=sha256:[0-9a-f]{64})*\s*", hashes), pin


def test_lock_names_no_index_and_no_path() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^\s*-[^-]|^--|file:|\s@\s|^[./]", text, re.MULTILINE)


def test_lock_holds_every_dependency_that_the_project_declares() -> None:
    locked = {Requirement(pin).name: Requirement(pin) for pin, _ in _pins()}
    for requirement in _declared():
        pinned = locked[canonicalize_name(requirement.name)]
        (exact,) = pinned.specifier
        assert exact.version in requirement.specifier, f"{requirement} against {pinned}"


def _declared() -> list[Requirement]:
    groups = [
        PROJECT["dependencies"],
        *PROJECT["optional-dependencies"].values(),
        PYPROJECT["dependency-groups"]["dev"],
    ]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize(
    ("platform", "machine"),
    [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64"), ("win32", "AMD64")],
)
def test_lock_has_one_version_of_each_dependency_for_every_python_and_platform(
    python: str, platform: str, machine: str
) -> None:
    assert python in SpecifierSet(PROJECT["requires-python"])
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform],
        "os_name": "nt" if platform == "win32" else "posix",
    }

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(environment)

    names = Counter(pin.name for pin in map(Requirement, (pin for pin, _ in _pins())) if applies(pin))
    assert set(names.values()) == {1}
    assert {canonicalize_name(one.name) for one in _declared() if applies(one)} <= names.keys()


def test_no_tracked_file_is_too_large_for_a_quick_clone() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: an archive has no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert not [path for path in paths if path.is_file() and path.stat().st_size > MAX_BYTES]
