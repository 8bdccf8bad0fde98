"""The page that listens, in a real browser, from a web server that only serves files."""

import io
import json
import mimetypes
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from browsers import listen_to
from conftest import CLASS_NAMES, COARSE

import student
from pipeline import cli
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.exporting.onnx_model import OnnxModel
from pipeline.pages.listening_page import MODEL_NAME, RUNTIME_VERSION, find_runtime, write_listening_page
from pipeline.training.checkpoints import save_weights

ROOT = Path(__file__).resolve().parents[3]
RUNTIME = ROOT / ".venv" / "onnxruntime-web" / RUNTIME_VERSION
SAMPLE = ROOT / "manifests" / "sample" / "audio"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student whose outputs lie far apart, so that small differences of a sound show."""
    vocabulary = Vocabulary(tuple(LabelClass(index, f"/t/{index}", name) for index, name in enumerate(CLASS_NAMES)))
    torch.manual_seed(0)
    model = student.create_model("mn01", num_classes=4, **{**COARSE, "hopsize": 320})
    metadata = {"stage": "student", "model": "mn01", "kwargs": {**COARSE, "hopsize": 320}, "classes": 4}
    metadata |= {"vocabulary_sha256": vocabulary.sha256, "vocabulary": vocabulary.to_csv_bytes().decode()}
    weights = model.state_dict()
    noise = 0.3 * torch.rand(4, 32_000) - 0.15
    with torch.inference_mode():
        weights["classifier.5.weight"] *= 2 / model.eval()(model.front_end(noise)).abs().max()
    path = tmp_path_factory.mktemp("weights") / "<i>tagger<i>.safetensors"
    save_weights(path, weights, metadata)
    return str(path)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real sounds of several formats and rates, and two that are made."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, rate, channels in (("a.wav", 44_100, 2), ("b.flac", 22_050, 1)):
        time = np.arange(round(1.7 * rate)) / rate
        sweep = 0.3 * np.sin(2 * np.pi * (200 + 1500 * time) * time)  # up to 5 kHz: filters differ at the band's edge
        soundfile.write(folder / name, np.repeat(sweep[:, None], channels, axis=1), rate)
    real = [sorted(SAMPLE.glob(f"*.{kind}"))[0] for kind in ("opus", "ogg", "mp3")]
    return [*real, folder / "a.wav", folder / "b.flac"]


@pytest.fixture(scope="module")
def exported(weights: str, sounds: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not RUNTIME.is_dir():
        pytest.skip(f"no {RUNTIME}: `make onnxruntime-web` fetches it where npm may")
    folder = tmp_path_factory.mktemp("web")
    copy, network = folder / "copy", folder / "network"
    check = ["--check-data", str(sounds[-1])]
    assert cli.run(["export", weights, "--web", str(copy), "--runtime", str(RUNTIME), *check]) == 0
    network.mkdir()
    shutil.copy(copy / MODEL_NAME, network)
    metadata = OnnxModel(str(network / MODEL_NAME)).metadata
    write_listening_page(str(network), metadata, name="x", fixed_samples=None, runtime=find_runtime(None))
    return folder


class Silent(SimpleHTTPRequestHandler):
    """Serves files under the types that an old server knows."""

    def guess_type(self, path: Any) -> str:
        known = mimetypes.guess_type(path)[0]
        return known if known in ("text/html", "text/css", "text/javascript") else "application/octet-stream"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(exported: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(exported))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page()
    page.heard = listen_to(page)
    open_ready(page, f"{address}/copy/index.html")
    yield page
    page.close()


def open_ready(page: Any, url: str) -> None:
    page.set_default_timeout(120_000)
    page.goto(url)
    page.locator("#file:enabled").wait_for(state="attached")


def state_of(page: Any, ending: str) -> str:
    page.locator(f"#state:text-matches({json.dumps(ending)})").wait_for()
    return page.locator("#state").inner_text()


def tags_of(page: Any, part: str) -> dict[str, float]:
    script = """(part) => Array.from(document.querySelectorAll(`#${part} li`)).map(
      (one) => [one.querySelector("em").textContent, Number(one.dataset.probability)])"""
    return dict(page.evaluate(script, part))


def test_its_tags_are_those_of_pipeline_tag(
    page: Any, weights: str, sounds: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["tag", *map(str, sounds), "--checkpoint", weights, "--json", "--top", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(sounds)
    for line, sound in zip(lines, sounds, strict=True):
        page.locator("#file").set_input_files(sound)
        state_of(page, f"{sound.name}: .* heard")
        found = tags_of(page, "whole")
        assert found.keys() == line["tags"].keys() == set(CLASS_NAMES)
        assert found == pytest.approx(line["tags"], abs=1e-3), sound
    assert max(found.values()) - min(found.values()) > 0.05
    assert page.heard.complaints == []
    assert all("/copy/" in asked or asked.startswith("blob:") for asked in page.heard.requests)


def test_tags_and_the_timelines_line_follow_the_player(page: Any, sounds: list[Path]) -> None:
    page.locator("#file").set_input_files(sounds[0])
    state_of(page, "heard")
    assert page.locator("#timeline svg").count() == 4
    assert page.locator("#timeline svg").first.locator("rect").count() == 20, "10 s, one each 0.5 s"
    shown = []
    for seconds in (1.2, 8.7):
        page.evaluate(f"document.querySelector('#player').currentTime = {seconds}")
        page.wait_for_timeout(400)
        shown.append((tags_of(page, "now"), float(page.locator("#timeline line").first.get_attribute("x1"))))
    assert shown[0][0] != shown[1][0]
    assert [place for _, place in shown] == pytest.approx([1.2, 8.7], abs=0.2)


def test_a_dropped_file_is_heard_and_what_is_no_sound_is_told(page: Any, sounds: list[Path]) -> None:
    page.locator("#file").set_input_files({"name": "<b>x.mp3", "mimeType": "audio/mpeg", "buffer": b"no sound at all"})
    assert state_of(page, "no sound") == "<b>x.mp3 is no sound that this browser can decode"
    drop = """(bytes) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "dropped.flac"));
      dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
    }"""
    page.evaluate(drop, list(sounds[-1].read_bytes()))
    assert state_of(page, "heard") == "dropped.flac: 1.7 s heard"


def test_a_sound_shorter_than_a_window_is_heard(page: Any) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(100), 32_000, format="WAV")
    page.locator("#file").set_input_files({"name": "s.wav", "mimeType": "audio/wav", "buffer": stream.getvalue()})
    assert state_of(page, "heard") == "s.wav: 0.0 s heard"
    assert len(tags_of(page, "whole")) == 4


def test_the_microphone_is_heard_as_it_speaks_and_let_go_and_a_refusal_is_told(page: Any) -> None:
    page.locator("#microphone").click()
    page.locator("#timeline rect").nth(2).wait_for(state="attached")
    assert len(tags_of(page, "now")) == 4
    assert page.locator("#microphone").get_attribute("aria-pressed") == "true"
    page.locator("#microphone").click()
    assert state_of(page, "off") == "The microphone is off"
    assert page.heard.complaints == []
    page.evaluate("() => { navigator.mediaDevices.getUserMedia = async () => { throw new Error('refused') } }")
    page.locator("#microphone").click()
    assert state_of(page, "opened") == "The microphone can't be opened: refused"
    page.locator("#microphone:enabled").wait_for()


def test_names_are_text_whatever_they_hold(page: Any) -> None:
    assert page.locator("h1").inner_text() == "<i>tagger<i>"
    assert page.evaluate("typeof hacked") == "undefined"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_in_either_colour_scheme(
    browser: Any, address: str, sounds: list[Path], scheme: str
) -> None:
    page = browser.new_page(viewport={"width": 340, "height": 700}, color_scheme=scheme)
    open_ready(page, f"{address}/copy/")
    page.locator("#file").set_input_files(sounds[-1])
    state_of(page, "heard")
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()


class Network:
    """Answers what a page asks of others, in a network's place."""

    def __init__(self, page: Any, appended: bytes = b"") -> None:
        self.asked: list[str] = []
        self._appended = appended
        page.route(re.compile("^https:"), self.answer)

    def answer(self, route: Any) -> None:
        self.asked.append(route.request.url)
        name = route.request.url.rpartition("/")[2]
        kind = "text/javascript" if name.endswith(".mjs") else "application/wasm"
        headers = {"Access-Control-Allow-Origin": "*", "Content-Type": kind}
        route.fulfill(body=(RUNTIME / name).read_bytes() + self._appended, headers=headers)


def test_without_a_copy_one_version_comes_from_the_network(browser: Any, address: str, sounds: list[Path]) -> None:
    page = browser.new_page()
    network = Network(page)
    open_ready(page, f"{address}/network/")
    page.locator("#file").set_input_files(sounds[-1])
    state_of(page, "heard")
    assert {url.split("/dist/")[0] for url in network.asked} == {
        f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}"
    }
    page.close()


def test_another_runtime_than_the_pinned_one_is_told_and_not_run(browser: Any, address: str) -> None:
    page = browser.new_page()
    Network(page, appended=b" ")
    page.goto(f"{address}/network/")
    assert "is not the file that this page was made for" in state_of(page, "can't listen")
    page.close()


def test_a_browser_without_webassembly_and_a_missing_model_are_told_in_one_line(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.WebAssembly")
    page.goto(f"{address}/copy/")
    assert state_of(page, "can't listen").startswith("This page can't listen: this browser has no WebAssembly")
    page.close()
    page = browser.new_page()
    page.route("**/model.onnx", lambda route: route.fulfill(status=404))
    page.goto(f"{address}/copy/")
    assert "/copy/model.onnx can't be had" in state_of(page, "can't listen")
    assert page.locator("#file").is_disabled()
    page.close()


def test_another_version_of_the_runtime_or_a_missing_package_is_told_before_anything_is_written(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["export", weights, "--web", str(tmp_path / "web")]
    assert cli.run([*out, "--runtime", str(tmp_path)]) == 2
    assert f"npm pack onnxruntime-web@{RUNTIME_VERSION}" in capsys.readouterr().err
    (tmp_path / "ort.wasm.bundle.min.mjs").write_text("export {}")
    assert cli.run([*out, "--runtime", str(tmp_path)]) == 2
    assert "holds another ort.wasm.bundle.min.mjs" in capsys.readouterr().err
    monkeypatch.setattr("pipeline.runtime.extras.find_spec", lambda name: None if name == "jinja2" else object())
    assert cli.run(out) == 2
    assert "export --web needs jinja2: pip install 'audioset-distill[report]'" in capsys.readouterr().err
    assert not (tmp_path / "web").exists()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--out", "x.onnx", "--web", "y"],
        ["--out", "x.onnx", "--runtime", "z"],
        ["--web", "y", "--output", "logits"],
    ],
)
def test_flags_that_contradict_each_other_are_told(weights: str, flags: list[str]) -> None:
    assert cli.run(["export", weights, *flags]) == 2
