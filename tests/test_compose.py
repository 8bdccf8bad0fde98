"""The compose files and the Dockerfile keep the rules that an operator relies on; no engine is needed to check them."""

import re
from pathlib import Path, PurePosixPath

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SECRETS = ("S3_ACCESS_KEY", "S3_SECRET_KEY", "RAY_AUTH_TOKEN")


def _services(name: str) -> dict[str, dict]:
    return yaml.safe_load((ROOT / name).read_text())["services"]


SERVICES = _services("docker-compose.yml")
GPU_SERVICES = _services("manifests/clusters/compose.gpu.yaml")


def _instructions() -> list[tuple[str, str]]:
    """Read the Dockerfile: (instruction, rest), continuation lines joined and comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(first, rest) for line in joined.splitlines() if line for first, _, rest in [line.partition(" ")]]


def _stages() -> dict[str, list[tuple[str, str]]]:
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in _instructions():
        if instruction == "FROM":
            stages[rest.rpartition(" AS ")[2]] = []
        list(stages.values())[-1].append((instruction, rest))
    return stages


def _build_context_sources() -> list[str]:
    copies = [rest.split() for instruction, rest in _instructions() if instruction == "COPY" and "--from=" not in rest]
    return [source for words in copies for source in words[:-1]]


def test_both_stages_a_cluster_and_an_object_store_are_there() -> None:
    assert set(SERVICES) >= {"head", "worker", "teacher-logits", "student", "object-store"}


def test_workers_can_be_scaled() -> None:
    # A fixed name or a published port would clash with the second worker.
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["worker"])


@pytest.mark.parametrize("name", [name for name in SERVICES if "ports" in SERVICES[name]])
def test_ports_are_published_on_loopback_alone(name: str) -> None:
    assert all(str(port).startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


@pytest.mark.parametrize("services", [SERVICES, GPU_SERVICES], ids=["compose", "gpu"])
def test_no_service_asks_for_rights_over_the_host(services: dict[str, dict]) -> None:
    forbidden = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"}
    assert not any(forbidden & set(service) for service in services.values())


@pytest.mark.parametrize("name", SERVICES)
def test_services_run_without_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", [name for name in SERVICES if "profiles" not in SERVICES[name]])
def test_services_that_stay_up_have_a_health_check_and_come_back(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_have_no_default_and_must_be_set(secret: str) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    uses = re.findall(rf"\$\{{?{secret}[^}}]*\}}?", text)
    assert uses
    assert all(use.startswith(f"${{{secret}:?") for use in uses)


def test_whatever_is_named_like_a_secret_comes_from_the_required_variables() -> None:
    for name, service in SERVICES.items():
        for variable, value in service["environment"].items():
            if re.search(r"KEY|TOKEN|SECRET|PASSWORD", variable) and not variable.startswith("VGW_KEEP"):
                assert re.match(rf"\$\{{({'|'.join(SECRETS)}):\?", value), f"{name}: {variable}"


def test_example_environment_names_each_secret_without_a_value() -> None:
    example = (ROOT / ".env.example").read_text().splitlines()
    assert [line for line in example if line and not line.startswith("#")] == [f"{secret}=" for secret in SECRETS]


def test_the_file_of_secrets_is_ignored_by_git() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_every_variable_is_explained_in_the_example_environment() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    example = (ROOT / ".env.example").read_text()
    for variable, default in re.findall(r"\$\{(\w+):-([^}]*)\}", text):
        assert f"# {variable}={default}\n" in example


def test_images_are_pinned_to_a_version() -> None:
    bases = [rest.split(" AS ")[0] for instruction, rest in _instructions() if instruction == "FROM"]
    ours = [service["image"] for service in SERVICES.values()]
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in bases + ours)


def test_services_are_built_from_stages_of_the_dockerfile() -> None:
    assert {service["build"]["target"] for service in SERVICES.values()} <= set(_stages())


def test_everything_on_ray_is_one_image() -> None:
    on_ray = ("head", "worker", "teacher-logits", "student")
    assert len({SERVICES[name]["image"] for name in on_ray}) == 1


def test_what_the_image_copies_exists_and_enters_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in _build_context_sources():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


def test_nothing_but_what_the_image_copies_enters_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(_build_context_sources())


@pytest.mark.parametrize("stage", ["pipeline", "object-store"])
def test_images_do_not_run_as_root(stage: str) -> None:
    users = [rest for instruction, rest in _stages()[stage] if instruction == "USER"]
    assert users == ["10001:10001"]


def test_no_secret_enters_an_image_layer() -> None:
    told = [rest for instruction, rest in _instructions() if instruction in {"ARG", "ENV"}]
    assert not any(re.search(r"KEY|TOKEN|SECRET|PASSWORD", text) for text in told)


def test_the_image_installs_with_hashes_from_the_lock() -> None:
    installs = re.findall(r"(?:pip install|uv build) ([^&]*)", "\n".join(rest for _, rest in _stages()["build"]))
    from_outside = [words for words in installs if "/wheel/" not in words]
    assert from_outside
    assert all("--require-hashes" in words for words in from_outside)


def test_volumes_of_services_are_declared_and_owned_by_the_user() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    named = [volume for service in SERVICES.values() for volume in service["volumes"] if ":" in volume]
    assert {volume.partition(":")[0] for volume in named} == set(compose["volumes"])
    # A new volume takes over the owner of the image's folder, so each mount point must be made in the Dockerfile.
    made = "\n".join(rest for _, rest in _instructions())
    assert all(str(PurePosixPath(volume.partition(":")[2])) in made for volume in named)


def test_gpus_are_for_services_that_exist() -> None:
    assert set(GPU_SERVICES) <= set(SERVICES)
    for service in GPU_SERVICES.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
