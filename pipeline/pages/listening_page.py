"""A student → a folder of static files that tags sounds in a browser: any web server, no program behind it."""

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.exporting.metadata import ExportMetadata
from pipeline.pages.documents import content_hash, inline_json, render_template, spell_policy
from pipeline.storage import files as storage

MODEL_NAME = "model.onnx"
RUNTIME_VERSION = "1.30.0"
"""Of onnxruntime-web, from npm; `make onnxruntime-web` fetches it for the tests."""
_CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"
_SCRIPT, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
_INTEGRITY = {
    _SCRIPT: "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    _WASM: "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
"""Of that version's files; a browser that is given others refuses them."""
_COPIED = {_SCRIPT: "runtime/ort.wasm.bundle.min.js", _WASM: f"runtime/{_WASM}"}
"""What they are called beside the page: some servers know no .mjs, and browsers run no script of an unknown type."""
_PARTS = ("listen.css", "listen.js", "microphone.js")
_WINDOW_SECONDS, _HOP_SECONDS = 2.0, 0.5
_LONGEST_WHOLE_SECONDS = 60.0
"""Longer sounds would take more memory at once than a telephone's browser has."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where the page finds ONNX Runtime Web."""

    script: str
    wasm: str
    origin: str
    """What the page's policy lets in for it; empty where the files lie beside the page."""
    copied: dict[str, Path]
    """File of the page's folder → what it is copied from."""


def find_runtime(folder: str | None) -> Runtime:
    """Returns the runtime as a copy beside the page, or, without a folder, that of a content delivery network.

    Args:
        folder: `dist` of npm's package onnxruntime-web, or any folder with its two files.

    Raises:
        UsageError: the files are not there, or not those of `RUNTIME_VERSION`.
    """
    if folder is None:
        return Runtime(script=_CDN + _SCRIPT, wasm=_CDN + _WASM, origin=_CDN, copied={})
    sources = {name: storage.local_path(folder) / name for name in _COPIED}
    for name, path in sources.items():
        if not path.is_file() or integrity_of(path.read_bytes()) != _INTEGRITY[name]:
            raise UsageError(
                f"--runtime {folder}: {'holds another' if path.is_file() else 'holds no'} {name}. Give the folder dist "
                f"of npm's onnxruntime-web {RUNTIME_VERSION}: npm pack onnxruntime-web@{RUNTIME_VERSION}"
            )
    copied = {_COPIED[name]: path for name, path in sources.items()}
    return Runtime(script=f"./{_COPIED[_SCRIPT]}", wasm=f"./{_COPIED[_WASM]}", origin="", copied=copied)


def write_listening_page(
    folder: str, metadata: ExportMetadata, *, name: str, fixed_samples: int | None, runtime: Runtime
) -> list[str]:
    """Write the page beside its model.

    Args:
        folder: a path or URL, which holds `MODEL_NAME` already: waveforms in, probabilities out.
        metadata: what that file says of itself.
        name: what the page calls the model.
        fixed_samples: the only length that the model takes; None where it takes any.
        runtime: where the page finds what runs it.

    Returns:
        The files' names, the page last.
    """
    for place, source in runtime.copied.items():
        storage.publish_bytes(storage.join_path(folder, place), source.read_bytes())
    templates = files("pipeline.pages") / "templates"
    for part in _PARTS:
        storage.publish_bytes(storage.join_path(folder, part), (templates / part).read_bytes())
    model = storage.read_bytes(storage.join_path(folder, MODEL_NAME))
    about = {**_describe(metadata, fixed_samples), "integrity": integrity_of(model)}
    about["runtime"] = {
        "version": RUNTIME_VERSION,
        "script": runtime.script,
        "wasm": runtime.wasm,
        "wasm_integrity": _INTEGRITY[_WASM],
    }
    storage.publish_bytes(storage.join_path(folder, "model.json"), json.dumps(about, ensure_ascii=False).encode())
    page = _page(name, len(metadata.classes), runtime)
    storage.publish_bytes(storage.join_path(folder, "index.html"), page.encode())
    return [MODEL_NAME, *runtime.copied, *_PARTS, "model.json", "index.html"]


def _describe(metadata: ExportMetadata, fixed_samples: int | None) -> dict[str, Any]:
    rate = metadata.sample_rate_hz
    seconds = _WINDOW_SECONDS if fixed_samples is None else fixed_samples / rate
    return {
        "names": metadata.classes,
        "sample_rate_hz": rate,
        "shortest_samples": fixed_samples or metadata.shortest_samples,
        "window_seconds": seconds,
        "hop_seconds": seconds * _HOP_SECONDS / _WINDOW_SECONDS,
        "longest_whole_seconds": _LONGEST_WHOLE_SECONDS if fixed_samples is None else seconds,
    }


def _page(name: str, classes: int, runtime: Runtime) -> str:
    integrity = _INTEGRITY[_SCRIPT]
    import_map = inline_json({"imports": {"runtime": runtime.script}, "integrity": {runtime.script: integrity}})
    outside = f" {runtime.origin}" if runtime.origin else ""
    policy = {
        "default-src": "'none'",
        "script-src": f"'self'{outside} 'wasm-unsafe-eval' {content_hash(import_map)}",
        "connect-src": f"'self'{outside}",
        "style-src": "'self'",
        "img-src": "data:",
        "media-src": "blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return render_template(
        "listen.html",
        policy=spell_policy(policy),
        import_map=import_map,
        runtime=runtime.script,
        integrity=integrity,
        name=name,
        classes=classes,
    )


def integrity_of(content: bytes) -> str:
    """Returns what a browser is told to expect of a file."""
    return f"sha384-{base64.b64encode(hashlib.sha384(content).digest()).decode()}"
