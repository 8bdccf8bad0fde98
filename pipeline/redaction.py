"""The one place that keeps credentials out of what is shown or written: messages, logs, tracebacks, settings.

Errors of this project pass through `redact` when they are made, log records and tracebacks when they are formatted
(after `install`), and settings when they are written. URLs stay whole in memory, where they are needed.
"""

import logging
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

MASK = "***"
"""What stands in the place of a credential."""

# In abfs://container@account the container stands where others have a user.
_USER = re.compile(r"\b(?!abfss?:)([a-z][a-z0-9+.-]*://)[^/\s\"'<>?]*@", re.IGNORECASE)
_QUERY = re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s\"'<>?]*)\?[^\s\"'<>]*", re.IGNORECASE)
# As botocore, aiohttp and friends print headers and parameters: `name: value`, `'name': 'value'`, `name=value`.
_NAMED = re.compile(
    r"((?:x-amz-(?:signature|credential|security-token)|(?:proxy-)?authorization|awsaccesskeyid|"
    r"(?:aws_)?(?:secret_access_key|session_token|access_key_id)|set-cookie|cookie)[\"']?\s*[=:]\s*b?[\"']?)"
    r"(?:(?:AWS4-HMAC-SHA256|Bearer|Basic)\s+)?[^\s\"'&,;]+(?:,\s*(?:SignedHeaders|Signature)=[^\s\"',]+)*",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|(ACCESS|API|ACCOUNT|MASTER|SAS)_KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""Characters. What is shorter, such as `true`, would be masked wherever the word occurs."""


def redact(text: str) -> str:
    """Mask credentials: users and queries in URLs, signed headers, and the values of secret environment variables."""
    for secret in _secrets_in_environment():
        text = text.replace(secret, MASK)
    text = _USER.sub(rf"\1{MASK}@", text)
    text = _QUERY.sub(rf"\1?{MASK}", text)
    return _NAMED.sub(rf"\1{MASK}", text)


def _secrets_in_environment() -> list[str]:
    secrets = (value for name, value in os.environ.items() if _SECRET_NAME.search(name))
    # The longest first: one secret may begin like another.
    return sorted((value for value in secrets if len(value) >= _SHORTEST_SECRET and value[0] != "/"), key=len)[::-1]


def redacted_traceback(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> str:
    """Format an exception with all that led to it; values of variables are never shown."""
    return redact("".join(traceback.format_exception(kind, error, trace)))


def install() -> None:
    """Redact every log record of this process, whoever makes it, and the traceback of an error that nobody catches.

    Calling it again changes nothing; processes that are forked later inherit it.
    """
    if not isinstance(logging.getLogRecordFactory(), _RedactingFactory):
        logging.setLogRecordFactory(_RedactingFactory())
    sys.excepthook = _print_redacted


class _RedactingFactory:
    def __init__(self) -> None:
        self._make = logging.getLogRecordFactory()

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a caller's mistake, which the handler reports
            return record
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redacted_traceback(*record.exc_info).rstrip("\n")  # formatters take it as it is
        return record


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted_traceback(kind, error, trace))
