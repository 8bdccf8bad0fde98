"""The kinds of URL: where each finds its credentials and its server, and how its URLs are spelt."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


@dataclass(frozen=True, slots=True)
class Scheme:
    """One kind of URL."""

    name: str
    credentials: str
    """Where they are looked for."""
    servers: tuple[str, ...]
    """Environment variables that decide which server is asked; the last is the usual one."""
    variables: tuple[str, ...] = ()
    """How the environment variables begin that it reads; a change of one of them makes a new store."""
    package: str = ""
    """How to install what it may need."""


_SCHEMES = {
    "s3": Scheme(
        "s3",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws, or the machine's role; "
        "AWS_SKIP_SIGNATURE=true reads public buckets without any",
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_ENDPOINT_URL"),
        ("AWS_", "FSSPEC_S3_ANON"),
        "pip install 'audioset-distill[s3]', or give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    "gs": Scheme(
        "gs",
        "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's role; "
        "GOOGLE_SKIP_SIGNATURE=true reads public buckets without any",
        ("STORAGE_EMULATOR_HOST",),
        ("GOOGLE_", "STORAGE_EMULATOR_HOST"),
    ),
    "az": Scheme(
        "az",
        "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
        "or the machine's identity; AZURE_SKIP_SIGNATURE=true reads public containers "
        "without any",
        ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
        ("AZURE_",),
    ),
    "hf": Scheme("hf", "HF_TOKEN, or `hf auth login`", ("HF_ENDPOINT",), ("HF_",)),
    "http": Scheme("http", "~/.netrc, or the URL itself", ("HTTP_PROXY",), ("NETRC",)),
    "memory": Scheme("memory", "nothing", ()),
}
_ALIASES = {"https": "http", "s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "azure": "az"}


def scheme_of(location: str) -> Scheme:
    """Returns the kind of a URL; of one that is not known here, what can be said all the same."""
    protocol = location.split("://", 1)[0].lower()
    unknown = Scheme(protocol, "what its package reads", (), package="its fsspec package")
    return _SCHEMES.get(_ALIASES.get(protocol, protocol), unknown)


def is_web(location: str | Path) -> bool:
    """Tell `http://…` and `https://…`, which can be read only and whose folders can't be listed."""
    return str(location).lower().startswith(("http://", "https://"))


def split_bucket(location: str) -> tuple[str, str]:
    """Returns the bucket (or container) of `s3://bucket/path` and its kin, and the path inside it."""
    bucket, _, path = location.split("://", 1)[1].partition("/")
    return bucket, path.strip("/")


def split_web(location: str) -> tuple[str, str]:
    """Returns the URL of a web file's folder, with its query and as it is spelt, and the file's name.

    A name that would be spelt in another way when they are joined, such as one with `%2F`, stays in the URL.
    """
    parts = urlsplit(location)
    folder, _, name = parts.path.rpartition("/")
    plain = unquote(name)
    if plain in ("", ".", "..") or "/" in plain or "\ufffd" in plain:
        return location, ""
    return parts._replace(path=folder).geturl(), plain


def join_url(folder: str, name: str) -> str:
    """Returns the URL of `name` inside a folder; a query, such as an access token, stays at the end."""
    if not is_web(folder):
        return f"{folder.rstrip('/')}/{name}"
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"


def url_name(location: str) -> str:
    """Returns the name of the file behind a URL, without a query."""
    return urlsplit(location).path.rstrip("/").rsplit("/", 1)[-1] if is_web(location) else location.rsplit("/", 1)[-1]
