"""The kinds of URL: what each needs, where its credentials come from, and how its URLs are spelt."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit


@dataclass(frozen=True, slots=True)
class Scheme:
    """One kind of URL."""

    name: str
    extra: str
    """What to install."""
    credentials: str
    """Where they are looked for."""
    endpoint: str
    """Environment variables that decide which server is asked."""
    environment: tuple[str, ...] = ()
    """A change of one of these makes a new connection."""
    repeats: bool = False
    """Whether its package tries again by itself, for long enough."""


_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION")
_SCHEMES = {
    "s3": Scheme(
        "s3",
        "pip install 'audioset-distill[s3]'",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role; FSSPEC_S3_ANON=true reads "
        "public buckets without any",
        "AWS_ENDPOINT_URL",
        (*_AWS, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ANON"),
    ),
    "gs": Scheme(
        "gs",
        "pip install 'audioset-distill[gcs]'",
        "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's role",
        "STORAGE_EMULATOR_HOST",
        ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"),
        repeats=True,
    ),
    "hf": Scheme(
        "hf",
        "pip install huggingface_hub",
        "HF_TOKEN, or `hf auth login`",
        "HF_ENDPOINT",
        ("HF_TOKEN", "HF_ENDPOINT"),
    ),
    "http": Scheme("http", "pip install aiohttp", "~/.netrc, or the URL itself", "HTTP_PROXY"),
    "memory": Scheme("memory", "", "nothing", "nothing"),
}
_ALIASES = {"https": "http", "s3a": "s3", "gcs": "gs"}


def scheme_of(location: str) -> Scheme:
    """Give the kind of a URL; of one that is not known here, what can be said all the same."""
    protocol = location.split("://", 1)[0].lower()
    unknown = Scheme(protocol, "its fsspec package", "what its fsspec package reads", "its fsspec package's settings")
    return _SCHEMES.get(_ALIASES.get(protocol, protocol), unknown)


def is_web(location: str | Path) -> bool:
    """Tell `http://…` and `https://…`, which can be read only and whose folders can't be listed."""
    return str(location).lower().startswith(("http://", "https://"))


def join_url(folder: str, name: str) -> str:
    """Give the URL of `name` inside a folder; a query, such as an access token, stays at the end."""
    if not is_web(folder):
        return f"{folder.rstrip('/')}/{name}"
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"


def url_name(location: str) -> str:
    """Give the name of the file behind a URL, without a query."""
    return urlsplit(location).path.rstrip("/").rsplit("/", 1)[-1] if is_web(location) else location.rsplit("/", 1)[-1]
