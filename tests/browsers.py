"""A real browser for the tests of pages: the distribution's Chromium, without a window, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True, slots=True)
class Heard:
    """What a page said and asked for while it was open."""

    complaints: list[str] = field(default_factory=list)
    """Errors of its scripts, and what its policy refused."""
    requests: list[str] = field(default_factory=list)
    """Addresses, but for those that are their own content."""


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yields Playwright's browser; skips where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no {', '.join(NAMES)} on the path: `make chromium` installs one where apt may")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root; what is opened here is what the tests wrote.
        switches = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--use-fake-ui-for-media-stream"]
        browser = playwright.chromium.launch(
            executable_path=path, args=[*switches, "--use-fake-device-for-media-stream"]
        )
        yield browser
        browser.close()


def listen_to(page: Any) -> Heard:
    """Returns what a page will have said and asked for; to be called before it is opened."""
    heard = Heard()
    page.on("pageerror", lambda error: heard.complaints.append(str(error)))
    page.on("console", lambda line: heard.complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("request", lambda asked: asked.url.startswith("data:") or heard.requests.append(asked.url))
    return heard
