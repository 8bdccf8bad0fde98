"""Stores: what a bucket or a server is asked through, made once in a process with what its environment says."""

import base64
import netrc
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from pipeline.errors import PipelineError, StorageError, UsageError
from pipeline.storage.remote.failures import in_words
from pipeline.storage.remote.schemes import Scheme, scheme_of, split_bucket, split_web

_TRIES, _LAST_TRY = 8, timedelta(minutes=6)
"""How often a request is sent, in all, to a server that fails or does not answer, and how late at most."""
_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=0.2), timedelta(seconds=15)
"""Between two tries; each pause is drawn between the first one and twice the one before."""
_CONNECT, _SILENCE, _REQUEST = timedelta(seconds=10), timedelta(minutes=2), timedelta(minutes=10)
"""A try ends when no connection comes about, when nothing is heard for so long (also while a part of a file is sent),
and at the latest after so long."""
_AWS_KEYS_LIVE = timedelta(minutes=5)
"""botocore, which renews keys that end soon, is asked for them again after this."""

_stores: dict[tuple[object, ...], Any] = {}
_making = threading.Lock()


def open_store(location: str) -> tuple[Any, str]:
    """Returns the store behind a URL, obstore's or a `FsspecStore`, and the path by which it knows the file.

    Raises:
        UsageError: the scheme is unknown, a package is missing, the URL holds credentials, or a server's URL is none.
        StorageError: there are no credentials, or a setting in the environment is wrong.
    """
    scheme = scheme_of(location)
    make, split = _MAKERS.get(scheme.name, (_make_other, lambda location: (scheme.name, location)))
    place, path = split(location)
    key = (scheme.name, place, *sorted(item for item in os.environ.items() if item[0].startswith(scheme.variables)))
    with _making:
        if key not in _stores:
            try:
                _stores[key] = _make(scheme, location, make, place)
            except ImportError as error:
                raise UsageError(f"{location}: needs a package ({error}). Install it: {scheme.package}") from error
            except PipelineError:
                raise
            except Exception as error:
                remedy = f"Give credentials by {scheme.credentials}"
                raise StorageError(f"{location}: {in_words(error)}. {remedy}") from error
        return _stores[key], path


def _make(scheme: Scheme, location: str, make: Callable[..., Any], place: str) -> Any:
    if "@" in place and scheme.name in ("s3", "gs"):
        raise UsageError(f"{location}: credentials don't belong into a URL. Give them by {scheme.credentials}")
    for name in scheme.servers if scheme.name in ("s3", "az") else ():
        if not os.environ.get(name, "http").startswith("http"):
            raise UsageError(f"{name} is {os.environ[name]!r}: begin it with http:// or https://")
    waits = {"connect_timeout": _CONNECT, "read_timeout": _SILENCE, "timeout": _REQUEST}
    pauses = {"init_backoff": _FIRST_PAUSE, "max_backoff": _LONGEST_PAUSE, "base": 2}
    bundle = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    trusted = {"root_certificate": Path(bundle).read_bytes()} if bundle else {}
    return make(
        place,
        client_options={"allow_http": True, **waits, **trusted},
        retry_config={"max_retries": _TRIES - 1, "retry_timeout": _LAST_TRY, "backoff": pauses},
    )


def _make_s3(bucket: str, **limits: Any) -> S3Store:
    if any(os.environ.get(name, "").lower() in ("1", "true") for name in ("AWS_SKIP_SIGNATURE", "FSSPEC_S3_ANON")):
        return S3Store(bucket, config={"skip_signature": True}, **limits)
    files = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
    there = any(Path(os.environ.get(name, usual)).expanduser().exists() for name, usual in files.items())
    needed = "AWS_ACCESS_KEY_ID" not in os.environ or find_spec("botocore")
    by_files = _read_aws_files() if needed and (there or "AWS_PROFILE" in os.environ) else {}
    return S3Store(bucket, **by_files, **limits)


def _read_aws_files() -> dict[str, Any]:
    """Returns what ~/.aws says, as botocore reads it: profiles, roles, single sign-on, regions, endpoints."""
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import NoCredentialsError
    from botocore.session import Session

    session = Session()
    endpoint = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3").provide()
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
    credentials = session.get_credentials()
    if credentials is None:
        raise NoCredentialsError

    def provide() -> dict[str, Any]:
        keys = credentials.get_frozen_credentials()
        named = {"access_key_id": keys.access_key, "secret_access_key": keys.secret_key, "token": keys.token}
        return {**named, "expires_at": datetime.now(UTC) + _AWS_KEYS_LIVE}

    config = {name: value for name, value in (("endpoint", endpoint), ("region", region)) if value}
    return {"config": config, "credential_provider": provide}


def _make_gs(bucket: str, **limits: Any) -> GCSStore:
    server = os.environ.get("STORAGE_EMULATOR_HOST", "default")
    url = server if "://" in server else f"http://{server}"
    config: Any = {} if server == "default" else {"base_url": url, "bearer_token": "of an emulator"}
    return GCSStore(bucket, config=config, **limits)


def _make_az(place: str, **limits: Any) -> AzureStore:
    container, _, host = place.partition("@")  # abfss://container@account.dfs.core.windows.net/…
    config: Any = {"account_name": host.partition(".")[0]} if host else {}
    return AzureStore(container, config=config, **limits)


def _make_web(folder: str, **limits: Any) -> HTTPStore:
    parts, file = urlsplit(folder), Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    user, password = parts.username, parts.password
    if user is None and file.exists() and (known := netrc.netrc(file).authenticators(parts.hostname or "")):
        user, _, password = known
    named = base64.b64encode(f"{unquote(user or '')}:{unquote(password or '')}".encode()).decode()
    headers = {} if user is None else {"Authorization": f"Basic {named}"}
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    # A server that knows no byte ranges sends a file of any size in one answer; silence ends it all the same.
    limits["client_options"] |= {"default_headers": headers, "timeout": timedelta(days=1)}
    return HTTPStore.from_url(plain, **limits)


def _make_other(scheme: str, **limits: Any) -> Any:
    from pipeline.storage.remote.fsspec_store import FsspecStore  # and fsspec, which local files can do without

    return FsspecStore(scheme, **limits)


_MAKERS: dict[str, tuple[Callable[..., Any], Callable[[str], tuple[str, str]]]] = {
    "s3": (_make_s3, split_bucket),
    "gs": (_make_gs, split_bucket),
    "az": (_make_az, split_bucket),
    "http": (_make_web, split_web),
}
