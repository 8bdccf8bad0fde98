import logging
import subprocess
import sys

import pytest

from pipeline import redaction
from pipeline.errors import DecodeError, PipelineError, UsageError
from pipeline.redaction import redact

SIGNED = "https://bucket.s3.amazonaws.com/a/x.pt?X-Amz-Credential=AKIA%2F20260101&X-Amz-Signature=5ecret5ig"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://anna:pa55@host:8080/data/x.tar: no", "https://***@host:8080/data/x.tar: no"),
        ("s3://AKIA1:se+cret@bucket/x", "s3://***@bucket/x"),
        ("https://anna:p@55@host/x", "https://***@host/x"),
        (f"{SIGNED} is gone", "https://bucket.s3.amazonaws.com/a/x.pt?*** is gone"),
        ('data = "https://h/d?sig=abc%3D"\nrun = "r"', 'data = "https://h/d?***"\nrun = "r"'),
        ("{'Authorization': 'AWS4-HMAC-SHA256 Credential=AK/1, SignedHeaders=host, Signature=5ecret5ig'}", None),
        ("<CIMultiDict('Authorization': 'Bearer hf_5ecret5ig', 'Host': 'h')>", None),
        ("aws_secret_access_key=5ecret5ig&x=1", "aws_secret_access_key=***&x=1"),
        ("hf://datasets/me/sounds@main/x.tar, mail me@home.org, is it?", None),
        ("abfss://container@account.dfs.core.windows.net/x", None),
    ],
)
def test_credentials_in_text_are_masked_and_nothing_else_is(text: str, clean: str | None) -> None:
    found = redact(text)
    assert "5ecret5ig" not in found
    if clean is not None:
        assert found == clean
    elif "5ecret" not in text:
        assert found == text
    else:
        assert redaction.MASK in found


def test_values_of_secret_environment_variables_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "wJalrXUtnFEMI/K7MDENG-and-more")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "Eby8vdM02xNOcqFlqUwJ==")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    found = redact(
        "key wJalrXUtnFEMI/K7MDENG, token wJalrXUtnFEMI/K7MDENG-and-more, it is true, Eby8vdM02xNOcqFlqUwJ=="
    )
    assert found == "key ***, token ***, it is true, ***"


def test_every_error_of_the_project_is_clean() -> None:
    for kind in (PipelineError, UsageError):
        assert str(kind(f"{SIGNED}: no such file")) == "https://bucket.s3.amazonaws.com/a/x.pt?*** no such file"
    assert "pw" not in str(DecodeError("undecodable audio", "https://u:pw@h/x"))


def test_logs_and_tracebacks_of_a_process_are_clean() -> None:
    program = f"""
import logging
from pipeline import redaction
redaction.install(); redaction.install()
logging.basicConfig(level=logging.INFO)
logging.getLogger("botocore").info("GET %s", {SIGNED!r})
logging.getLogger("x").info("%s of %d", "nothing", 3)
logging.getLogger("x").info("100 %")
try:
    raise ValueError({SIGNED!r})
except ValueError:
    logging.getLogger("ray").exception("shard %s", "s3://key:5ecret5ig@bucket/a.tar")
raise OSError({SIGNED!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "5ecret5ig" not in done.stderr
    for kept in (
        "INFO:botocore:GET https://bucket",
        "nothing of 3",
        "100 %",
        "ValueError",
        "OSError: https://",
        "line 13",
    ):
        assert kept in done.stderr


def test_a_caller_that_logs_wrongly_hears_of_it_from_logging_itself(caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    try:
        redaction.install()
        record = logging.getLogRecordFactory()("x", logging.INFO, "f", 1, "%d", ("no number",), None)
    finally:
        logging.setLogRecordFactory(factory)
        sys.excepthook = sys.__excepthook__
    assert record.args == ("no number",)
