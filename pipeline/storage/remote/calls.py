"""Connections through fsspec, one for each process and server, and requests that are sent again after a failure."""

import itertools
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import fsspec

from pipeline.errors import PipelineError, UsageError
from pipeline.storage.remote.failures import explain, in_words, tries_for
from pipeline.storage.remote.schemes import scheme_of

CONCURRENCY = 16
"""Requests under way at the same time, in each process."""
_FIRST_PAUSE_SECONDS = 0.2
_CONNECT_SECONDS, _READ_SECONDS = 10, 60

_log = logging.getLogger(__name__)
_chance = random.Random()  # not the global one, which belongs to whoever seeded it
Result = TypeVar("Result")

# Kept for ever, and under the process's number: a forked loader worker makes its own connections, and must not close
# those that it inherited, for that would take the parent's sockets out of the event loop that both see.
_filesystems: dict[tuple[object, ...], fsspec.AbstractFileSystem] = {}


def resolve(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Give the file system of a URL, connected once in each process, and the path that it knows the file by.

    Raises:
        UsageError: the scheme is unknown, its package is missing, or the URL holds credentials where it may not.
    """
    scheme = scheme_of(location)
    if scheme.name in ("s3", "gs") and "@" in urlsplit(location).netloc:
        raise UsageError(f"{location}: credentials don't belong into a URL. Give them by {scheme.credentials}")
    key = (os.getpid(), scheme.name, *map(os.environ.get, scheme.environment))
    if key not in _filesystems:
        try:
            _filesystems[key] = fsspec.filesystem(scheme.name, **_options(scheme.name))
        except ImportError as error:
            raise UsageError(
                f"{location}: this kind of URL needs another package ({error}). Install it: {scheme.extra}"
            ) from error
        except ValueError as error:
            raise UsageError(f"{location}: {error}. s3://, gs://, hf:// and https:// are known") from error
        except Exception as error:
            raise explain(error, location) from error
        if scheme.name == "s3":
            _filesystems[key].retries = 1  # botocore repeats a request, `call` the rest  # pyright: ignore
    filesystem = _filesystems[key]
    return filesystem, cast("str", filesystem._strip_protocol(location))


def _options(scheme: str) -> dict[str, Any]:
    # A listing that is kept would not show what other processes publish.
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        config = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "max_pool_connections": CONCURRENCY,
            "retries": {"mode": "standard", "total_max_attempts": 2},
        }
        if "AWS_RESPONSE_CHECKSUM_VALIDATION" not in os.environ:
            # Servers other than Amazon's send the whole object's checksum with a range of it. Clips have their own.
            config["response_checksum_validation"] = "when_required"
        return {**fresh, "config_kwargs": config, "max_concurrency": CONCURRENCY // 2}
    if scheme == "http":
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        # URLs are taken as they are: spelling `%2F` anew breaks signatures. `trust_env` reads ~/.netrc and proxies.
        return {**fresh, "client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}
    if scheme == "gs":
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of what it raises all the same
    return {} if scheme == "memory" else fresh


def call(location: str, action: Callable[[fsspec.AbstractFileSystem, str], Result]) -> Result:
    """Do something with a file, again where the server or the network fails for the moment.

    Args:
        location: the URL.
        action: given the file system and the path; may be called several times.

    Raises:
        FileNotFoundError: nothing is there.
        StorageUnavailableError: the server can't be reached, or keeps failing.
        StorageError: it refuses, for instance for want of credentials.
    """
    filesystem, path = resolve(location)
    for attempt in itertools.count(1):
        try:
            return action(filesystem, path)
        except PipelineError:
            raise
        except Exception as error:
            if attempt >= tries_for(error, location):
                raise explain(error, location) from error
            pause(error, attempt, location)
    raise AssertionError("counting never ends")


def pause(error: BaseException, attempt: int, location: str) -> None:
    """Wait before the next try, each time twice as long."""
    tries = tries_for(error, location)
    # Up to half of it by chance, so that processes that failed together don't come back together.
    seconds = _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * (1 - _chance.random() / 2)
    level = logging.DEBUG if attempt < 3 else logging.WARNING
    _log.log(level, "%s: %s; try %d of %d in %.1f s", location, in_words(error), attempt + 1, tries, seconds)
    time.sleep(seconds)
