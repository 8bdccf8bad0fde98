"""Where credentials and servers come from: the environment and the files that other programs of a scheme read, too."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from azure_blobs import ACCOUNT, CONTAINER, blob_server
from object_servers import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, s3_server

from pipeline.errors import PipelineError, StorageError
from pipeline.storage import files as storage
from pipeline.storage.remote import stores


@pytest.fixture(autouse=True)
def _nothing_set(s3_folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stores, "_FIRST_PAUSE", timedelta(milliseconds=10))
    monkeypatch.setattr(stores, "_stores", {})
    storage.publish_bytes(f"s3://{BUCKET}/hello", b"hello")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def aws(s3: S3Server, tmp_path: Path) -> Path:
    """A home with ~/.aws, in which the profile `work` opens the S3 server, which holds `hello`."""
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    told = json.dumps({"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY})
    (tmp_path / "told").write_text(told)
    place = f"region = eu-west-9\nendpoint_url = {s3.endpoint}\n"
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(f"[work]\n{keys}")
    asked = f"credential_process = cat {tmp_path}/told\n"
    (tmp_path / ".aws/config").write_text(
        f"[profile work]\n{place}[profile asked]\n{place}{asked}[profile empty]\n{place}"
    )
    return tmp_path / ".aws"


@pytest.mark.parametrize("profile", ["work", "asked"])
def test_a_profile_gives_keys_region_and_server(aws: Path, monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    monkeypatch.setenv("AWS_PROFILE", profile)
    assert storage.read_bytes(f"s3://{BUCKET}/hello") == b"hello"


def test_the_environment_is_stronger_than_a_profile(aws: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"can't connect to http://127\.0\.0\.1:9"):
        storage.read_bytes(f"s3://{BUCKET}/hello")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "with-another-secret")
    with pytest.raises(StorageError, match="permission denied"):
        storage.read_bytes(f"s3://{BUCKET}/hello")


def test_a_profile_that_gives_no_keys_is_one_line(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for profile, said in (
        ("nobody", r"profile \(nobody\) could not be found"),
        ("empty", "Unable to locate credentials"),
    ):
        monkeypatch.setenv("AWS_PROFILE", profile)
        with pytest.raises(
            StorageError, match=rf"s3://{BUCKET}/hello: .*{said}.* Give credentials by AWS_ACCESS_KEY_ID"
        ):
            storage.read_bytes(f"s3://{BUCKET}/hello")
    (aws / "config").write_text("[profile empty")
    with pytest.raises(StorageError, match=r"Unable to parse config file: .*/\.aws/config"):
        storage.read_bytes(f"s3://{BUCKET}/hello")


def test_keys_in_the_environment_need_no_other_package(
    aws: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "botocore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert storage.read_bytes(f"s3://{BUCKET}/hello") == b"hello"
    assert "botocore" not in sys.modules


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("public") / "objects", anyone=True) as server:
        (server.folder / BUCKET / "hello").write_bytes(b"hello")
        yield server


@pytest.mark.parametrize("variable", ["AWS_SKIP_SIGNATURE", "FSSPEC_S3_ANON"])
def test_a_public_bucket_is_read_without_keys(
    public: S3Server, aws: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", public.endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="credentials"):
        storage.read_bytes(f"s3://{BUCKET}/hello")
    monkeypatch.setenv(variable, "true")
    assert storage.read_bytes(f"s3://{BUCKET}/hello") == b"hello"


def test_a_bucket_in_another_region_is_told_with_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon redirects without saying where to."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def redirect() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 301 Moved Permanently\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=redirect)
        thread.start()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "of-anybody")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"another region\. Name it by AWS_DEFAULT_REGION"):
            storage.read_bytes(f"s3://{BUCKET}/hello")
        thread.join()


def test_a_wrong_key_of_azure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "AAAA")
    with blob_server() as url:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)
        for action in (storage.read_bytes, storage.exists, storage.list_files):
            with pytest.raises(StorageError, match=r"denied \(AuthenticationFailed\).*ACCOUNT_KEY"):
                action(f"az://{CONTAINER}/hello")


@pytest.mark.parametrize(
    ("location", "variables", "said"),
    [
        ("az://c/x", {}, "Account must be specified. Give credentials by AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://c/x", {"AZURE_STORAGE_ENDPOINT": "nonsense"}, "AZURE_STORAGE_ENDPOINT is 'nonsense'"),
        ("s3://b/x", {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:9"}, "no credentials .Connection refused"),
        ("s3://b/x", {"AWS_ACCESS_KEY_ID": "half"}, "Missing SecretAccessKey"),
        ("s3://b/x", {"AWS_CA_BUNDLE": "/absent", "AWS_ACCESS_KEY_ID": "x"}, "No such file or directory: '/absent'"),
        ("gs://b/x", {"GOOGLE_APPLICATION_CREDENTIALS": "/absent"}, "Unable to open .* /absent"),
        ("gs://b/x", {"STORAGE_EMULATOR_HOST": "127.0.0.1:9"}, "can't connect to 127.0.0.1:9 .*STORAGE_EMULATOR_HOST"),
        ("gs://key@b/x", {}, "credentials don't belong into a URL"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_one_line(
    location: str, variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=said) as caught:
        storage.read_bytes(location)
    assert "\n" not in str(caught.value)


def test_google_credentials_of_a_kind_that_obstore_lacks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key.json").write_text('{"type": "external_account"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(StorageError, match="`external_account`, expected `service_account` or `authorized_user`"):
        storage.read_bytes("gs://b/x")
