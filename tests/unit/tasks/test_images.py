"""Pictures read from archives and folders, split, and judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paredown.errors import BadData
from paredown.tasks import image_classification as task
from paredown.types import Array


def pictures(count: int, size: int = 6, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def archive(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)
    return path


def test_an_archive_holds_both_parts(tmp_path: Path) -> None:
    x, y = pictures(30), np.arange(30) % 3
    path = archive(tmp_path / "some.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:, None])
    found = task.load(path), task.load(path, part="test")
    assert [len(one) for one in found] == [20, 10]
    np.testing.assert_array_equal(found[1].pixels, x[20:])
    np.testing.assert_array_equal(found[1].labels, y[20:])
    turned = archive(tmp_path / "turned.npz", x=x.transpose(0, 3, 1, 2), y=y)
    np.testing.assert_array_equal(task.load(turned).pixels, x)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x_train": pictures(4)}, "holds no 'y_train'"),
        ({"pictures": pictures(4)}, "holds no 'x'"),
        ({"x": pictures(4).astype(np.float32), "y": np.zeros(4, int)}, "wanted: uint8"),
        ({"x": pictures(4)[..., 0], "y": np.zeros(4, int)}, "wanted: uint8"),
        ({"x": pictures(4), "y": np.zeros(3, int)}, "holds 3"),
        ({"x": pictures(4), "y": np.array([0, 1, -1, 2])}, "negative label"),
        ({"x": pictures(0), "y": np.zeros(0, int)}, "holds no pictures"),
    ],
)
def test_what_is_wrong_with_an_archive_is_said(tmp_path: Path, arrays: dict[str, Array], said: str) -> None:
    with pytest.raises(BadData, match=said):
        task.load(archive(tmp_path / "bad.npz", **arrays))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(BadData, match="cannot be read as an NPZ"):
        task.load(tmp_path / "text.npz")
    with pytest.raises(BadData, match="there is no file"):
        task.load(tmp_path / "nowhere.npz")
    with pytest.raises(BadData, match="no folder per class"):
        task.load(tmp_path)


def test_a_damaged_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "x.npz", x=rng.integers(0, 9, (40, 8, 8, 3), dtype=np.uint8), y=np.zeros(40, int))
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    for at in range(100, 130):
        whole[at] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(whole)
    with pytest.raises(BadData, match="cannot be read as an NPZ"):
        task.load(tmp_path / "x.npz")


def test_grey_pictures_of_16_bits(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cat").mkdir()
    image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "cat" / "0.png")
    assert (task.load(tmp_path).pixels == 128).all()


def test_a_damaged_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cat").mkdir()
    image.fromarray(pictures(1, size=32)[0]).save(tmp_path / "cat" / "0.png")
    whole = bytearray((tmp_path / "cat" / "0.png").read_bytes())
    at = whole.index(b"IDAT")
    whole[at : at + 4] = b"\x00\x01\x02\x03"
    (tmp_path / "cat" / "0.png").write_bytes(whole)
    with pytest.raises(BadData, match=r"0\.png cannot be read"):
        task.load(tmp_path)


def test_a_folder_per_class(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                image.fromarray(pictures(1, size=8 + number, seed=number)[0]).save(folder / f"{number}.png")
    train, test = task.load(tmp_path), task.load(tmp_path, part="test", size=(4, 6))
    assert train.pixels.shape == (6, 8, 8, 3) and test.pixels.shape == (4, 4, 6, 3)
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(train.pixels[0], pictures(1, size=8)[0])
    (tmp_path / "train" / "cat" / "9.png").write_bytes(b"no picture")
    with pytest.raises(BadData, match=r"9\.png cannot be read"):
        task.load(tmp_path)


def test_the_middle_of_a_larger_picture_is_taken(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cat").mkdir()
    picture = pictures(1, size=32)[0]
    image.fromarray(picture).save(tmp_path / "cat" / "0.png")
    found = task.load(tmp_path, size=(24, 24), middle=0.75)
    np.testing.assert_array_equal(found.pixels[0], picture[4:28, 4:28])


def test_splits_are_disjoint_and_in_proportion() -> None:
    x, y = pictures(200), np.arange(200) % 4
    x[150:160] = x[0:10]  # ten pictures twice
    data = task.ImageData(x[:120], y[:120])
    splits = task.split(data, task.ImageData(x[120:], y[120:]))
    kinds = [
        {picture.tobytes() for picture in one.pixels} for one in (splits.calibration, splits.guardrail, splits.test)
    ]
    assert not (kinds[0] & kinds[1] or kinds[0] & kinds[2] or kinds[1] & kinds[2])
    assert len(splits.calibration) == 110 and any("10 calibration pictures dropped" in note for note in splits.notes)
    assert np.bincount(splits.guardrail.labels).tolist() == [12] * 4
    assert [len(one) for one in (task.split(data, None).calibration, task.split(data, None).guardrail)] == [72, 28]
    with pytest.raises(BadData, match="at least 8"):
        task.split(data.take(range(20)), None)
    with pytest.raises(BadData, match="two archives or two folders"):
        task.split(data, task.ImageData(x[120:], y[120:], classes=("a", "b", "c", "d")))
    with pytest.raises(BadData, match="pictures of two sizes"):
        task.split(data, task.ImageData(pictures(30, size=7), y[:30]))


def test_normalized_and_judged() -> None:
    x = pictures(3)
    found = task.normalized(x, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    expected = (x / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert found.dtype == np.float32
    logits = np.eye(8)[[0, 1, 2, 3]] * 2 + np.linspace(0, 1, 8)
    data = task.ImageData(pictures(4), np.array([0, 1, 7, 0]))
    assert task.metrics(logits, data) == {"accuracy": 0.5, "top5": 0.75}
    logits[0, 0] = np.nan
    assert task.per_example(logits, data).tolist() == [0.0, 1.0, 0.0, 0.0]
