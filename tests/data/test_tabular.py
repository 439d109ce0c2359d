import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cnf_lab.data import tabular
from cnf_lab.data.download import RemoteFile
from cnf_lab.data.tabular import Bsds300, Gas, Hepmass, Miniboone, Power
from cnf_lab.errors import DataError

CLOSED = "http://127.0.0.1:9/data.tar.gz"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(tabular, "ARCHIVE", RemoteFile("data.tar.gz", (CLOSED,), "md5:" + "0" * 32))
    monkeypatch.setattr(Miniboone, "alone", RemoteFile("miniboone/data.npy", (CLOSED + "2",), "md5:" + "1" * 32))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def build(kind, root, published=None, **options):
    """A data module with other published sizes, as a subclass so that the class stays as it is."""
    small = type(kind.__name__, (kind,), {} if published is None else {"published": published})
    return small(kind.__name__.lower(), str(root), 100, 100, **options)


def arrays(module):
    splits = module.splits
    for rows in splits:
        assert rows.array.dtype == np.float32
        assert rows.array.flags.c_contiguous
    return [rows.array for rows in splits]


def place(root, member):
    path = Path(root) / member
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_power(root, rng, rows=1000, member="power/data.npy"):
    stored = np.round(rng.normal(size=(rows, 8)) * 3 + 5, 3)
    np.save(place(root, member), stored)
    return stored


def write_miniboone(root, rng, rows=1000, member="miniboone/data.npy"):
    stored = rng.normal(size=(rows, 43)) * 10 ** rng.uniform(-3, 3, size=43) + 5
    np.save(place(root, member), stored)
    return stored


def write_gas(root, rng, rows=1000):
    """16 sensors made of 8 sources; the copies correlate, one of them only negatively."""
    sources = rng.normal(size=(rows, 8))
    sensors = {f"R{k + 1}": sources[:, k % 8] + 0.01 * rng.normal(size=rows) for k in range(15)}
    frame = pd.DataFrame({name: rng.normal(size=rows) for name in ("Time", "Meth", "Eth")} | sensors)
    frame.to_pickle(place(root, "gas/ethylene_CO.pickle"))
    return frame


def write_hepmass(root, rng, rows=2000):
    frames = []
    for part, number in (("train", rows), ("test", rows // 2)):
        columns = {f"f{k}": rng.normal(loc=k, scale=1 + k, size=number) for k in range(24)}
        columns["f3"] = rng.integers(0, 2, number).astype(float)  # its smallest value recurs: dropped
        columns["f7"] = np.maximum(columns["f7"], 5.0)  # likewise
        columns["f9"] = np.minimum(columns["f9"], 9.0)  # only its largest value recurs: kept
        columns["f23"] = np.round(columns["f23"], 0)  # values recur, the smallest hardly: kept
        frame = pd.DataFrame({"# label": rng.integers(0, 2, number).astype(float)} | columns)
        if part == "test":
            frame["stray"] = rng.normal(size=number)
        frame.to_csv(place(root, f"hepmass/1000_{part}.csv"), index=False, float_format="%.17g")
        frames.append(frame)
    return frames


def write_bsds300(root, rng, rows=(100, 30, 20), width=63):
    import h5py

    stored = [rng.normal(size=(count, width)) for count in rows]
    with h5py.File(place(root, "BSDS300/BSDS300.hdf5"), "w") as file:
        for group, part in zip(("train", "validation", "test"), stored, strict=True):
            file[group] = part
    return stored


# -- the preprocessing, against a second, literal telling of it ----------------------------------


def test_power(tmp_path, rng):
    rows = write_power(tmp_path, rng)
    generator = np.random.RandomState(42)
    generator.shuffle(rows)
    rows = np.delete(np.delete(rows, 3, axis=1), 1, axis=1)
    voltage, gap = 0.01 * generator.rand(1000, 1), 0.001 * generator.rand(1000, 1)
    metering = generator.rand(1000, 3)
    rows = rows + np.hstack([gap, voltage, metering, np.zeros((1000, 1))])
    fitted = rows[:900]
    rows = ((rows - fitted.mean(axis=0)) / fitted.std(axis=0)).astype(np.float32)

    module = build(Power, tmp_path, (810, 90, 100))
    train, val, test = arrays(module)
    np.testing.assert_array_equal(train, rows[:810])
    np.testing.assert_array_equal(val, rows[810:900])
    np.testing.assert_array_equal(test, rows[900:])
    assert module.event_shape == (6,)
    assert len(module.column_names) == 6
    assert module.notes == []


def test_gas(tmp_path, rng):
    frame = write_gas(tmp_path, rng).drop(columns=["Meth", "Eth", "Time"])
    while (crowded := (frame.corr() > 0.98).sum(axis=1) > 1).any():
        frame = frame.drop(columns=crowded.index[crowded][0])
    rows = ((frame - frame.mean()) / frame.std()).to_numpy()

    module = build(Gas, tmp_path, (810, 90, 100))
    train, val, test = arrays(module)
    # The first of each pair goes: R8 has no second, the others leave their later copy.
    assert module.column_names == ["R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"] == list(frame.columns)
    np.testing.assert_allclose(np.vstack([train, val, test]), rows, rtol=1e-6, atol=1e-6)
    everything = np.vstack([train, val, test]).astype(float)
    np.testing.assert_allclose(everything.std(axis=0, ddof=1), 1.0, rtol=1e-6)


def test_gas_keeps_columns_that_correlate_negatively(rng):
    x, y = rng.normal(size=(2, 500))
    columns = np.stack([x, -x, y, x + 1e-3 * y, x])
    assert tabular._uncorrelated(columns) == [1, 2, 4]


def test_hepmass(tmp_path, rng):
    train, test = write_hepmass(tmp_path, rng)
    train = train[train["# label"] == 1].drop(columns="# label")
    test = test[test["# label"] == 1].drop(columns=["# label", "stray"])
    mean, deviation = train.mean(), train.std()
    train, test = (train - mean) / deviation, (test - mean) / deviation
    kept = [name for name in train if (train[name] == train[name].min()).sum() <= 5]
    held_out = int(0.1 * len(train))

    module = build(Hepmass, tmp_path, (len(train) - held_out, held_out, len(test)), allow_partial=True)
    found = arrays(module)
    assert module.column_names == kept == [f"f{k}" for k in range(24) if k not in (3, 7)]
    np.testing.assert_allclose(found[0], train[kept].to_numpy()[:-held_out], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], train[kept].to_numpy()[-held_out:], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[2], test[kept].to_numpy(), rtol=1e-6, atol=1e-6)
    assert "22 instead of 21 columns" in module.notes[0]


def test_hepmass_rows_with_a_field_more_than_names(tmp_path, rng):
    write_hepmass(tmp_path, rng, rows=400)
    before = build(Hepmass, tmp_path, allow_partial=True)
    expected = arrays(before)
    path = tmp_path / "hepmass" / "1000_test.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(line + ",7.0" for line in lines)]) + "\n")
    found = arrays(build(Hepmass, tmp_path, allow_partial=True))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_miniboone(tmp_path, rng):
    rows = write_miniboone(tmp_path, rng)
    rows = (rows - rows[:900].mean(axis=0)) / rows[:900].std(axis=0)
    train, val, test = arrays(build(Miniboone, tmp_path, (810, 90, 100)))
    np.testing.assert_array_equal(np.vstack([train, val, test]), rows.astype(np.float32))
    assert [len(part) for part in (train, val, test)] == [810, 90, 100]


def test_bsds300(tmp_path, rng):
    stored = write_bsds300(tmp_path, rng)
    module = build(Bsds300, tmp_path, (100, 30, 20))
    for part, expected in zip(arrays(module), stored, strict=True):
        np.testing.assert_array_equal(part, expected.astype(np.float32))
    assert module.event_shape == (63,)


def test_published_sizes_are_those_of_the_split_rule():
    for kind, total in ((Power, 2_049_280), (Gas, 1_052_065), (Miniboone, 36_488)):
        parts = tabular._split_tail(np.empty((total, 0)))
        assert tuple(len(part) for part in parts) == kind.published
    assert Hepmass.published[1] == int(0.1 * sum(Hepmass.published[:2]))


def test_batches_are_rows(tmp_path, rng):
    write_power(tmp_path, rng)
    module = build(Power, tmp_path, (810, 90, 100), steps_per_epoch=3)
    batches = list(module.train_dataloader())
    assert [tuple(batch.x.shape) for batch in batches] == [(100, 6)] * 3


# -- files: where they lie, how they fail --------------------------------------------------------


@pytest.mark.parametrize("member", ["power/data.npy", "data/power/data.npy"])
def test_both_layouts(tmp_path, rng, member):
    write_power(tmp_path, rng, member=member)
    assert len(build(Power, tmp_path, (810, 90, 100)).splits.test) == 100


@pytest.mark.parametrize("rows", [700, 1300])
def test_other_sizes_are_refused_unless_allowed(tmp_path, rng, rows):
    write_power(tmp_path, rng, rows=rows)
    with pytest.raises(DataError) as error:
        build(Power, tmp_path, (810, 90, 100)).setup()
    text = str(error.value)
    assert "\n" not in text
    for part in ("1,000 rows", f"{rows:,} rows", "dataset.allow_partial=true", str(tmp_path / "power")):
        assert part in text
    module = build(Power, tmp_path, (810, 90, 100), allow_partial=True)
    module.setup()
    assert module.notes == [
        f"power: {rows:,} of 1,000 rows (allow_partial); numbers are not comparable with published ones"
    ]


def make_archive(root, files):
    with tarfile.open(root / "data.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return "md5:" + hashlib.md5((root / "data.tar.gz").read_bytes()).hexdigest()


def test_members_are_unpacked_from_an_archive_placed_by_hand(tmp_path, rng, monkeypatch):
    write_miniboone(tmp_path / "made", rng)
    content = (tmp_path / "made" / "miniboone" / "data.npy").read_bytes()
    root = tmp_path / "root"
    root.mkdir()
    checksum = make_archive(root, {"data/power/data.npy": b"x", "data/miniboone/data.npy": content})
    monkeypatch.setattr(tabular, "ARCHIVE", RemoteFile("data.tar.gz", (CLOSED,), checksum))
    assert len(build(Miniboone, root, (810, 90, 100)).splits.test) == 100
    assert (root / "miniboone" / "data.npy").read_bytes() == content
    assert not (root / "power").exists()


def test_damaged_archive_is_not_unpacked(tmp_path):
    make_archive(tmp_path, {"data/gas/ethylene_CO.pickle": b"x"})
    with pytest.raises(DataError, match="md5:0000.* got md5:"):
        build(Gas, tmp_path).setup()
    assert not (tmp_path / "gas").exists()


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("kind", [Power, Gas, Hepmass, Miniboone, Bsds300])
def test_missing_files_end_in_one_line(tmp_path, kind, download):
    with pytest.raises(DataError) as error:
        build(kind, tmp_path, download=download).setup()
    text = str(error.value)
    assert "\n" not in text
    for part in (*kind.members, f"dataset.root={tmp_path}", "data.tar.gz (md5:000", CLOSED):
        assert part in text
    assert (f"{CLOSED}2" in text) == (kind is Miniboone)
    assert ("dataset.download=true" in text) == (not download)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Power, b"\x93NUMPY"),
        (Power, b""),
        (Miniboone, b"not numpy"),
        (Gas, b"not a pickle"),
        (Hepmass, b""),
        (Hepmass, b"# label,f0\n1,text\n"),
        (Hepmass, b"\xff\xfe\x00"),
        (Bsds300, b"not hdf5"),
    ],
)
def test_damaged_files_are_named(tmp_path, kind, content):
    for member in kind.members:
        place(tmp_path, member).write_bytes(content)
    with pytest.raises(DataError) as error:
        build(kind, tmp_path, allow_partial=True).setup()
    assert str(tmp_path / kind.members[0]) in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_npy(tmp_path, rng):
    write_power(tmp_path, rng)
    path = tmp_path / "power" / "data.npy"
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(DataError, match="data.npy"):
        build(Power, tmp_path).setup()


def test_wrong_columns(tmp_path, rng):
    np.save(place(tmp_path, "power/data.npy"), rng.normal(size=(100, 7)))
    with pytest.raises(DataError, match=r"\(100, 7\) instead of \(rows, 8\)"):
        build(Power, tmp_path, allow_partial=True).setup()
    pd.DataFrame(rng.normal(size=(10, 2)), columns=["Time", "R1"]).to_pickle(place(tmp_path, "gas/ethylene_CO.pickle"))
    with pytest.raises(DataError, match="none named Meth, Eth"):
        build(Gas, tmp_path, allow_partial=True).setup()
    train, test = write_hepmass(tmp_path, rng, rows=100)
    test.drop(columns="f5").to_csv(tmp_path / "hepmass" / "1000_test.csv", index=False)
    with pytest.raises(DataError, match="no columns named f5"):
        build(Hepmass, tmp_path, allow_partial=True).setup()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, -1])
def test_numbers_that_are_not_finite(tmp_path, rng, value, row):
    stored = write_miniboone(tmp_path, rng)
    stored[row, 4] = value
    np.save(tmp_path / "miniboone" / "data.npy", stored)
    with pytest.raises(DataError):
        build(Miniboone, tmp_path, (810, 90, 100)).setup()


def test_constant_columns(tmp_path, rng):
    stored = write_miniboone(tmp_path, rng)
    stored[:, 7] = 2.0
    np.save(tmp_path / "miniboone" / "data.npy", stored)
    with pytest.raises(DataError, match=r"\[7\]"):
        build(Miniboone, tmp_path, (810, 90, 100)).setup()


# -- real files ----------------------------------------------------------------------------------


@pytest.mark.skipif("CNF_LAB_DATA" not in os.environ, reason="CNF_LAB_DATA names no folder of real data")
@pytest.mark.parametrize("kind", [Power, Miniboone])
def test_real_files(kind):
    roots = [Path(os.environ["CNF_LAB_DATA"]) / folder for folder in (".", "uci_partial")]
    root = next((root for root in roots if (root / kind.members[0]).is_file()), None)
    if root is None:
        pytest.skip(f"no {kind.members[0]} below CNF_LAB_DATA")
    module = build(kind, root, allow_partial=True)
    fitted = np.vstack(arrays(module)[:2]).astype(float)
    np.testing.assert_allclose(fitted.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(fitted.std(axis=0), 1.0, atol=1e-5)
