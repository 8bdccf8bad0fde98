"""Small objects that only one of several writers can put: a put that depends on what is there."""

import logging
from typing import Any

from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

from pipeline.storage.remote.calls import call
from pipeline.storage.remote.failures import status_of
from pipeline.storage.remote.schemes import scheme_of

Version = dict[str, str]
"""What changes with an object's content: its ETag, and on some services a number."""

_log = logging.getLogger(__name__)


def are_known(location: str) -> bool:
    """Whether the service behind a URL can put an object on a condition."""
    return scheme_of(location).name in ("s3", "gs", "az")


def put_if(location: str, content: bytes, version: Version | None) -> bool:
    """Put an object where nothing has changed; False where something has.

    Args:
        location: a URL.
        content: of the object.
        version: what has to be there, as `read` gave it; None is nothing.

    Raises:
        StorageError: the server refuses or fails.
    """

    def put(store: Any, path: str) -> bool:
        try:
            store.put(path, content, mode="create" if version is None else version, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except Exception as error:
            if not isinstance(error, NotSupportedError) and status_of(error) != 501:
                raise
            _log.warning("%s: the server knows no conditions, so that two writers may meet there", location)
            store.put(path, content, use_multipart=False)
        return True

    return call(location, put)


def read(location: str) -> tuple[bytes, Version | None]:
    """Returns an object's content and its version; nothing and None where there is none.

    Raises:
        StorageError: the server refuses or fails.
    """

    def get(store: Any, path: str) -> tuple[bytes, Version]:
        found = store.get(path)
        return bytes(found.bytes()), {name: found.meta[name] for name in ("e_tag", "version") if found.meta.get(name)}

    try:
        return call(location, get)
    except FileNotFoundError:
        return b"", None
