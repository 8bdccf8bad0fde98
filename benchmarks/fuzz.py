"""Feeds broken files to the readers of what users bring: tars, lists, tables, class lists, and sounds of all kinds.

    python -m benchmarks.fuzz --minutes 10 --seed 1
    python -m benchmarks.fuzz --minutes 10 --seed 1 --only wav ogg mp4

Each execution takes a valid or an earlier interesting file, damages it in some places, and reads it. Allowed are a
result that keeps its promises, and the readers' own errors (`PipelineError`). Everything else is a finding: another
exception, a broken promise, the end of the process, more than 2 s of processor time, more than 512 MiB of memory. A
finding's bytes and trace are written to `--findings`, and the exit code is 1; mended, it becomes a line in
`tests/wild/`. An outcome that was not seen before (an error's words, the reasons of rejections) makes its input a base
for later ones, but for sounds, of which nobody would know any more what is whole.

The same seed gives the same inputs, until the time is over.
"""

import argparse
import io
import json
import logging
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FrameType

import pyarrow as pa

from benchmarks.fuzz_sounds import SOUND_TOKENS, damaged_header, read_sound, sound_files
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.segments import read_segment_files
from pipeline.dataset.tar_index import iter_members
from pipeline.dataset.vocabulary import audioset_vocabulary, parse_vocabulary
from pipeline.errors import PipelineError
from pipeline.ingest.labelled_table import LabelledTableSource, TableColumns
from pipeline.ingest.plan import make_plan
from pipeline.ingest.tars import TarRules, index_tars

SECONDS_OF_PROCESSOR = 2.0
MORE_MEMORY_BYTES = 512 << 20
MAX_BYTES = 64 << 10
VOCABULARY = audioset_vocabulary()
NO_IDS = pa.array([], pa.string())

Reader = Callable[[Path], str]
"""Reads a file; says in a few words what came out, or raises PipelineError."""


class HangError(Exception):
    """A reader took too long."""


def read_tar(path: Path) -> str:
    """Index a tar, and make a manifest of what it holds."""
    length = path.stat().st_size
    ledger = index_tars(str(path.parent), [path.name], TarRules(vocabulary=VOCABULARY))
    manifest = Manifest(str(path.parent), ledger.rows, VOCABULARY)
    assert (manifest.offsets + manifest.sizes <= length).all(), "a clip lies outside its tar"
    for item in ledger.rejections:
        f"{item.path}{item.reason}{item.detail}".encode()
    with path.open("rb") as stream:
        names = [member.name for member in iter_members(stream, path.name) if not member.refusal]
    assert not any(".." in name.split("/") or name.startswith("/") for name in names), "an unsafe name is let in"
    return f"{min(len(manifest), 3)} {sorted({item.reason for item in ledger.rejections})}"


def read_segments(path: Path) -> str:
    """Read a segments list."""
    table = read_segment_files([path], VOCABULARY)
    for row in table.to_pylist():
        assert row["clip_id"], "a segment without an id is let in"
        assert 0 <= row["start_seconds"] < row["end_seconds"], "an impossible segment is let in"
    return str(min(table.num_rows, 3))


def read_labelled(path: Path) -> str:
    """Read a labelled table, and plan what it names."""
    source = LabelledTableSource((str(path),), path.parent, TableColumns(path="path", label="label"))
    plan = make_plan(source, source.own_vocabulary(), NO_IDS)
    return f"{min(plan.clips.num_rows, 3)} {sorted(set(plan.rejected['reason'].to_pylist()))}"


def read_classes(path: Path) -> str:
    """Read a class list; what is read can be written and read again."""
    vocabulary = parse_vocabulary(path.read_bytes(), path.name)
    assert parse_vocabulary(vocabulary.to_csv_bytes(), path.name) == vocabulary, "a class list does not come back"
    return str(min(len(vocabulary), 3))


def tar_bytes(kind: int) -> bytes:
    """Make a small dataset's tar in one of the formats, with what is odd and yet allowed."""
    stream = io.BytesIO()
    described = json.dumps({"clip_id": "--PJHxphWEs", "labels": ["/m/09x0r"], "sample_rate": 32000, "frames": 9})
    files = {
        "--PJHxphWEs.flac": b"fLaC" + bytes(600),
        "--PJHxphWEs.json": described.encode(),
        f"{'folder/' * 20}é{'x' * 60}.mp3": b"ID3",
        f"{'folder/' * 20}é{'x' * 60}.json": b'{"label_id": [1, 2], "label": ["Male speech, man speaking"]}',
    }
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return stream.getvalue()


@dataclass(slots=True)
class Target:
    """A reader and the files that its inputs descend from."""

    name: str
    read: Reader
    file: str
    corpus: list[bytes]
    tokens: list[bytes]
    """What is worth inserting."""
    block: int = 1
    """Bytes that the format is counted in."""
    damage_header: Callable[[bytes, random.Random], bytes] | None = None
    """Damages a file where its structure stands."""
    outcomes: Counter[str] = field(default_factory=Counter)


def targets() -> list[Target]:
    """Returns all readers that are fuzzed."""
    numbers = [b"\x80" + bytes(10) + b"\x7f", b"\xff" * 12, b"77777777777\0", b"-1", b"00000000000\0", b"\x80" * 12]
    kinds = [bytes([kind]) for kind in b"0123456789xgLKSV\0"]
    pax = [b"21 path=../../evil\n\n", b"18 size=99999999\n", b"11 size=-1\n", b"99999999 path=x\n", b"0 =\n"]
    tar_tokens = [*numbers, *kinds, *pax, b"ustar\0", b"ustar  ", b"\x1f\x8b\x08", b"../", b".json", b"[" * 3000]
    text = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"nan", b"inf", b"-1", b"1e999", b"\xc2\x85"]
    text += [b"\xe2\x80\xa8", b"#", b"/m/09x0r", b'"' * 5000, b"9" * 5000, b"\xed\xa0\x80", b"../" * 50, b"a" * 300]
    segments = b'# comment\n--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n_x, 0, 10, "/m/04rlf"\n'
    labelled = b"path,label\ndog/a.wav,dog\n../b,cat\n/abs/c.wav,1\n"
    classes = b'index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/05zppz,"Male speech, man speaking"\n'
    tars = [tar_bytes(kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    return [
        Target("tar", read_tar, "x.tar", tars, tar_tokens, 512),
        Target("segments", read_segments, "segments.csv", [segments], text),
        Target("labelled table", read_labelled, "table.csv", [labelled], text),
        Target("class list", read_classes, "classes.csv", [classes], text),
        *(
            Target(
                name, read_sound, f"x.{name}", files, list(SOUND_TOKENS), damage_header=partial(damaged_header, name)
            )
            for name, files in sound_files().items()
        ),
    ]


def mutated(target: Target, dice: random.Random) -> bytes:
    """Damage one of the target's files in one to eight places."""
    data, tokens, others = bytearray(dice.choice(target.corpus)), target.tokens, target.corpus
    for _ in range(2 ** dice.randrange(4)):
        place, length = dice.randrange(len(data) + 1), 2 ** dice.randrange(11)
        if dice.random() < 0.5:  # whole blocks, so that what is behind them still stands where headers do
            place, length = place - place % target.block, -(-length // target.block) * target.block
        match dice.randrange(7):
            case 0 if data:
                data[place % len(data)] ^= 1 << dice.randrange(8)
            case 1:
                token = dice.choice(tokens)
                data[place : place + len(token)] = token
            case 2:
                data[place:place] = dice.choice(tokens)
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length] * dice.randrange(1, 5)
            case 5:
                other = dice.choice(others)
                start = dice.randrange(len(other) + 1)
                data[place:] = other[start:]
            case _:
                data[place : place + length] = dice.randbytes(min(length, 64))
    return bytes(data[:MAX_BYTES])


def mend_headers(tar: bytes) -> bytes:
    """Put a right checksum into every block that looks like a tar header, so that damage gets past that check."""
    data = bytearray(tar)
    for start in range(0, len(data) - 511, 512):
        block = data[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % (sum(block) % 8**6)
    return bytes(data)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise HangError(f"more than {SECONDS_OF_PROCESSOR} s of processor time")


def execute(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """Read one input; gives the outcome, and the trace where it is a finding."""
    path = folder / target.file
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_OF_PROCESSOR)
    try:
        return target.read(path), ""
    except PipelineError as error:
        # The words without what was quoted, or every input would be an outcome of its own.
        words = re.sub(r"'[^\n]*'|\"[^\n]*\"|\([^\n]*\)|\d+|b'.*'", "_", str(error).replace(str(path), "FILE"))
        return f"{type(error).__name__}: {words[:120]}", ""
    except Exception as error:
        return f"finding: {type(error).__name__}", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def limit_memory() -> None:
    """Make every allocation fail that goes far beyond what the process takes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def save_finding(folder: Path, target: Target, data: bytes, trace: str) -> None:
    """Keep what is needed to see a finding again."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{target.name.replace(' ', '-')}-{sha256(data).hexdigest()[:12]}"
    (folder / f"{stem}.bin").write_bytes(data)
    (folder / f"{stem}.txt").write_text(trace)
    print(f"FINDING {target.name}: {trace.strip().splitlines()[-1][:200]} -> {folder / stem}.bin", flush=True)


def fuzz(minutes: float, seed: int, findings: Path, only: Sequence[str], folder: Path) -> None:
    """Fuzz targets in turn; the process exits with 1 if something was found.

    Args:
        minutes: for how long.
        seed: of what is chosen.
        findings: folder for what is found.
        only: names of targets; none are all.
        folder: for the file that is being read.
    """
    dice, executions, seen = random.Random(seed), Counter[str](), set[str]()
    everything = [target for target in targets() if not only or target.name in only]
    signal.signal(signal.SIGVTALRM, _on_alarm)
    logging.disable()  # a damaged tar is worth a line to its user, not here
    limit_memory()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        target = dice.choice(everything)
        if target.damage_header is not None and dice.random() < 0.8:
            data = target.damage_header(dice.choice(target.corpus), dice)
        else:
            data = mutated(target, dice)
        if target.name == "tar" and dice.random() < 0.8:
            data = mend_headers(data)
        outcome, trace = execute(target, data, folder)
        executions[target.name] += 1
        target.outcomes[outcome] += 1
        if trace and (place := f"{target.name} {outcome} {trace.splitlines()[-3:]}") not in seen:
            seen.add(place)
            save_finding(findings, target, data, trace)
        elif not trace and target.outcomes[outcome] == 1 and len(target.corpus) < 1000 and not target.damage_header:
            target.corpus.append(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for target in everything:
        print(f"{target.name}: {executions[target.name]:,} executions, {len(target.outcomes):,} different outcomes")
    print(f"seed {seed}: {executions.total():,} executions in {minutes:g} min; findings: {len(seen)}; {peak:.0f} MiB")
    sys.exit(1 if seen else 0)


def main() -> int:
    """Read the command line, fuzz, and say with the exit code whether something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="wall time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what is found")
    parser.add_argument("--only", nargs="*", default=(), help="names of targets, as the last lines have them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        settings = (arguments.minutes, arguments.seed, arguments.findings, arguments.only, Path(folder))
        reader = multiprocessing.get_context("spawn").Process(target=fuzz, args=settings)
        reader.start()
        reader.join()
        exit_code = reader.exitcode or 0
        if exit_code < 0:
            arguments.findings.mkdir(parents=True, exist_ok=True)
            for path in Path(folder).iterdir():
                kept = shutil.copy(path, arguments.findings / f"killed-by-{-exit_code}-{path.name}")
                print(f"FINDING: signal {-exit_code} ended the process; one of the last files: {kept}")
    return 1 if exit_code else 0


if __name__ == "__main__":
    sys.exit(main())
