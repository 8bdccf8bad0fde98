"""What the pages cost in a browser: a report to open, and a listening page's 10 s of sound beside ONNX Runtime's own.

    python -m benchmarks.pages --report report.html --page FOLDER

FOLDER is what `pipeline export … --web FOLDER --runtime DIR` wrote. Chromium runs headless, on one thread.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np

from benchmarks.on_device import onnx_function
from pipeline.pages.listening_page import MODEL_NAME

ROUNDS = 20
IN_THE_BROWSER = """async ([samples, rounds]) => {
  const about = await (await fetch("model.json")).json(), runtime = await import("runtime");
  runtime.env.wasm.numThreads = 1;
  runtime.env.wasm.wasmBinary = await (await fetch(about.runtime.wasm)).arrayBuffer();
  const model = await (await fetch("model.onnx")).arrayBuffer();
  const session = await runtime.InferenceSession.create(model, { executionProviders: ["wasm"] });
  const sound = Float32Array.from({ length: samples }, () => 0.2 * Math.random() - 0.1), times = [];
  for (let round = 0; round < rounds; round++) {
    const begun = performance.now();
    await session.run({ waveforms: new runtime.Tensor("float32", sound, [1, samples]) });
    times.push(performance.now() - begun);
  }
  return times;
}"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: str) -> Iterator[str]:
    """Yields the address of a web server that hands out a folder's files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


def told(times: list[float]) -> str:
    """Returns the least and the median of some milliseconds, the first left out."""
    return f"{min(times[1:]):.1f} | {statistics.median(times[1:]):.1f}"


def measure_report(browser: Any, path: Path) -> None:
    """Print how large a report is, and what opening it takes."""
    times = []
    for _ in range(6):
        page = browser.new_page()
        begun = time.perf_counter()
        page.goto(path.resolve().as_uri())
        page.locator("tbody tr").first.wait_for()
        times.append(1000 * (time.perf_counter() - begun))
        page.close()
    print(f"| report of {path.stat().st_size / 1e6:.2f} MB, opened | {told(times)} |")


def measure_page(browser: Any, folder: str, samples: int) -> None:
    """Print what 10 s of sound take in the browser and natively."""
    page = browser.new_page()
    with served(folder) as address:
        begun = time.perf_counter()
        page.goto(address)
        page.locator("#file:enabled").wait_for(state="attached")
        print(f"| page, ready to listen | {1000 * (time.perf_counter() - begun):.0f} | |")
        run = onnx_function(str(Path(folder) / MODEL_NAME))
        sound = 0.1 * np.random.default_rng(0).standard_normal((1, samples), dtype=np.float32)
        natively = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            run(sound)
            natively.append(1000 * (time.perf_counter() - begun))
        found = page.evaluate(IN_THE_BROWSER, [samples, ROUNDS])
    print(f"| 10 s of sound, ONNX Runtime natively | {told(natively)} |")
    print(f"| 10 s of sound, in the browser | {told(found)} |")
    print(f"the browser takes {min(found) / min(natively):.1f} times as long (least of {ROUNDS} each)")


def main() -> None:
    """Print milliseconds, least and median."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--page", required=True)
    parser.add_argument("--sample-rate-hz", type=int, default=32_000)
    arguments = parser.parse_args()
    path = which("chromium") or which("chromium-browser") or which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        print("| | least, ms | median, ms |\n|---|---:|---:|")
        measure_report(browser, arguments.report)
        measure_page(browser, arguments.page, 10 * arguments.sample_rate_hz)
        browser.close()


if __name__ == "__main__":
    main()
