"""What a failed request means, and what a user can do about it."""

import errno
import os
import re
from urllib.parse import urlsplit

from pipeline.errors import StorageError, StorageUnavailableError
from pipeline.storage.remote.schemes import Scheme, scheme_of, split_bucket

# obstore's errors have kinds for a few answers; the rest is in their text: what happened, and the same for debugging.
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]+)")
_TRANSPORT = re.compile(r"HttpError \{\s*kind: (\w+)")
_CAUSE = re.compile(r'(?:message|error): "([^"\\]+)"')
_RETRIES = re.compile(r"after (\d+) retries")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_MACHINE = re.compile(r"://[^/\s]+/(latest/(api/token|meta-data)|computeMetadata/|metadata/identity/)")
"""Where a machine is asked for the credentials of its role; if it has none, there are none."""


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status that an error goes back to."""
    if found := _STATUS.search(str(error)):
        return int(found[1])
    return getattr(getattr(error, "response", None), "status_code", None)  # of huggingface_hub


def explain(error: BaseException, location: str) -> Exception:
    """Returns an error that says what went wrong and how to mend it; FileNotFoundError for a file that is not there."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return error  # on this machine's disk, which its own words are for
    scheme, status, words = scheme_of(location), status_of(error), in_words(error)
    text, code = str(error), _found(_CODE, str(error))
    transport = _found(_TRANSPORT, text) or _transport_of(error)
    if code in _NO_BUCKET:
        bucket = split_bucket(location)[0].partition("@")[0]
        return StorageError(
            f"{location}: there is no bucket {bucket!r} at {_server(scheme, location)}. Make it, or correct the name"
        )
    if _MACHINE.search(text):
        return StorageError(f"{location}: no credentials ({words}). Give them by {scheme.credentials}")
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(location)
    if status in (401, 403) or isinstance(error, PermissionError):
        return StorageError(
            f"{location}: permission denied ({code or status or words}). Credentials come from {scheme.credentials}"
        )
    if transport == "Connect":
        return StorageUnavailableError(
            f"{location}: can't connect to {_server(scheme, location)} ({words}). Check the network"
            f"{', and '.join(['', *scheme.servers[-1:]])}"
        )
    if transport or status in (408, 425, 429) or (status or 0) >= 500:
        tries = int(_found(_RETRIES, text) or 0) + 1
        what = f"answers {status}" if status else "cuts the connection or does not answer"
        return StorageUnavailableError(
            f"{location}: {_server(scheme, location)} {what} ({words})"
            f"{f', {tries} times in a row' if tries > 1 else ''}. Run the same command again later"
        )
    if "non-partial response" in text or "Range request not supported" in text:
        return StorageError(
            f"{location}: the server ignores byte ranges or does not say that it knows them (status 206). Use one that "
            "does (nginx, Apache, Caddy, any object store), or copy the folder here"
        )
    if "redirect without LOCATION" in text:
        return StorageError(f"{location}: the bucket lies in another region. Name it by AWS_DEFAULT_REGION")
    return StorageError(f"{location}: {words}")


def in_words(error: BaseException) -> str:
    """Returns what an error says, without what is only for debugging, in one line."""
    text = str(error)
    if code := _found(_CODE, text):
        return f"{code}: {message.strip()}" if (message := _found(_MESSAGE, text)) else code
    if _TRANSPORT.search(text) and (causes := _CAUSE.findall(text)):
        return causes[-1]
    first = (text.strip() or type(error).__name__).splitlines()[0]
    return first.rpartition(" - ")[2].strip(": ")[:300]


def _found(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _transport_of(error: BaseException) -> str:
    """Returns obstore's word for what failed below HTTP, from the names of other packages' errors."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ConnectError", "ConnectTimeout"}:  # httpx
        return "Connect"
    return "Interrupted" if names & {"TransportError", "ConnectionError", "TimeoutError"} else ""


def _server(scheme: Scheme, location: str) -> str:
    if scheme.name == "http":
        return urlsplit(location).netloc
    named = [os.environ[name] for name in scheme.servers if os.environ.get(name)]
    return named[0] if named else f"the {scheme.name}:// service"
