"""Sets of images: formats, checksums, splits, mirroring, and the user's own pictures."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat

from cnf_lab.data import images
from cnf_lab.data.download import RemoteFile
from cnf_lab.data.image_folder import ImageFolder, _is_size, read_picture
from cnf_lab.data.images import Cifar10, Digits, FashionMnist, Mnist, Svhn, read_images
from cnf_lab.errors import ConfigError, DataError
from cnf_lab.training.command import config_folder

CLOSED = "http://127.0.0.1:9/"


def md5(content):
    return hashlib.md5(content).hexdigest()


def options(**changed):
    return {"name": "set", "batch_size": 4, "evaluation_batch_size": 8, "val_images": 3, **changed}


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


def place(root, remote, content):
    path = root / remote.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return RemoteFile(remote.path, (CLOSED,), f"md5:{md5(content)}")


@pytest.fixture(params=[Mnist, FashionMnist])
def mnist_like(request, tmp_path, monkeypatch):
    """Twelve training and five test images of the true format, small ones."""
    rng, kind = np.random.default_rng(0), request.param
    arrays = [rng.integers(0, 256, (12, 28, 28)), rng.integers(0, 10, 12)]
    arrays += [rng.integers(0, 256, (5, 28, 28)), rng.integers(0, 10, 5)]
    files = [place(tmp_path, file, idx(a.astype(np.uint8))) for file, a in zip(kind.files, arrays, strict=True)]
    monkeypatch.setattr(kind, "files", tuple(files))
    return kind, tmp_path, arrays


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The archive of CIFAR-10 with three images in each batch, and its checksums."""
    from torchvision.datasets import CIFAR10

    rng, members, pixels = np.random.default_rng(0), {}, []
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels.append(rng.integers(0, 256, (3, 3072), dtype=np.uint8))
        members[name] = pickle.dumps({"data": pixels[-1], "labels": [0, 1, 2]})
    members["batches.meta"] = pickle.dumps({"label_names": list("abc")})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(Cifar10, "archive", place(tmp_path, Cifar10.archive, packed.getvalue()))
    sums = {name: md5(content) for name, content in members.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in list(members)[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return tmp_path, pixels


def all_images(data, split):
    rows = data.split(split)
    return rows.__getitems__(range(len(rows))).x


# -- published sets -------------------------------------------------------------------------------


def test_mnist_and_its_like(mnist_like):
    kind, root, (train, _, test, _) = mnist_like
    data = kind(root=str(root), **options())
    data.setup()
    assert data.event_shape == (1, 28, 28)
    assert data.levels == 256
    assert [len(rows) for rows in data.splits] == [9, 3, 5]
    assert torch.equal(all_images(data, "test"), torch.from_numpy(test[:, None]).float())
    both = torch.cat([all_images(data, "train"), all_images(data, "val")])
    assert sorted(both.flatten(1).sum(1).tolist()) == sorted(train.reshape(12, -1).sum(1).tolist())
    assert not data.notes


def test_a_folder_that_may_only_be_read(mnist_like):
    kind, root, _ = mnist_like
    before = sorted(path for path in root.rglob("*") if not path.name.startswith("."))
    kind(root=str(root), **options()).setup()
    assert sorted(path for path in root.rglob("*") if not path.name.startswith(".")) == before


def test_a_damaged_file_is_refused_before_it_is_read(mnist_like):
    kind, root, _ = mnist_like
    (root / kind.files[0].path).write_bytes(b"tampered")
    with pytest.raises(DataError, match="is damaged or another one"):
        kind(root=str(root), **options()).setup()


def test_a_missing_file_names_folder_address_and_checksum(mnist_like, tmp_path):
    kind, _, _ = mnist_like
    with pytest.raises(DataError) as caught:
        kind(root=str(tmp_path / "empty"), **options(download=False)).setup()
    for part in ("train-images-idx3-ubyte.gz", "md5:", str(tmp_path / "empty"), CLOSED, "dataset.download=true"):
        assert part in str(caught.value)


def test_cifar10(cifar):
    root, pixels = cifar
    data = Cifar10(root=str(root), **options(flip=False))
    data.setup()
    assert data.event_shape == (3, 32, 32)
    assert [len(rows) for rows in data.splits] == [12, 3, 3]
    assert torch.equal(all_images(data, "test"), torch.from_numpy(pixels[-1]).reshape(-1, 3, 32, 32).float())


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def test_a_tampered_batch_of_cifar10_is_never_unpickled(cifar, monkeypatch, tmp_path):
    root, _ = cifar
    monkeypatch.chdir(tmp_path)
    Cifar10(root=str(root), **options()).setup()
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="with their published checksums"):
        Cifar10(root=str(root), **options()).setup()
    (root / Cifar10.archive.path).write_bytes(pickle.dumps(Bomb()))
    (root / "cifar-10-batches-py").rename(root / "away")
    with pytest.raises(DataError, match="is damaged or another one"):
        Cifar10(root=str(root), **options()).setup()
    assert not (tmp_path / "exploded").exists()


def test_a_part_of_cifar10(tmp_path):
    (tmp_path / "cifar10").mkdir()
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "cifar10" / "part.npz", x=x, row=np.arange(40))
    data = Cifar10(root=str(tmp_path), **options(allow_partial=True, val_images=5))
    data.setup()
    assert [len(rows) for rows in data.splits] == [31, 5, 4]
    assert "40 of 50,000 training images" in data.notes[0]
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        Cifar10(root=str(tmp_path), **options(download=False)).setup()
    np.savez(tmp_path / "cifar10" / "part.npz", y=x)
    with pytest.raises(DataError, match="Expected images named x"):
        Cifar10(root=str(tmp_path), **options(allow_partial=True)).setup()


def test_svhn(tmp_path, monkeypatch):
    from torchvision.datasets import SVHN

    rng, files, sums = np.random.default_rng(0), [], {}
    for file, split in zip(Svhn.files, ("train", "test"), strict=True):
        packed = io.BytesIO()
        pixels = rng.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
        savemat(packed, {"X": pixels, "y": np.ones((6, 1), dtype=np.uint8)})
        files.append(place(tmp_path, file, packed.getvalue()))
        sums[split] = ["", Path(file.path).name, md5(packed.getvalue())]
    monkeypatch.setattr(Svhn, "files", tuple(files))
    monkeypatch.setattr(SVHN, "split_list", sums)
    data = Svhn(root=str(tmp_path), **options())
    data.setup()
    assert data.event_shape == (3, 32, 32)
    assert torch.equal(all_images(data, "test"), torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()).float())


def test_a_torchvision_that_does_not_fit(monkeypatch):
    def broken(name, *args, **kwargs):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **kwargs)

    original = __import__
    monkeypatch.setattr("builtins.__import__", broken)
    with pytest.raises(ConfigError, match="a torchvision that fits torch .*nms does not exist.*make setup"):
        images.torchvision_datasets()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_real_mnist(split):
    import os

    root = os.environ.get("CNF_LAB_DATA")
    if root is None or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("CNF_LAB_DATA names no folder with MNIST")
    data = Mnist(root=root, **options(val_images=10000, download=False))
    data.setup()
    assert len(data.split(split)) == {"train": 50000, "val": 10000, "test": 10000}[split]
    mean = all_images(data, split).mean().item() / 255
    assert mean == pytest.approx(0.1307, abs=0.002)  # of the training images, widely known


# -- splits, limits and mirroring -----------------------------------------------------------------


def test_digits_and_their_splits():
    splits = {}
    for seed in (0, 1):
        data = Digits(**options(val_images=180, test_images=180, seed=seed))
        data.setup()
        splits[seed] = [all_images(data, name) for name in ("train", "val", "test")]
    assert [len(rows) for rows in splits[0]] == [1437, 180, 180]
    assert all(torch.equal(a, b) for a, b in zip(splits[0], splits[1], strict=True))
    assert data.event_shape == (1, 8, 8)
    assert data.levels == 17
    every = torch.cat(splits[0])
    assert every.min() == 0
    assert every.max() == 16
    assert torch.equal(every, every.round())
    other = Digits(**options(val_images=180, test_images=180, split_seed=1))
    assert not torch.equal(all_images(other, "val"), splits[0][1])


def test_limits_are_taken_from_the_same_images_and_said():
    whole = Digits(**options(val_images=180, test_images=180))
    part = Digits(**options(val_images=180, test_images=180, limit=100, val_limit=20, test_limit=1000))
    part.setup()
    assert torch.equal(all_images(part, "train"), all_images(whole, "train")[:100])
    assert torch.equal(all_images(part, "val"), all_images(whole, "val")[:20])
    assert len(part.split("test")) == 180
    assert [note.split(" images")[0] for note in part.notes] == ["set: 100 of 1,437 train", "set: 20 of 180 val"] or [
        note.split(" images")[0] for note in part.notes
    ] == ["set: 20 of 180 val", "set: 100 of 1,437 train"]


def test_mirroring_is_random_reproducible_and_only_in_training():
    plain = Digits(**options(val_images=180, test_images=180))
    data = Digits(**options(val_images=180, test_images=180, flip=True))
    indices = list(range(1000))
    x, mirrored = (d.split("train").__getitems__(indices).x for d in (plain, data))
    flipped = (mirrored != x).flatten(1).any(1)
    assert torch.equal(mirrored, torch.where(flipped.reshape(-1, 1, 1, 1), x.flip(-1), x))
    assert 400 < int(flipped.sum()) < 600
    assert torch.equal(data.split("train").__getitems__(indices).x, mirrored)
    backwards = data.split("train").__getitems__(indices[::-1]).x.flip(0)
    assert not torch.equal(backwards, mirrored)
    for split in ("val", "test"):
        assert torch.equal(all_images(data, split), all_images(plain, split))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"val_images": 0}, r"dataset\.val_images of 1 to"),
        ({"val_images": 2000}, r"dataset\.val_images of 1 to"),
        ({"test_images": 1.0}, r"dataset\.test_images of 1 to"),
        ({"limit": 0}, r"dataset\.limit of at least 1"),
        ({"val_limit": -1}, r"dataset\.val_limit of at least 1"),
    ],
)
def test_numbers_out_of_range(changed, said):
    with pytest.raises(ConfigError, match=said):
        Digits(**options(**changed)).setup()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "svhn", "digits", "image_folder"])
def test_yaml_says_the_levels_of_its_set(name):
    config = OmegaConf.load(config_folder() / "dataset" / f"{name}.yaml")
    assert config.recipe.levels == (17 if name == "digits" else 256)


# -- the user's own pictures ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(tmp_path / f"{number:02d}.png")
    return tmp_path


def own(path, **changed):
    data = ImageFolder(path=str(path), **options(**{"val_images": 2, "test_images": 2, **changed}))
    data.setup()
    return data


def test_a_folder_of_pictures(folder):
    data = own(folder)
    assert data.event_shape == (3, 6, 8)
    assert [len(rows) for rows in data.splits] == [8, 2, 2]
    every = torch.cat([all_images(data, split) for split in ("train", "val", "test")])
    expected = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in sorted(folder.glob("*.png"))])
    assert sorted(every.flatten(1).sum(1).tolist()) == sorted(expected.double().flatten(1).sum(1).tolist())


def test_pictures_are_cut_and_resized(folder):
    (folder / "inner").mkdir()
    Image.new("L", (50, 20), 77).save(folder / "inner" / "gray.jpg")
    data = own(folder, size=[4, 4], channels=1)
    assert data.event_shape == (1, 4, 4)
    assert sum(len(rows) for rows in data.splits) == 13
    every = torch.cat([all_images(data, split) for split in ("train", "val", "test")])
    assert (every == 77).flatten(1).all(1).any()


def spoil(folder, kind):
    path = folder / "05.png"
    if kind == "broken":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "no-picture":
        path.write_text("hello")
    elif kind == "size":
        Image.new("RGB", (5, 6)).save(path)
    elif kind == "gray":
        Image.new("L", (8, 6)).save(path)
    elif kind == "deep":
        Image.fromarray(np.full((6, 8), 40000, dtype=np.uint16)).save(path)
    elif kind == "transparent":
        Image.new("RGBA", (8, 6), (1, 2, 3, 100)).save(path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("broken", r"Expected a picture of 8 bits per channel at .*05\.png, got .* Replace or remove it\."),
        ("no-picture", r"05\.png, got cannot identify image file"),
        ("size", r"of one size, got .*05\.png of 6x5 and .*00\.png of 6x8.*dataset\.size=\[32,32\]"),
        ("gray", r"05\.png gray and .*00\.png in colour.*dataset\.channels=1 or dataset\.channels=3"),
        ("deep", r"one of mode I;16\. Convert it to 8 bits"),
        ("transparent", r"one with transparent pixels"),
    ],
)
def test_pictures_that_will_not_do(folder, kind, said):
    spoil(folder, kind)
    with pytest.raises(DataError, match=said) as caught:
        own(folder)
    assert "\n" not in str(caught.value)


def test_opaque_alpha_and_palettes_are_fine(folder):
    Image.new("RGBA", (8, 6), (1, 2, 3, 255)).save(folder / "05.png")
    Image.new("P", (8, 6), 3).save(folder / "06.png")
    assert own(folder).event_shape == (3, 6, 8)


def test_pictures_are_read_the_way_a_camera_was_held(folder):
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    note = Image.Exif()
    note[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "held.png", exif=note)
    np.testing.assert_array_equal(read_picture(folder / "held.png", None, None)[0], np.asarray(upright))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"channels": 2}, r"dataset\.channels of 1, 3 or null, got 2"),
        ({"size": [4]}, r"dataset\.size of a height and a width"),
        ({"size": [0, 4]}, r"dataset\.size of a height and a width"),
    ],
)
def test_options_of_a_folder(folder, changed, said):
    with pytest.raises(ConfigError, match=said):
        own(folder, **changed)


@pytest.mark.parametrize(
    ("size", "fits"), [([32, 40], True), ((8, 8), True), (32, False), ([32.5, 32], False), ([1, 2, 3], False)]
)
def test_sizes_are_two_whole_numbers(size, fits):
    assert _is_size(size) == fits


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a folder of pictures, got .*none\. Type dataset\.path=<folder>"):
        own(tmp_path / "none")
    with pytest.raises(DataError, match=r"at least 3 pictures \(\.png, .* got 0"):
        own(tmp_path)


# -- files of images to evaluate ------------------------------------------------------------------


def test_read_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 17, (5, 1, 8, 8))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "flat.npy", x.reshape(5, 64).astype(np.float32))
    np.savez(tmp_path / "several.npz", other=x[:1], wanted=x)
    for name, key in (("x.npy", None), ("flat.npy", None), ("several.npz", "wanted")):
        rows = read_images(str(tmp_path / name), (1, 8, 8), 17, key)
        assert torch.equal(rows.__getitems__(range(5)).x, torch.from_numpy(x).float())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 1, 4, 4)), r"of shape \(images, 1, 8, 8\)"),
        (np.full((3, 1, 8, 8), 17), r"whole numbers from 0 to 16 .* got 17 to 17"),
        (np.full((3, 1, 8, 8), 0.5), r"whole numbers from 0 to 16"),
        (np.full((3, 1, 8, 8), np.nan), r"whole numbers from 0 to 16"),
        (np.zeros((0, 1, 8, 8)), r"got 0 images"),
        (np.zeros((3, 1, 8, 8), dtype="U1"), r"whole numbers"),
    ],
)
def test_files_that_hold_no_images(tmp_path, array, said):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=said):
        read_images(str(tmp_path / "x.npy"), (1, 8, 8), 17)


@pytest.mark.parametrize("damage", ["cut", "empty", "none"])
def test_damaged_archives_end_in_one_line(tmp_path, damage):
    path = tmp_path / "images.npz"
    np.savez(path, **({} if damage == "none" else {"x": np.zeros((5, 1, 8, 8), dtype=np.uint8)}))
    if damage != "none":
        path.write_bytes(path.read_bytes()[: 100 if damage == "cut" else 0])
    with pytest.raises(DataError, match=r"Expected images in .*, got .*images\.npz \(.+\)\. Type") as caught:
        read_images(str(path), (1, 8, 8), 256)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.npy").write_text("hello")
    for name in ("x.npy", "none.npy"):
        with pytest.raises(DataError, match=r"Expected images in a \.npy or \.npz file"):
            read_images(str(tmp_path / name), (1, 8, 8), 17)
