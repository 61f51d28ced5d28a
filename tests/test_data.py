"""Readers of arrays, CIFAR and folders: what they give, and what they say of broken files."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beniful_fast import data
from beniful_fast.data import DataError, load

from .data_cases import check, encoded, pixels, write_parquet

# Preprocessing


def test_digits_are_the_real_scans() -> None:
    from sklearn.datasets import load_digits

    digits, bunch = load("digits"), load_digits()
    assert (len(digits), digits.shape) == (1797, (1, 8, 8))
    image, label, key = digits[1234]
    assert torch.equal(image[0] * 16, torch.from_numpy(bunch.images[1234]).float())
    assert (label, key) == (bunch.target[1234], "digits:1234")
    train, test = load("digits", "train"), load("digits", split="test")
    assert len(train) + len(test) == 1797
    assert test[0][2] == "digits:1197"
    assert digits[-1][2] == "digits:1796"
    with pytest.raises(IndexError):
        digits[1797]


def test_grey_to_rgb_size_mean_and_std() -> None:
    plain, made = load("digits"), load("digits", size=16, channels=3, mean=(0.5, 0.4, 0.3), std=0.25)
    assert made.shape == (3, 16, 16)
    want = torch.nn.functional.interpolate(plain[7][0][None], (16, 16), mode="bilinear", antialias=True)[0]
    assert torch.allclose(made[7][0] * 0.25 + torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), want.expand(3, -1, -1), atol=1e-6)
    with pytest.raises(DataError, match="1 channels, but mean has 3"):
        _ = load("digits", mean=(0.5, 0.4, 0.3)).shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size"),
        ({"std": 0.0}, "std"),
        ({"channels": 2}, "channels"),
        ({"mean": float("nan")}, "mean"),
        ({"on_error": "skip"}, "on_error"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("digits", **options)


def test_size_and_crop_as_torchvision_does(tmp_path: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(pixels(1, 40, 57, 3)[0])
    image.save(tmp_path / "a.png")
    for size, crop in ((32, 28), (20, 17), (64, 63)):
        recipe = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(crop), transforms.ToTensor()])
        assert torch.equal(load(tmp_path, size=size, crop=crop)[0][0], recipe(image))
    assert load(tmp_path, size=(10, 30)).shape == (3, 10, 30)
    with pytest.raises(DataError, match=r"a\.png: is 20 x 28, smaller than the crop"):
        _ = load(tmp_path, size=20, crop=24).shape


def test_modes_of_pictures(tmp_path: Path) -> None:
    grey = pixels(1, 6, 6)[0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "alpha.png")
    folder = load(tmp_path)
    want = (torch.from_numpy(grey) / 255).expand(3, 6, 6)
    for image, _, key in folder:  # type: ignore[attr-defined]
        assert torch.allclose(image, want, atol=1e-6), key
    assert load(tmp_path, channels=1).shape == (1, 6, 6)


def test_integer_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    grey = pixels(1, 6, 6)[0].astype(np.int32) * 257
    Image.fromarray(grey).save(tmp_path / "a.tiff")
    assert torch.allclose(load(tmp_path)[0][0][0], torch.from_numpy(grey) / 65535, atol=1e-6)
    for worst, message in ((70000, "to 70000, takes 8 or 16 bits"), (-1, "from -1 to")):
        grey[2, 3] = worst
        Image.fromarray(grey).save(tmp_path / "a.tiff")
        with pytest.raises(DataError, match=rf"a\.tiff: holds integer pixels .*{message}"):
            load(tmp_path)[0]


# CIFAR


def cifar_bytes(array: np.ndarray, labels: list[int], fine: bool = False) -> bytes:
    rows = array.transpose(0, 3, 1, 2).reshape(len(array), -1)
    return b"".join((bytes([0]) if fine else b"") + bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))


def test_cifar_binary(tmp_path: Path) -> None:
    array, labels = pixels(9, 32, 32, 3), [9, 1, 2, 3, 4, 5, 6, 7, 8]
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(cifar_bytes(array[:4], labels[:4]))
    (folder / "data_batch_2.bin").write_bytes(cifar_bytes(array[4:], labels[4:]))
    (folder / "test_batch.bin").write_bytes(cifar_bytes(array[:1], labels[:1]))
    check(load(tmp_path, "train"), array, labels)
    assert load(folder, "test")[0][2] == "test_batch.bin:0"
    hundred = tmp_path / "hundred"
    hundred.mkdir()
    (hundred / "train.bin").write_bytes(cifar_bytes(array, [99, *labels[1:]], fine=True))
    check(load(hundred), array, [99, *labels[1:]])
    (folder / "test_batch.bin").write_bytes(cifar_bytes(array[:1], labels[:1])[:-1])
    with pytest.raises(DataError, match=r"test_batch\.bin: 3072 bytes, takes a multiple of 3073"):
        load(folder, "test")
    (folder / "test_batch.bin").write_bytes(cifar_bytes(array[:2], [1, 77]))
    with pytest.raises(DataError, match=r"test_batch\.bin, row 1: label 77"):
        load(folder, "test")[1]


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("boom"),))


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    (tmp_path / "py").mkdir()
    for name in ("py/data_batch_1", "py/test_batch", "data.pt", "data.pkl"):
        (tmp_path / name).write_bytes(bomb)
    np.save(tmp_path / "objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", images=np.array([Bomb()], dtype=object))
    for source in ("py", "py/test_batch"):
        with pytest.raises(DataError, match="never unpickled; use the binary version"):
            load(source)
    for source in ("data.pt", "data.pkl", "objects.npy", "objects.npz"):
        with pytest.raises(DataError, match=r"never unpickled|[Oo]bject"):
            load(source)
    assert not (tmp_path / "boom").exists()


# Folders


def test_folder_of_classes_and_flat(tmp_path: Path) -> None:
    array = pixels(5, 4, 4, 3)
    names = ["b/x.png", "a/deep/y.PNG", "a/z.png", "c/n.bmp", "flat.png"]
    for name, image in zip(names, array, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "a/.hidden.png").write_text("no image")
    folder = load(tmp_path)
    order = [4, 2, 1, 0, 3]  # by name; files before folders
    check(folder, array[order], [-1, 0, 0, 1, 2])
    assert [folder.key(i) for i in range(5)] == [names[i] for i in order]
    assert folder.classes == ["a", "b", "c"]
    check(load(tmp_path / "b"), array[:1], [-1])
    (tmp_path / "b/x.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"x\.png: no image"):
        folder[3]


def test_folder_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(pixels(1, 4, 4, 3)[0]).save(tmp_path / split / "cat/a.png")
    assert load(tmp_path, "validation")[0][1:] == (0, "cat/a.png")
    with pytest.raises(DataError, match="holds the splits train, val; name one"):
        load(tmp_path)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(1, 4, 4, 3)[0]).save(path)


def test_a_split_is_not_taken_for_a_class(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / "train" / name / "a.png")
    (tmp_path / "docs").mkdir()
    alone = load(tmp_path)
    assert (alone.classes, alone.labels().tolist(), alone.key(1)) == (["cat", "dog"], [0, 1], "dog/a.png")
    picture(tmp_path / "Testing/cat/a.png")
    with pytest.raises(DataError, match="holds the splits test, train; name one"):
        load(tmp_path)
    picture(tmp_path / "extra/cat/a.png")
    with pytest.raises(DataError, match="holds the splits test, train beside extra; name a split"):
        load(tmp_path)
    assert load(tmp_path, "train").classes == ["cat", "dog"]
    assert load(tmp_path, "extra").classes == ["cat"]
    picture(tmp_path / "test/cat/a.png")
    with pytest.raises(DataError, match="Testing and test are one split; load the folder you mean"):
        load(tmp_path, "test")


def test_images_beside_a_split_are_not_left_out_unsaid(tmp_path: Path) -> None:
    picture(tmp_path / "train/cat/a.png")
    picture(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"holds the splits train beside loose\.png; name a split"):
        load(tmp_path)
    assert load(tmp_path, "train").classes == ["cat"]


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    for name in ("cat", "test"):
        picture(tmp_path / name / "a.png")
    (tmp_path / "test/.cache").mkdir()
    picture(tmp_path / "test/.cache/a.png")
    assert load(tmp_path).classes == ["cat", "test"]


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"a folder without images .1 other files"):
        load(tmp_path)


def test_a_single_file_has_no_splits(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pixels(2, 4, 4, 3))
    write_parquet(tmp_path / "a.parquet", [encoded(pixels(1, 4, 4, 3)[0])])
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    for name in ("images.npy", "a.parquet", "test_batch.bin"):
        load(tmp_path / name)
        with pytest.raises(DataError, match="a single file has no splits"):
            load(tmp_path / name, "test")
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one/images.npy", pixels(2, 4, 4, 3))
    with pytest.raises(DataError, match="a single file has no splits"):
        load(tmp_path / "one", "test")


# Arrays


def test_arrays(tmp_path: Path) -> None:
    array, labels = pixels(6, 5, 5, 3), [3, 1, 2, 0, 5, 4]
    np.save(tmp_path / "images.npy", array)
    np.save(tmp_path / "labels.npy", np.array(labels))
    check(load(tmp_path), array, labels)
    np.savez(tmp_path / "a.npz", test_images=array.transpose(0, 3, 1, 2) / np.float32(255), test_labels=np.array(labels)[:, None])
    check(load(tmp_path / "a.npz", "test"), array, labels)
    with pytest.raises(DataError, match="holds the arrays test_images, test_labels, none of images"):
        load(tmp_path / "a.npz")
    assert load(torch.rand(2, 9, 9)).shape == (1, 9, 9)
    check(data.ArrayImages(torch.from_numpy(array), labels, list("abcdef")), array, labels)


def test_an_array_has_no_splits() -> None:
    for array in (pixels(2, 4, 4), torch.rand(2, 4, 4)):
        assert len(load(array, None)) == 2
        with pytest.raises(DataError, match="split: got 'test', but an array has no splits"):
            load(array, "test")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 5)), "shape"),
        (np.zeros((2, 3, 8, 1)), "channels first or last"),
        (np.zeros((0, 3, 8, 8)), "0 images"),
        (np.zeros((2, 3, 8, 8), dtype=complex), "complex"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(array)


def test_pixels_out_of_range_name_the_row(tmp_path: Path) -> None:
    array = np.full((3, 1, 4, 4), 0.5, dtype=np.float32)
    array[2, 0, 1, 1] = 255
    np.save(tmp_path / "a.npy", array)
    dataset = load(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy, row 2: pixels from 0\.5 to 255\.0, takes \[0, 1\]"):
        dataset[2]
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:100])
    with pytest.raises(DataError, match=r"a\.npy: no readable NumPy file"):
        load(tmp_path / "a.npy")


# Where data sets are found


def test_names_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENIFUL_DATA", raising=False)
    with pytest.raises(DataError, match=r"BENIFUL_DATA.*is not set"):
        load("flowers")
    monkeypatch.setenv("BENIFUL_DATA", str(tmp_path))
    (tmp_path / "flowers").mkdir()
    np.save(tmp_path / "flowers/images.npy", pixels(2, 4, 4))
    assert len(load("flowers")) == 2
    with pytest.raises(DataError, match="it holds flowers"):
        load("flower")
    with pytest.raises(DataError, match="no such file"):
        load("./flowers")


def test_fingerprint_follows_the_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(2, 4, 4))
    first = load(tmp_path / "a.npy").fingerprint()
    assert load(tmp_path / "a.npy").fingerprint() == first
    assert load(tmp_path / "a.npy", mean=0.5).fingerprint() != first
    np.save(tmp_path / "a.npy", pixels(3, 4, 4))
    assert load(tmp_path / "a.npy").fingerprint() != first
    assert load(np.zeros((2, 4, 4))).fingerprint() != load(np.ones((2, 4, 4))).fingerprint()


@pytest.mark.parametrize(("module", "extra"), [("pyarrow", "cli"), ("PIL", "cli"), ("sklearn", "report")])
def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(pixels(1, 4, 4, 3)[0])])
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{module} is not installed: pip install "beniful_fast\[{extra}\]"'):
        load("digits" if module == "sklearn" else tmp_path / "a.parquet")[0]


@pytest.mark.data
def test_real_cifar10_and_tiny_imagenet(data_folder: Path) -> None:
    test = load(data_folder / "cifar10", "test")
    assert (len(test), test.shape, test.classes[0] if test.classes else None) == (10000, (3, 32, 32), "airplane")
    assert test.labels().bincount().tolist() == [1000] * 10
    mean = torch.stack([test[i][0] for i in range(0, 10000, 20)]).mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor([0.494, 0.485, 0.450]), atol=0.02)  # the published mean of CIFAR-10
    tiny = load(data_folder / "tiny-imagenet-20", "val", size=32)
    assert {tuple(tiny[i][0].shape) for i in range(1000)} == {(3, 32, 32)}  # some are greyscale


def test_links_are_followed_once_and_one_that_leads_nowhere_is_a_row(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    for folder, names in ((elsewhere, "ab"), (root / "sub", "c")):
        folder.mkdir(parents=True)
        for name in names:
            Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    (root / "sub" / "nested").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere)
    found = load(root)
    assert [found.key(i) for i in range(len(found))] == ["sub/c.png", "sub/nested/a.png", "sub/nested/b.png"]
    (root / "sub" / "gone.png").symlink_to(tmp_path / "nowhere")
    found = load(root, on_error="nan")
    before = found.fingerprint()
    assert len(found) == 4 and bool(found[1][0].isnan().all())
    Image.new("RGB", (4, 4)).save(tmp_path / "nowhere", "png")
    assert load(root, on_error="nan").fingerprint() != before
