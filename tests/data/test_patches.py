import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnf_lab.data import patches
from cnf_lab.data.download import RemoteFile
from cnf_lab.data.patches import Bsds300Patches, cut_patches, read_gray
from cnf_lab.errors import ConfigError, DataError

CLOSED = "http://127.0.0.1:9/BSDS300-images.tgz"


@pytest.fixture(autouse=True)
def small_published_set(monkeypatch):
    monkeypatch.setattr(patches, "ARCHIVE", RemoteFile("bsds300/BSDS300-images.tgz", (CLOSED,)))
    monkeypatch.setattr(patches, "_PUBLISHED", {"train": 20, "test": 5})


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """20 training and 5 test photographs of the right shapes, both upright and lying."""
    from PIL import Image

    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 5)):
        (root / part).mkdir()
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((481, 321) if number % 2 else (321, 481)).save(root / part / f"{number:03d}.jpg")
    return root


@pytest.fixture
def root(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "bsds300" / "images")
    return tmp_path


def build(root, **options):
    counts = {"train_patches": 300, "val_patches": 40, "test_patches": 60}
    return Bsds300Patches("bsds300_patches", str(root), 50, 50, **(counts | options))


# -- the patches ------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    shapes=st.lists(st.tuples(st.integers(8, 20), st.integers(8, 20)), min_size=1, max_size=4),
    count=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_patches_are_those_of_the_definition(shapes, count, seed):
    pixels = np.random.default_rng(0)
    images = [pixels.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    rng = np.random.RandomState([seed])
    which = rng.randint(len(images), size=count, dtype=np.int64)
    top = rng.randint([images[k].shape[0] - 7 for k in which], dtype=np.int64)
    left = rng.randint([images[k].shape[1] - 7 for k in which], dtype=np.int64)
    noise = rng.random_sample((count, 8, 8))
    found = cut_patches(images, count, [seed])
    assert found.shape == (count, 63)
    assert found.dtype == np.float32
    for row in range(count):
        i, j = top[row], left[row]
        patch = (images[which[row]][i : i + 8, j : j + 8] + noise[row]) / 256
        np.testing.assert_allclose(found[row], (patch - patch.mean()).ravel()[:63], rtol=1e-6, atol=1e-7)


def test_patches_are_the_same_on_every_machine():
    image = (np.arange(321)[:, None] * 7 + np.arange(481) * 3).astype(np.uint8)
    found = cut_patches([image, image.T], 1000, [5, 0])
    expected = [
        [-0.13622133, -0.12703666, -0.11359764],
        [-0.13738163, -0.12694491, -0.11197259],
        [-0.13700707, -0.12662558, -0.11209078],
    ]
    np.testing.assert_allclose(found[[0, 1, 999], :3], expected, rtol=1e-6)


def test_patches_do_not_depend_on_the_chunk(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    whole = cut_patches([image], 100, [0])
    monkeypatch.setattr(patches, "_CHUNK", 7)
    np.testing.assert_array_equal(cut_patches([image], 100, [0]), whole)


def test_the_dropped_pixel_is_determined_and_the_levels_can_be_read_back():
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    found = cut_patches([image], 500, [0]).astype(float)
    full = np.column_stack([found, -found.sum(axis=1)])
    level_differences = 256 * (full - full[:, :1]) - (image.ravel() - float(image[0, 0]))
    assert np.abs(level_differences).max() < 1.0  # the difference of two draws from [0, 1)
    assert level_differences.std() == pytest.approx(np.sqrt(63 / 64 / 6), rel=0.03)


def test_every_place_is_equally_likely():
    first, second = np.zeros((9, 10), dtype=np.uint8), np.zeros((8, 8), dtype=np.uint8)
    first[0, 0], first[8, 9] = 255, 255
    found = cut_patches([first, second], 30_000, [0])
    with_first_corner = (found[:, 0] > 0.5).mean()
    # Half of the patches are of the first photograph, in which one place of 2 x 3 has its first corner.
    assert with_first_corner == pytest.approx(1 / 12, abs=4 * np.sqrt(1 / 12 / 30_000))


# -- splits ---------------------------------------------------------------------------------------


def numbers(module):
    return [len(paths) for paths in module._photographs()]


def test_auto_is_published_where_the_test_photographs_are(root):
    module = build(root)
    train, val, test = module._photographs()
    assert (len(train), len(val), len(test)) == (18, 2, 5)
    assert {path.parent.name for path in train + val} == {"train"}
    assert {path.parent.name for path in test} == {"test"}
    assert module.notes == []
    assert [len(rows) for rows in module.splits] == [300, 40, 60]
    assert module.event_shape == module.head("test", 3).x.shape[1:] == (63,)


@pytest.mark.parametrize("split", ["auto", "by_photograph"])
def test_by_photograph(root, split):
    if split == "auto":
        shutil.rmtree(root / "bsds300" / "images" / "test")
    module = build(root, split=split)
    parts = module._photographs()
    assert [len(paths) for paths in parts] == [16, 2, 2]
    assert len({path for paths in parts for path in paths}) == 20
    assert {path.parent.name for paths in parts for path in paths} == {"train"}
    assert "not comparable" in module.notes[0]


@pytest.mark.parametrize(
    ("split", "options", "expected"),
    [
        ("by_photograph", {"train_images": 5, "val_images": 3, "test_images": 2}, [5, 3, 2]),
        ("by_photograph", {"train_images": 0.5, "val_images": 0.25, "test_images": 0.25}, [10, 5, 5]),
        ("published", {"train_images": 0.5, "val_images": 4, "test_images": 0.4}, [10, 4, 2]),
    ],
)
def test_numbers_of_photographs(root, split, options, expected):
    assert numbers(build(root, split=split, **options)) == expected


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"val_images": 21}, "dataset.val_images"),
        ({"val_images": 15, "test_images": 5}, "dataset.train_images"),
        ({"val_images": 10, "test_images": 11}, "dataset.test_images"),
        ({"train_images": 0}, "dataset.train_images"),
    ],
)
def test_numbers_that_do_not_fit(root, options, name):
    with pytest.raises(ConfigError, match=name):
        build(root, split="by_photograph", **options).setup()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"split": "random"}, "dataset.split"),
        ({"val_patches": 0}, "dataset.val_patches"),
        ({"patch_seed": -1}, "dataset.patch_seed"),
    ],
)
def test_options_out_of_range(tmp_path, options, name):
    with pytest.raises(ConfigError, match=name):
        build(tmp_path, **options)


def test_rows_depend_on_the_patch_seed_alone(root):
    first, other_order, other = (build(root, **options).splits for options in ({}, {"seed": 1}, {"patch_seed": 1}))
    for split in ("train", "val", "test"):
        rows = [getattr(splits, split).array for splits in (first, other_order, other)]
        np.testing.assert_array_equal(rows[0], rows[1])
        assert not np.array_equal(rows[0], rows[2])
    assert build(root)._photographs() != build(root, patch_seed=1)._photographs()


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["bsds300/images", "BSDS300/images", "images"])
def test_places_of_the_photographs(photographs, tmp_path, folder):
    shutil.copytree(photographs, tmp_path / folder)
    assert numbers(build(tmp_path)) == [18, 2, 5]


def test_archive_placed_by_hand_is_unpacked(photographs, tmp_path):
    (tmp_path / "bsds300").mkdir()
    with tarfile.open(tmp_path / "bsds300" / "BSDS300-images.tgz", "w:gz") as tar:
        tar.add(photographs, "BSDS300/images")
    assert numbers(build(tmp_path, download=False)) == [18, 2, 5]
    assert len(list((tmp_path / "bsds300" / "images" / "test").iterdir())) == 5


@pytest.mark.parametrize("download", [True, False])
def test_no_photographs(tmp_path, download):
    with pytest.raises(DataError) as error:
        build(tmp_path, download=download).setup()
    text = str(error.value)
    assert "\n" not in text
    assert CLOSED in text
    assert str(tmp_path / "bsds300") in text


def test_published_split_without_test_photographs(root):
    shutil.rmtree(root / "bsds300" / "images" / "test")
    with pytest.raises(DataError, match=r"5 photographs .*test, got 0.*dataset.split=by_photograph"):
        build(root, split="published").setup()


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_photographs_are_refused_unless_allowed(root, part):
    (root / "bsds300" / "images" / part / "001.jpg").unlink()
    with pytest.raises(DataError, match=rf"{part}, got (19|4)\..*dataset.allow_partial=true"):
        build(root).setup()
    module = build(root, allow_partial=True)
    module.setup()
    assert f"{part} photographs (allow_partial)" in module.notes[0]


def test_damaged_photographs_are_named(root):
    from PIL import Image

    path = root / "bsds300" / "images" / "train" / "001.jpg"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a photograph"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train/001\.jpg"):
            build(root, split="by_photograph").setup()
    Image.new("RGB", (480, 320)).save(path)
    with pytest.raises(DataError, match=r"001\.jpg, got one of 320 by 480 pixels"):
        read_gray(path)


def test_gray_is_the_weighted_sum_of_the_colours(tmp_path):
    from PIL import Image

    path = tmp_path / "colour.png"
    Image.new("RGB", (481, 321), (200, 100, 50)).save(path)
    gray = read_gray(path)
    assert gray.shape == (321, 481)
    assert gray.dtype == np.uint8
    assert np.unique(gray).item() == round((299 * 200 + 587 * 100 + 114 * 50) / 1000)


# -- the real photographs ---------------------------------------------------------------------------


@pytest.mark.skipif("CNF_LAB_DATA" not in os.environ, reason="CNF_LAB_DATA names no folder of real data")
def test_gaussian_on_real_photographs(monkeypatch):
    root = Path(os.environ["CNF_LAB_DATA"])
    if not any((root / "bsds300" / "images" / "train").glob("*.jpg")):
        pytest.skip("no bsds300/images/train below CNF_LAB_DATA")
    monkeypatch.setattr(patches, "_PUBLISHED", {"train": 200, "test": 100})
    counts = {"train_patches": 100_000, "val_patches": 1000, "test_patches": 20_000}
    train, _, test = (rows.array.astype(float) for rows in build(root, split="by_photograph", **counts).splits)
    mean, factor = train.mean(axis=0), np.linalg.cholesky(np.cov(train.T))
    latent = np.linalg.solve(factor, (test - mean).T)
    log_prob = -0.5 * (latent**2 + np.log(2 * np.pi)).sum(axis=0) - np.log(np.diag(factor)).sum()
    # 96.7 nats on the test photographs; 20 held-out training photographs give 98 to 110.
    assert 90 < log_prob.mean() < 115
