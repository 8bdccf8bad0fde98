"""What `pipeline embed` does a second beside `pipeline evaluate`, on the same clips, in turn.

    python -m benchmarks.embedding --data DATASET --checkpoint mn10_as --layer penultimate efficientat

Both decode in the same number of processes; the clips and the model are loaded before. The baseline is `evaluate`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.embeddings.extracting import embed_shards
from pipeline.embeddings.layers import Embedder
from pipeline.embeddings.store import EmbeddingStamp
from pipeline.models.loading import LoadedModel, load_model
from pipeline.scoring.scoring import run_models

CPU = torch.device("cpu")


def embed(model: LoadedModel, manifest: Manifest, layer: str, workers: int) -> None:
    """Embed a dataset once, into a folder that is thrown away."""
    embedder = Embedder(model.network, layer).eval()
    stamp = EmbeddingStamp(
        model=model.model_name,
        sha256=model.sha256,
        front_end=model.front_end,
        layers=layer,
        size=embedder.size,
        precision="float32",
    )
    with tempfile.TemporaryDirectory() as out:
        embed_shards(
            embedder,
            manifest,
            manifest.shards,
            out,
            stamp,
            batch_size=32,
            workers=workers,
            device=CPU,
            precision="float32",
        )


def evaluate(model: LoadedModel, manifest: Manifest, workers: int) -> None:
    """Compute a dataset's logits once, as `pipeline evaluate` does."""
    list(run_models([model], manifest, batch_size=32, workers=workers, device=CPU, precision="float32"))


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Add the seconds that a block takes."""
    begun = time.perf_counter()
    yield
    times.append(time.perf_counter() - begun)


def main() -> None:
    """Print clips a second, and each kind's median ratio to `evaluate` over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--layer", nargs="+", default=["penultimate"])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    manifest, model = read_manifest(arguments.data), load_model(arguments.checkpoint)
    kinds: dict[str, Callable[[], None]] = {"evaluate": partial(evaluate, model, manifest, arguments.workers)}
    kinds |= {f"embed {layer}": partial(embed, model, manifest, layer, arguments.workers) for layer in arguments.layer}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind, run in kinds.items():
            with timed(times[kind]):
                run()
    print("| | clips/s | x evaluate |\n|---|---:|---:|")
    for kind, seconds in times.items():
        ratio = statistics.median(base / own for base, own in zip(times["evaluate"], seconds, strict=True))
        print(f"| {kind} | {len(manifest) / statistics.median(seconds):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
