"""A template and its data → one HTML file that asks nobody for anything: what may run is named by its hash."""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

EXTRA = "report"
NEEDED = ("jinja2",)
_TEMPLATES = files("pipeline.pages") / "templates"


def render(template: str, *, style: str, script: str, data: Any, **values: Any) -> bytes:
    """Returns a page with its style, its script and its data inside.

    Its policy lets that style and that script in and nothing else: what is embedded may be `data:` pictures and
    sounds, and no address may be asked. All values are escaped.

    Args:
        template: of `pipeline/pages/templates`, such as `report.html`.
        style: a style sheet there.
        script: a script there; it finds `data` as JSON in the element `data`.
        data: anything that JSON can say, but no infinities.
        values: what the template asks for besides.
    """
    css, javascript = _read(style), _read(script)
    policy = {
        "default-src": "'none'",
        "style-src": content_hash(css),
        "script-src": content_hash(javascript),
        "img-src": "data:",
        "media-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return render_template(
        template, policy=spell_policy(policy), style=css, script=javascript, data=inline_json(data), **values
    ).encode()


def render_template(template: str, **values: Any) -> str:
    """Returns a template of `pipeline/pages/templates` with its values, all of them escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")


def content_hash(text: str) -> str:
    """Returns how a policy names a style or a script that stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def spell_policy(policy: Mapping[str, str]) -> str:
    """Returns a content security policy as its header or meta element has it."""
    return "; ".join(f"{directive} {sources}" for directive, sources in policy.items())


def inline_json(data: Any) -> str:
    """Returns JSON that may stand in a script element: no text in it can end that element."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def data_url(content: bytes, kind: str) -> str:
    """Returns an address that is its own content.

    Args:
        content: the bytes.
        kind: their media type, such as image/png.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
