"""Tiny sets in the layouts that the publishers of ESC-50, FSD50K, OpenMIC-2018 and TAU Urban 2020 ship."""

import json
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16_000


def write_sound(path: Path, number: int, *, seconds: float = 0.25) -> None:
    """Write a tone whose pitch tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    noise = 0.01 * np.random.default_rng(number).standard_normal(len(time))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * 2 ** (number % 4) * time) + noise, RATE_HZ)


def esc50(folder: Path) -> Path:
    """Four clips of two classes in each of five folds; the classes' numbers are not in their names' order."""
    home = folder / "ESC-50-master"
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for take in range(4):
            target = take % 2
            name = f"{fold}-{100000 + take}-A-{target}.wav"
            write_sound(home / "audio" / name, target)
            rows.append(f"{name},{fold},{target},{['rooster', 'crying_baby'][target]},False,{100000 + take},A")
    (home / "meta").mkdir()
    (home / "meta/esc50.csv").write_text("\n".join(rows) + "\n")
    return folder


def fsd50k(folder: Path) -> Path:
    """Three classes, of which a clip has one to three; six clips to learn from, four in each other split."""
    truth, mids = folder / "FSD50K.ground_truth", ["/m/a", "/m/b", "/m/c"]
    names = ["Bark", "Crack_(whip)", "Dog"]
    truth.mkdir(parents=True)
    truth.joinpath("vocabulary.csv").write_text("".join(f"{i},{names[i]},{mids[i]}\n" for i in range(3)))

    def row(half: str, number: int, *more: str) -> str:
        write_sound(folder / f"FSD50K.{half}_audio/{number}.wav", number)
        has = [index for index in range(3) if number % (index + 2) == 0] or [0]
        quoted = [",".join(of[index] for index in has) for of in (names, mids)]
        return ",".join([str(number), *(f'"{text}"' for text in quoted), *more])

    dev = [row("dev", 100 + number, "train" if number < 6 else "val") for number in range(10)]
    (truth / "dev.csv").write_text("\n".join(["fname,labels,mids,split", *dev]) + "\n")
    (truth / "eval.csv").write_text("\n".join(["fname,labels,mids", *(row("eval", n) for n in range(4))]) + "\n")
    return folder


def openmic(folder: Path, *, pickled_keys: bool = False) -> Path:
    """Three instruments; clip n is judged for n % 3 and n % 3 + 1, and has the former where n is even."""
    home = folder / "openmic-2018"
    (home / "partitions").mkdir(parents=True)
    (home / "class-map.json").write_text(json.dumps({"accordion": 0, "banjo": 1, "mallet_percussion": 2}))
    keys = [f"{number:06}_{3840 + number}" for number in range(10)]
    relevance, mask = np.full((10, 3), 0.5), np.zeros((10, 3), bool)
    for number, key in enumerate(keys):
        write_sound(home / f"audio/{key[:3]}/{key}.ogg", number)
        judged = [number % 3, (number + 1) % 3]
        mask[number, judged] = True
        relevance[number, judged] = [0.9 if number % 2 == 0 else 0.1, 0.0]
    spelled = np.array(keys, object if pickled_keys else str)
    np.savez(home / "openmic-2018.npz", X=np.zeros(1), Y_true=relevance, Y_mask=mask, sample_key=spelled)
    rows = [f"{key},banjo,0.5,3\n" for key in reversed(keys)]
    header = "sample_key,instrument,relevance,num_responses\n"
    (home / "openmic-2018-aggregated-labels.csv").write_text(header + "".join(rows))
    (home / "partitions/split01_train.csv").write_text("".join(f"{key}\n" for key in keys[:6]))
    (home / "partitions/split01_test.csv").write_text("".join(f"{key}\n" for key in keys[6:]))
    return folder


def tau_urban(folder: Path) -> Path:
    """Two scenes and three devices; four clips to learn from, two to be tested on, one in neither list."""
    home = folder / "TAU-urban-acoustic-scenes-2020-mobile-development"
    clips = [("park", "a"), ("airport", "a"), ("park", "b"), ("airport", "s1"), ("park", "s1"), ("airport", "b")]
    clips.append(("park", "s6"))
    names = [f"audio/{scene}-vienna-{number}-0-{device}.wav" for number, (scene, device) in enumerate(clips)]
    for number, name in enumerate(names):
        write_sound(home / name, number)
    (home / "evaluation_setup").mkdir()
    scenes = [scene for scene, _ in clips]
    meta = [f"{name}\t{scene}\tvienna-1\t{device}\n" for name, (scene, device) in zip(names, clips, strict=True)]
    (home / "meta.csv").write_text("filename\tscene_label\tidentifier\tsource_label\n" + "".join(meta))
    for part, chosen in (("train", slice(0, 4)), ("evaluate", slice(4, 6))):
        rows = [f"{name}\t{scene}\n" for name, scene in zip(names[chosen], scenes[chosen], strict=True)]
        (home / f"evaluation_setup/fold1_{part}.csv").write_text("filename\tscene_label\n" + "".join(rows))
    return folder
