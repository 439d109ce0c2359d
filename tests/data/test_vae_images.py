"""The sets of variational autoencoders: formats, splits, binarisation, and files that must not be trusted."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from cnf_lab.data.base import ArrayRows
from cnf_lab.data.download import RemoteFile
from cnf_lab.data.vae_images import BinarisedRows, BinaryMnist, Caltech101Silhouettes, FreyFaces, Omniglot
from cnf_lab.errors import ConfigError, DataError

CLOSED = "http://127.0.0.1:9/"


def options(root, **changed):
    return {"name": "set", "root": str(root), "batch_size": 4, "evaluation_batch_size": 8, **changed}


def place(root, remote, content):
    path = root / remote.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return RemoteFile(remote.path, (CLOSED,), f"md5:{hashlib.md5(content).hexdigest()}")


def placed_matrices(root, remote, **matrices):
    path = root / remote.path
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, matrices)
    return place(root, remote, path.read_bytes())


def all_images(data, split):
    rows = data.split(split)
    return rows.__getitems__(range(len(rows))).x


def as_set(images):
    return sorted(map(bytes, images.flatten(1).numpy().astype(np.uint8)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def idx_files(tmp_path, monkeypatch, rng):
    pixels = rng.integers(0, 256, (24, 28, 28), dtype=np.uint8)
    pixels[:, 0] = 0  # never ink
    pixels[:, 1] = 255  # always
    arrays = [pixels[:18], np.zeros(18, np.uint8), pixels[18:], np.zeros(6, np.uint8)]

    def idx(array):
        return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())

    files = [place(tmp_path, file, idx(array)) for file, array in zip(BinaryMnist.gray, arrays, strict=True)]
    monkeypatch.setattr(BinaryMnist, "gray", tuple(files))
    return tmp_path


def amat(images):
    return "\n".join(" ".join(map(str, row)) for row in images.reshape(len(images), -1)).encode() + b"\n"


def test_static_mnist_is_read_as_published(tmp_path, monkeypatch, rng):
    images = [rng.integers(0, 2, (count, 784)) for count in (5, 3, 4)]
    monkeypatch.setattr(BinaryMnist, "rows", (5, 3, 4))
    for file, part in zip(BinaryMnist.published, images, strict=True):
        place(tmp_path, file, amat(part))
    data = BinaryMnist(**options(tmp_path))
    for split, part in zip(("train", "val", "test"), images, strict=True):
        assert torch.equal(all_images(data, split).flatten(1), torch.from_numpy(part).float())
    assert (data.event_shape, data.levels, data.notes) == ((1, 28, 28), 2, [])


@pytest.mark.parametrize("damage", [lambda t: t[:-10], lambda t: t.replace(b"1", b"2", 1), lambda t: b""])
def test_static_mnist_of_other_content_is_refused(tmp_path, monkeypatch, rng, damage):
    monkeypatch.setattr(BinaryMnist, "rows", (3, 3, 3))
    for file in BinaryMnist.published:
        place(tmp_path, file, damage(amat(rng.integers(0, 2, (3, 784)))))
    with pytest.raises(DataError, match="Expected 3 lines of 784 zeros and ones"):
        BinaryMnist(**options(tmp_path)).setup()


def test_static_mnist_that_cannot_be_had_names_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"binarized_mnist_train\.amat.*Or type dataset\.binarisation=seeded"):
        BinaryMnist(**options(tmp_path, download=False)).setup()


def test_seeded_mnist_is_the_same_for_every_run(idx_files):
    first = BinaryMnist(**options(idx_files, binarisation="seeded", seed=1))
    again = BinaryMnist(**options(idx_files, binarisation="seeded", seed=2))
    other = BinaryMnist(**options(idx_files, binarisation="seeded", split_seed=1))
    assert [len(rows) for rows in first.splits] == [15, 3, 6]
    for split in ("train", "val", "test"):
        images = all_images(first, split)
        assert torch.equal(images, all_images(again, split))
        assert not torch.equal(images, all_images(other, split))
        assert set(images.unique().tolist()) == {0, 1}
        assert not images[:, :, 0].any()
        assert images[:, :, 1].all()
    assert any("binarised by seed 777" in note for note in first.notes)


def test_dynamic_mnist_draws_training_images_anew_and_holds_the_others(idx_files):
    data = BinaryMnist(**options(idx_files, binarisation="dynamic"))
    rows = data.splits.train
    one, other = rows.__getitems__([0, 1, 2]).x, rows.__getitems__([0, 1, 3]).x
    assert not torch.equal(one[:2], other[:2])  # of another batch
    assert torch.equal(one, rows.__getitems__([0, 1, 2]).x)  # a resumed run meets the same
    assert torch.equal(all_images(data, "test"), all_images(data, "test"))
    seeded = BinaryMnist(**options(idx_files, binarisation="seeded"))
    assert torch.equal(all_images(data, "val"), all_images(seeded, "val"))


def test_pixels_are_drawn_with_their_gray_value_as_probability():
    gray = torch.tensor([0.0, 0.2, 0.7, 1.0]).reshape(1, 1, 1, 4)
    rows = BinarisedRows(ArrayRows(gray.expand(20_000, 1, 1, 4).numpy()), 0)
    drawn = rows.__getitems__(range(20_000)).x
    torch.testing.assert_close(drawn.mean(dim=0, keepdim=True), gray, rtol=0, atol=4 * 0.5 / 20_000**0.5)
    assert len(rows) == 20_000


def test_an_unknown_binarisation_is_named(tmp_path):
    with pytest.raises(ConfigError, match="one of static, seeded, dynamic, got fixed"):
        BinaryMnist(**options(tmp_path, binarisation="fixed"))


def test_omniglot_is_upright_and_binarised_as_published(tmp_path, monkeypatch, rng):
    known, tested = rng.random((784, 30)), rng.random((784, 8))
    monkeypatch.setattr(Omniglot, "file", placed_matrices(tmp_path, Omniglot.file, data=known, testdata=tested))
    monkeypatch.setattr(Omniglot, "rows", (25, 5, 8))
    data = Omniglot(**options(tmp_path))
    assert [len(rows) for rows in data.splits] == [25, 5, 8]

    # The published code, line by line: transposed, reshaped in Fortran's order, drawn with numpy's seed 777.
    def published(matrix):
        return matrix.T.reshape((-1, 28, 28)).reshape((-1, 784), order="F")

    val = published(known)[np.random.RandomState(0).permutation(30)][25:]
    np.random.seed(777)
    expected = [np.random.binomial(1, val), np.random.binomial(1, published(tested))]
    for split, images in zip(("val", "test"), expected, strict=True):
        agreeing = (all_images(data, split).flatten(1).numpy() == images).mean()
        assert agreeing > 0.9999  # float32 probabilities may turn a draw or two
    gray = data.splits.train.rows
    np.testing.assert_allclose(
        np.sort(gray.__getitems__(range(25)).x.flatten(1).sum(1)),
        np.sort(published(known)[np.random.RandomState(0).permutation(30)][:25].sum(1)),
        rtol=1e-5,
    )


def test_some_of_omniglot_will_do_where_that_is_allowed(tmp_path, rng):
    (tmp_path / "omniglot").mkdir()
    np.savez(tmp_path / "omniglot" / "part.npz", x=rng.integers(0, 256, (100, 28, 28), dtype=np.uint8))
    data = Omniglot(**options(tmp_path, allow_partial=True))
    assert [len(rows) for rows in data.splits] == [71, 4, 25]
    assert any("100 of 32,415 images" in note for note in data.notes)
    with pytest.raises(DataError, match=r"chardata\.mat"):
        Omniglot(**options(tmp_path, download=False)).setup()


def test_frey_faces_are_shuffled_as_published(tmp_path, monkeypatch, rng):
    images = rng.integers(0, 256, (20, 560), dtype=np.uint8)
    monkeypatch.setattr(FreyFaces, "file", place(tmp_path, FreyFaces.file, pickle.dumps([images], protocol=0)))
    monkeypatch.setattr(FreyFaces, "held_out", 3)
    data = FreyFaces(**options(tmp_path, split_seed=123))
    assert (data.event_shape, data.levels) == ((1, 28, 20), 256)
    shuffled = images.copy()
    np.random.seed(123)
    np.random.shuffle(shuffled)
    found = torch.cat([all_images(data, split) for split in ("train", "val", "test")]).flatten(1)
    assert torch.equal(found, torch.from_numpy(shuffled).float())
    assert [len(rows) for rows in data.splits] == [14, 3, 3]


def test_silhouettes_are_upright_and_bright(tmp_path, monkeypatch, rng):
    parts = {key: rng.integers(0, 2, (n, 784), dtype=np.uint8) for key, n in (("train", 6), ("val", 4), ("test", 5))}
    file = placed_matrices(
        tmp_path, Caltech101Silhouettes.published, **{f"{key}_data": part for key, part in parts.items()}
    )
    monkeypatch.setattr(Caltech101Silhouettes, "published", file)
    data = Caltech101Silhouettes(**options(tmp_path))
    for key, part in parts.items():
        expected = (1 - part).reshape(-1, 28, 28).transpose(0, 2, 1)[:, None]
        assert torch.equal(all_images(data, key), torch.from_numpy(expected).float())
    assert data.notes == []


def test_silhouettes_without_the_published_split_say_so(tmp_path, monkeypatch, rng):
    images = rng.integers(0, 2, (40, 784), dtype=np.uint8)
    file = placed_matrices(tmp_path, Caltech101Silhouettes.whole, X=images, Y=np.ones((1, 40)))
    monkeypatch.setattr(Caltech101Silhouettes, "whole", file)
    data = Caltech101Silhouettes(**options(tmp_path, download=False))
    assert [len(rows) for rows in data.splits] == [19, 10, 11]
    assert any("a split of our own, seed 0" in note for note in data.notes)
    found = torch.cat([all_images(data, split) for split in ("train", "val", "test")])
    expected = torch.from_numpy((1 - images).reshape(-1, 28, 28).transpose(0, 2, 1)[:, None].copy()).float()
    assert as_set(found) == as_set(expected)
    other = Caltech101Silhouettes(**options(tmp_path, split_seed=1))
    assert as_set(all_images(other, "test")) != as_set(all_images(data, "test"))


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_tampered_pickle_is_refused_and_nothing_of_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps([Hostile()], protocol=0)
    path = tmp_path / FreyFaces.file.path
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"Expected sha256:3b69.*the file is damaged or another one"):
        FreyFaces(**options(tmp_path)).setup()
    # Even with a checksum that fits.
    monkeypatch.setattr(FreyFaces, "file", place(tmp_path, FreyFaces.file, content))
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system, which was not run"):
        FreyFaces(**options(tmp_path)).setup()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kind", [Omniglot, Caltech101Silhouettes])
def test_tampered_matlab_files_are_refused(tmp_path, monkeypatch, kind):
    remote = kind.file if kind is Omniglot else kind.published
    path = tmp_path / remote.path
    path.parent.mkdir()
    objects = np.empty((1, 1), dtype=object)
    objects[0, 0] = "text"
    keys = ("data", "testdata") if kind is Omniglot else ("train_data", "val_data", "test_data")
    savemat(path, dict.fromkeys(keys, objects))
    with pytest.raises(DataError, match="the file is damaged or another one"):
        kind(**options(tmp_path)).setup()
    monkeypatch.setattr(kind, "file" if kind is Omniglot else "published", place(tmp_path, remote, path.read_bytes()))
    with pytest.raises(DataError, match=r"Expected a matrix \w+ of .* numbers in .*got \(1, 1\) of object"):
        kind(**options(tmp_path)).setup()
    monkeypatch.setattr(kind, "file" if kind is Omniglot else "published", place(tmp_path, remote, b"no matlab file"))
    with pytest.raises(DataError, match="Expected the matrices"):
        kind(**options(tmp_path)).setup()


def test_limits_say_so(tmp_path, monkeypatch, rng):
    images = rng.integers(0, 256, (40, 560), dtype=np.uint8)
    monkeypatch.setattr(FreyFaces, "file", place(tmp_path, FreyFaces.file, pickle.dumps([images], protocol=0)))
    data = FreyFaces(**options(tmp_path, limit=5, test_limit=2))
    assert [len(rows) for rows in data.splits] == [5, 10, 2]
    assert sum("numbers are not comparable" in note for note in data.notes) == 2


@pytest.mark.skipif("CNF_LAB_DATA" not in os.environ, reason="real data: set CNF_LAB_DATA")
def test_real_files():
    root = Path(os.environ["CNF_LAB_DATA"])
    if (root / FreyFaces.file.path).is_file():
        faces = FreyFaces(**options(root, download=False))
        assert [len(rows) for rows in faces.splits] == [1565, 200, 200]
        means = all_images(faces, "train").mean(dim=0)[0]
        assert 100 < means.mean() < 200
    if (root / Caltech101Silhouettes.whole.path).is_file():
        shapes = Caltech101Silhouettes(**options(root, download=False))
        assert [len(rows) for rows in shapes.splits] == [4100, 2264, 2307]
        mean = all_images(shapes, "train").mean(dim=0)[0]
        assert mean[10:18, 10:18].mean() > 2 * mean[0].mean()  # objects, in the middle, are 1
