"""What a failed request means: whether another try may help, and what a user can do about it."""

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipeline.errors import StorageError, StorageUnavailableError
from pipeline.storage.remote.schemes import Scheme, scheme_of

_TRIES = 8
"""How often a request is sent to a server that answers, but not well: 25 s of waiting in all."""
_TRIES_TO_CONNECT = 4
"""How often a connection is tried that does not come about; a wrong address should be known soon."""

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# By name, so that nobody has to import the packages of schemes that are not in use.
_CONNECTION_ERRORS = frozenset(
    {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ClientConnectorError", "ConnectError"}
)
_CUT_ERRORS = frozenset(
    (
        *("HTTPClientError", "ResponseParserError", "FlexibleChecksumError", "IncompleteRead"),  # botocore, urllib3
        *("ClientConnectionError", "ClientPayloadError", "TransportError"),  # aiohttp, httpx
        *("ConnectionError", "TimeoutError", "FSTimeoutError"),
    )
)


def tries_for(error: BaseException, location: str) -> int:
    """Give how often in all a request is sent that fails like this."""
    if scheme_of(location).repeats:
        return 1
    if _is_a(error, _CONNECTION_ERRORS):
        return _TRIES_TO_CONNECT
    status = status_of(error)
    if status in _RETRIED_STATUS or code_of(error) in ("SlowDown", "InternalError", "RequestTimeout"):
        return _TRIES
    return _TRIES if status is None and _is_a(error, _CUT_ERRORS) else 1


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__ or error


def _is_a(error: BaseException, names: frozenset[str]) -> bool:
    return any(kind.__name__ in names for one in _chain(error) for kind in type(one).__mro__)


def status_of(error: BaseException) -> int | None:
    """Find the HTTP status that an error of any of the packages goes back to."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        found = (
            response.get("ResponseMetadata", {}).get("HTTPStatusCode")  # botocore
            if isinstance(response, dict)
            else getattr(response, "status_code", None)  # httpx
        )
        if type(one).__name__ == "ClientResponseError":  # aiohttp; its other errors have numbers that are no answers
            found = getattr(one, "status", None)
        if type(one).__name__ == "HttpError":  # gcsfs
            found = getattr(one, "code", None)
        if found is not None and str(found).isdigit():
            return int(found)
    return None


def code_of(error: BaseException) -> str:
    """Find the error code that S3 gave; empty where there is none."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def in_words(error: BaseException) -> str:
    """Give the first line of what an error says."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def explain(error: BaseException, location: str) -> Exception:
    """Say what went wrong and how to mend it; a file that is not there stays a FileNotFoundError."""
    scheme = scheme_of(location)
    status, code, words = status_of(error), code_of(error), in_words(error)
    if code == "NoSuchBucket":
        bucket = urlsplit(location).netloc
        return StorageError(
            f"{location}: there is no bucket {bucket!r} at {_server(scheme)}. Make it, or correct the name"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(location)
    if _is_a(
        error,
        frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}),
    ):
        return StorageError(f"{location}: no credentials ({words}). Give them by {scheme.credentials}")
    if status in (401, 403) or isinstance(error, PermissionError):
        return StorageError(
            f"{location}: permission denied ({code or status or words}). Credentials come from {scheme.credentials}"
        )
    if _is_a(error, _CONNECTION_ERRORS):
        return StorageUnavailableError(
            f"{location}: can't connect to {_server(scheme, location)} ({words}). Check the network, and "
            f"{scheme.endpoint}"
        )
    if status in _RETRIED_STATUS or _is_a(error, _CUT_ERRORS):
        server, tries = _server(scheme, location), tries_for(error, location)
        what = f"answers {status}" if status else "cuts the connection or does not answer"
        return StorageUnavailableError(
            f"{location}: {server} {what} ({words}), {tries} times in a row. Run the same command again later"
        )
    return StorageError(f"{location}: {words}")


def _server(scheme: Scheme, location: str = "") -> str:
    if scheme.name == "http":
        return urlsplit(location).netloc
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if scheme.name == "s3" else (scheme.endpoint,)
    return next((os.environ[name] for name in names if os.environ.get(name)), f"the {scheme.name}:// service")
