"""Sorting pictures into classes: outputs are logits [N, C], labels are class indices [N].

Legend: N pictures, H x W pixels, C classes.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paredown.errors import BadData, MissingExtra
from paredown.types import Array

NAME = "image-classification"
BLEND = 0.7  # of a picture, the rest of another
METRIC = "accuracy"
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm")
PARTS = {"train": ("train",), "test": ("test", "val", "validation")}  # folders that hold a part, by its name
SMALLEST_SPLIT = 8


@dataclass(frozen=True)
class ImageData:
    """Pictures uint8 [N, H, W, 3] with their labels; `classes` are the names of the labels, where they have any."""

    pixels: Array
    labels: Array
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Sequence[int] | Array) -> ImageData:
        return ImageData(self.pixels[indices], self.labels[indices], self.classes, self.notes)


@dataclass(frozen=True)
class ImageSplits:
    """Disjoint pictures to calibrate and learn from, to decide on, and to report on."""

    calibration: ImageData
    guardrail: ImageData
    test: ImageData
    notes: tuple[str, ...] = ()


def load(
    path: str | Path, *, part: str = "train", size: tuple[int, int] | None = None, middle: float = 1.0
) -> ImageData:
    """The pictures of an NPZ archive (`x_train y_train x_test y_test`, or `x y`), or of a folder with one per class.

    `part` is "train" or "test"; a folder may hold both (`train/`, `test/` or `val/`), else all of it is meant. Pictures
    of a folder are scaled and cropped in their middle to `size` (height, width), or to that of the first one, so that
    the `middle` of their shorter side is left; those of an archive are as they are. Raises BadData that names what is
    wrong, MissingExtra where Pillow is needed.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place, part, size, middle)
    if not place.is_file():
        raise BadData(f"there is no file or folder {place}")
    return _archive(place, part, size)


def _archive(path: Path, part: str, size: tuple[int, int] | None) -> ImageData:
    if path.is_file() and not zipfile.is_zipfile(path):  # numpy would take it for a pickle
        raise BadData(f"{path} cannot be read as an NPZ archive: it is another kind of file, or cut short.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [f"{letter}_{part}" for letter in "xy"]
            names = names if names[0] in archive.files else ["x", "y"]
            missing = [name for name in names if name not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise BadData(f"{path} holds no {missing[0]!r}: it has {found}; x_{part} and y_{part} are wanted.")
            pixels, labels = archive[names[0]], archive[names[1]]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadData(f"{path} cannot be read as an NPZ archive: {error}") from None
    if pixels.ndim == 4 and pixels.shape[-1] != 3 and pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise BadData(
            f"{path}: {names[0]} is {pixels.dtype} {list(pixels.shape)}; wanted: uint8 pictures [N, height, width, 3]"
        )
    labels = labels.reshape(-1)
    if len(labels) != len(pixels) or not np.issubdtype(labels.dtype, np.integer):
        raise BadData(
            f"{path}: {names[1]} holds {len(labels)} {labels.dtype} for {len(pixels)} pictures; an integer for each is "
            "wanted."
        )
    if not len(pixels):
        raise BadData(f"{path} holds no pictures in {names[0]}.")
    if labels.min() < 0:
        raise BadData(f"{path}: {names[1]} has the negative label {labels.min()}.")
    if size is not None and pixels.shape[1:3] != size:
        raise BadData(f"{path}: the pictures are {pixels.shape[1:3]}, and the network takes {size}.")
    return ImageData(pixels, labels.astype(np.int64))


def _folder(place: Path, part: str, size: tuple[int, int] | None, middle: float) -> ImageData:
    inside = next((place / name for name in PARTS[part] if (place / name).is_dir()), place)
    folders = sorted(path for path in inside.iterdir() if path.is_dir() and not path.name.startswith("."))
    listed = [(number, file) for number, folder in enumerate(folders) for file in _pictures(folder)]
    if not listed:
        raise BadData(f"{inside} holds no folder per class with pictures in it ({', '.join(ENDINGS)}).")
    opened = _opener((1 - middle) / 2)
    pixels, notes = [], []
    for _, file in listed:
        picture = opened(file, size)
        size = picture.shape[:2]
        pixels.append(picture)
    empty = [folder.name for folder in folders if not any(_pictures(folder))]
    if empty:
        notes.append(f"{inside}: {len(empty)} classes have no pictures, {empty[0]!r} among them.")
    labels = np.array([number for number, _ in listed], dtype=np.int64)
    return ImageData(np.stack(pixels), labels, tuple(folder.name for folder in folders), tuple(notes))


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)


def _opener(border: float) -> Any:
    """What opens a picture at a size, without `border` of it at each edge. Raises MissingExtra."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtra("pillow", "images") from None

    def opened(file: Path, size: tuple[int, int] | None) -> Array:
        try:
            with Image.open(file) as picture:
                plain = _eight_bits(picture).convert("RGB")
                if size is not None:
                    plain = ImageOps.fit(plain, (size[1], size[0]), Image.Resampling.BILINEAR, bleed=border)
                return np.asarray(plain)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadData(f"{file} cannot be read as a picture: {error}") from None

    return opened


def _eight_bits(picture: Any) -> Any:
    """A grey picture of 16 bits in its upper eight; Pillow alone would make all above 255 white."""
    return picture.point(lambda value: value / 256).convert("L") if picture.mode.startswith("I") else picture


def split(data: ImageData, evaluation: ImageData | None, *, seed: int = 0, guardrail_share: float = 0.6) -> ImageSplits:
    """Calibration from `data`, guardrail and test from `evaluation`, drawn at random with labels in proportion.

    Without `evaluation`, 60 % of `data` calibrates and the rest is cut. A picture that occurs twice never lies in two
    splits. Raises BadData if a split keeps fewer than 8 pictures.
    """
    rng = np.random.default_rng(seed)
    if evaluation is None:
        first, rest = _shared_out(data.labels, 0.6, rng)
        data, evaluation = data.take(first), data.take(rest)
    elif bool(evaluation.classes) != bool(data.classes):
        raise BadData("training and evaluation pictures are two archives or two folders, whose classes have names")
    elif evaluation.classes != data.classes:
        strange = sorted(set(evaluation.classes) ^ set(data.classes))[0]
        raise BadData(f"the class {strange!r} is in one of training and evaluation pictures only")
    if evaluation.pixels.shape[1:] != data.pixels.shape[1:]:
        raise BadData(f"pictures of two sizes: {data.pixels.shape[1:3]} and {evaluation.pixels.shape[1:3]}")
    inside, outside = _shared_out(evaluation.labels, guardrail_share, rng)
    guardrail, test = evaluation.take(inside), evaluation.take(outside)
    notes = [*data.notes, *evaluation.notes]
    held = set(_digests(guardrail))
    test = _without(test, held, "test", notes)
    calibration = _without(data, held | set(_digests(test)), "calibration", notes)
    for name, one in (("calibration", calibration), ("guardrail", guardrail), ("test", test)):
        if len(one) < SMALLEST_SPLIT:
            raise BadData(f"The {name} split would hold {len(one)} pictures; at least {SMALLEST_SPLIT} are needed.")
    return ImageSplits(calibration, guardrail, test, tuple(dict.fromkeys(notes)))


def _shared_out(labels: Array, share: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Indices of `share` of the pictures and of the rest; each label in the same proportion."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    chosen = np.diff(np.floor(np.arange(len(labels) + 1) * share + 1e-9)) > 0
    return rng.permutation(order[chosen]), rng.permutation(order[~chosen])


def _digests(data: ImageData) -> list[bytes]:
    return [hashlib.blake2b(picture.tobytes(), digest_size=16).digest() for picture in data.pixels]


def _without(data: ImageData, held: set[bytes], name: str, notes: list[str]) -> ImageData:
    kept = [i for i, digest in enumerate(_digests(data)) if digest not in held]
    if len(kept) < len(data):
        notes.append(f"{len(data) - len(kept)} {name} pictures dropped: they are in another split too.")
    return data.take(kept)


def normalized(pixels: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """float32 [N, 3, H, W]: (pixels / 255 - mean) / std, for uint8 pixels [N, H, W, 3]."""
    scale = 1 / (255 * np.asarray(std, dtype=np.float32))
    shift = np.asarray(mean, dtype=np.float32) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray((pixels * scale - shift).astype(np.float32, copy=False).transpose(0, 3, 1, 2))


def blended(x: Array) -> Array:
    """Each of the pictures [N, 3, H, W] with the next one in it, seven parts to three.

    A network is surer of the pictures that it was trained on than of new ones, and changes to it look harmless on them.
    On blended pictures the divergence of 34 changes of cifar10-resnet20 was that on test pictures within a sixth.
    """
    mixed: Array = (BLEND * x + (1 - BLEND) * np.roll(x, 1, axis=0)).astype(x.dtype, copy=False)
    return mixed


def metric_name(data: ImageData) -> str:
    """The metric that the gate looks at: "accuracy", of the first answer."""
    return METRIC


def metrics(outputs: Array, data: ImageData, reference: Array | None = None) -> dict[str, float]:
    """`accuracy`, and `top5` where there are more than five classes."""
    found = {"accuracy": float(per_example(outputs, data).mean())}
    if outputs.shape[1] > 5:
        best = np.argpartition(outputs, -5, axis=1)[:, -5:]
        found["top5"] = float((best == data.labels[:, None]).any(axis=1).mean())
    return found


def per_example(outputs: Array, data: ImageData, reference: Array | None = None) -> Array:
    """1.0 for a right answer, 0.0 for a wrong one [N]; logits that are not finite are wrong."""
    right = (np.argmax(outputs, axis=1) == data.labels) & np.isfinite(outputs).all(axis=1)
    result: Array = right.astype(np.float64)
    return result
