import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from cnf_lab.data.base import StreamSampler
from cnf_lab.data.custom import CustomDataModule, read_rows
from cnf_lab.data.readers import ParquetTable
from cnf_lab.errors import ConfigError, DataError

CONFIG = Path(__file__).parents[2] / "conf" / "dataset" / "custom.yaml"
NAMES = ["age", "height", "weight", "income"]


def rows(count: int = 100, dtype: str = "float64") -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(count, 4))
    values[:, 0] = np.arange(count)  # the first column numbers the rows
    return values.astype(dtype)


@pytest.fixture
def write(tmp_path):
    def written(array: np.ndarray, name: str = "rows.csv", names: list[str] = NAMES, group: int = 9) -> str:
        path, frame = tmp_path / name, pd.DataFrame(array, columns=names[: array.shape[1]])
        match path.suffix:
            case ".npy":
                np.save(path, array)
            case ".csv":
                frame.to_csv(path, index=False)
            case ".parquet":
                frame.to_parquet(path, row_group_size=group)
        return str(path)

    return written


def custom(path: str | None, **options) -> CustomDataModule:
    return CustomDataModule("custom", path, **({"batch_size": 8} | options))


def numbers(data: CustomDataModule, split: str) -> list[int]:
    return data.split(split).__getitems__(range(len(data.split(split)))).x[:, 0].int().tolist()


# -- splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.csv", "rows.npy", "rows.parquet"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_splits_share_the_rows(write, name, shuffle):
    data = custom(write(rows(), name), val_fraction=0.2, shuffle=shuffle)
    train, val, test = (numbers(data, split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [70, 20, 10]
    assert sorted(train + val + test) == list(range(100))
    assert (test == list(range(90, 100))) is not shuffle
    assert (val == list(range(70, 90))) is not shuffle
    assert train == sorted(train)


def test_random_splits_depend_on_their_seed_alone(write):
    path = write(rows())
    assert numbers(custom(path, split_seed=3), "test") == numbers(custom(path, split_seed=3, seed=9), "test")
    assert numbers(custom(path, split_seed=3), "test") != numbers(custom(path, split_seed=4), "test")


def test_every_split_of_few_rows_gets_one(write):
    data = custom(write(rows(4)))
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [2, 1, 1]


def test_splits_may_have_files_of_their_own(write):
    paths = [write(rows(count), f"{count}.csv") for count in (30, 10, 20)]
    data = custom(paths[0], val_path=paths[1], test_path=paths[2])
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [30, 10, 20]
    only_test = custom(paths[0], test_path=paths[2], shuffle=False)
    assert [len(only_test.split(split)) for split in ("train", "val", "test")] == [27, 3, 20]


@pytest.mark.parametrize(
    "options", [{"val_fraction": 0.0}, {"test_fraction": 0.0}, {"val_fraction": 0.6, "test_fraction": 0.6}]
)
def test_empty_splits_are_refused(write, options):
    with pytest.raises(DataError, match="Expected at least one row in the (train|val|test) split"):
        custom(write(rows()), **options).setup()


@pytest.mark.parametrize("option", ["val_fraction", "test_fraction"])
@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_fractions_are_checked(option, fraction):
    with pytest.raises(ConfigError, match=rf"Expected dataset.{option} in \[0, 1\), got {fraction}. Type"):
        custom("rows.csv", **{option: fraction})


# -- columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "event", "context"),
    [
        ({}, NAMES, None),
        ({"columns": ["income", "age"]}, ["income", "age"], None),
        ({"columns": [3, 0]}, ["income", "age"], None),
        ({"drop_columns": ["height"]}, ["age", "weight", "income"], None),
        ({"drop_columns": "height"}, ["age", "weight", "income"], None),
        ({"context": ["weight", 0]}, ["height", "income"], ["weight", "age"]),
        ({"columns": ["age"], "context": ["income"]}, ["age"], ["income"]),
        ({"drop_columns": [1], "context": 3}, ["age", "weight"], ["income"]),
    ],
)
def test_columns_are_chosen_by_name_or_number(write, options, event, context):
    data = custom(write(rows()), **options)
    assert data.column_names == event
    assert data.context_names == context
    assert data.event_shape == (len(event),)
    assert data.context_features == len(context or [])
    x, c = data.head("train", 1000)
    frame = pd.DataFrame(rows(), columns=NAMES)
    chosen = data.split("train").indices
    np.testing.assert_allclose(x.numpy(), frame.loc[chosen, event])
    if context is None:
        assert c is None
    else:
        np.testing.assert_allclose(c.numpy(), frame.loc[chosen, context])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["agee"]}, "Expected dataset.columns to name columns of .*, got agee. .* such as age"),
        ({"drop_columns": ["x"]}, "Expected dataset.drop_columns to name columns"),
        ({"context": [7]}, "Expected dataset.context to name columns .*, got 7"),
        ({"context": ["age"], "drop_columns": [0]}, "no column in common, got age in both"),
        ({"drop_columns": [0, 1], "context": [2, 3]}, "at least one column to model, got none"),
    ],
)
def test_wrong_columns_are_named(write, options, message):
    with pytest.raises(ConfigError, match=message):
        custom(write(rows()), **options).setup()


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("float64", torch.float64)])
def test_rows_keep_their_units_and_precision(write, dtype, expected):
    array = rows(dtype=dtype) * 1e6
    data = custom(write(array, "rows.npy"), context=[1], shuffle=False)
    x, context = data.split("test").__getitems__([0, 9])
    assert x.dtype == context.dtype == expected
    np.testing.assert_array_equal(x.numpy(), array[[90, 99]][:, [0, 2, 3]])
    np.testing.assert_array_equal(context.numpy(), array[[90, 99]][:, [1]])


def test_faults_say_what_to_type(write):
    array = rows()
    array[5, 2], array[:, 3] = np.nan, 1.0
    path = write(array)
    with pytest.raises(
        DataError, match=r"column weight: NaN \(1 values, .*Type dataset.drop_columns=\[weight,income\]"
    ):
        custom(path).setup()
    assert custom(path, drop_columns=["weight", "income"]).event_shape == (2,)


def test_discrete_columns_are_noted_once_unless_they_are_context(write):
    array = rows(500)
    array[:, 1], array[:, 2] = np.arange(500) % 2, np.arange(500) % 5
    data = custom(write(array), context=["height"])
    data.setup()
    data.setup()
    assert len(data.notes) == 1
    assert data.notes[0].startswith("Columns with few distinct values: weight (5).")


def test_without_a_path_it_says_what_to_type():
    with pytest.raises(ConfigError, match="dataset.path to be a file of rows, got null. Type dataset.path=rows.csv"):
        custom(None).setup()


# -- files larger than memory ------------------------------------------------------------------------------------


@pytest.fixture
def group_reads(monkeypatch):
    """The numbers of the row groups that are read from files."""
    original, reads = ParquetTable.read_group, []

    def counted(self, number, columns):
        reads.append(number)
        return original(self, number, columns)

    monkeypatch.setattr(ParquetTable, "read_group", counted)
    return reads


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_a_shuffled_epoch_reads_each_row_group_once(write, group_reads, batch_size):
    data = custom(write(rows(200), "rows.parquet", group=20), batch_size=batch_size)
    loader = data.train_dataloader()
    orders = []
    for epoch in range(3):
        group_reads.clear()
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat([batch.x for batch in loader])[:, 0].int().tolist())
        assert sorted(orders[-1]) == data.split("train").indices.tolist()
        assert len(group_reads) == len(set(group_reads))
    assert orders[0] != orders[1] != orders[2]


def test_epochs_across_passes_read_hardly_more(write, group_reads):
    data = custom(write(rows(200), "rows.parquet", group=20), batch_size=16, steps_per_epoch=15)
    loader = data.train_dataloader()
    group_reads.clear()
    assert sum(len(batch.x) for batch in loader) == 240  # one and a half passes over 160 rows
    assert len(group_reads) <= 10 + 6


def test_evaluation_reads_each_row_group_once(write, group_reads):
    data = custom(write(rows(200), "rows.parquet", group=20), evaluation_batch_size=7)
    loader = data.val_dataloader()
    group_reads.clear()
    assert sum(len(batch.x) for batch in loader) == 20
    assert group_reads == sorted(set(group_reads))


def test_group_starts_are_those_of_the_split(write):
    data = custom(write(rows(100), "rows.parquet", group=30), shuffle=False, val_fraction=0.3, test_fraction=0.2)
    train, val, test = (data.split(split) for split in ("train", "val", "test"))
    assert train.group_starts.tolist() == [0, 30]
    assert val.group_starts.tolist() == [0, 10]
    assert test.group_starts.tolist() == [0, 10]
    sampler = StreamSampler(len(train), 10, None, group_starts=train.group_starts)
    assert sorted(sampler) == list(range(50))


def test_a_mapped_file_is_read_row_by_row(write):
    data = custom(write(rows(1000), "rows.npy"), steps_per_epoch=2)
    assert isinstance(data.split("train").table.array, np.memmap)
    assert data.split("train").group_starts is None
    assert [batch.x.shape for batch in data.train_dataloader()] == [(8, 4)] * 2


def test_worker_processes_read_for_themselves(write):
    path = write(rows(100), "rows.parquet")
    here, there = (list(custom(path, num_workers=workers).train_dataloader()) for workers in (0, 2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(here, there, strict=True))


# -- rows of another file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "columns", "names", "context", "picked"),
    [
        pytest.param("rows.csv", NAMES, ["age", "income"], ["weight"], [0, 3, 2], id="by-name"),
        pytest.param("rows.parquet", NAMES[::-1], ["age", "income"], None, [3, 0], id="by-name-in-another-order"),
        pytest.param("rows.npy", NAMES, NAMES[:3], ["income"], [0, 1, 2, 3], id="in-order-without-names"),
        pytest.param("rows.npy", NAMES, ["3", "0"], ["2"], [3, 0, 2], id="by-number"),
        pytest.param("rows.npy", NAMES, ["1", "2", "3"], ["0"], [1, 2, 3, 0], id="by-number-of-all"),
        pytest.param("rows.npy", NAMES, ["9", "7", "5"], ["3"], [0, 1, 2, 3], id="in-order-of-chosen"),
        pytest.param("rows.csv", NAMES, ["0", "1", "2", "3"], None, [0, 1, 2, 3], id="trained-without-names"),
        pytest.param("rows.csv", NAMES, None, None, [0, 1, 2, 3], id="names-unknown"),
    ],
)
def test_rows_of_another_file(write, file, columns, names, context, picked):
    array = rows(12)
    features = len(names) if names else 4
    chosen = read_rows(write(array, file, columns), features, names, context)
    x, c = chosen.__getitems__([11, 2])
    values = x if c is None else torch.cat([x, c], dim=1)
    np.testing.assert_allclose(values.numpy(), array[[11, 2]][:, picked])
    assert x.shape == (2, features)
    assert (c is None) == (not context)


@pytest.mark.parametrize(
    ("file", "names", "context", "message"),
    [
        ("rows.csv", ["age", "size"], ["mood"], "to have the columns age, size, mood, got none named size, mood"),
        ("rows.npy", ["age", "size"], None, "to have 2 columns, got 4"),
        ("rows.npy", ["0", "1", "2"], None, "to have 3 columns, got 4"),
        ("rows.npy", ["0", "5"], None, "to have 2 columns, got 4"),
        ("rows.csv", None, None, "to have 2 columns, got 4"),
    ],
)
def test_files_that_do_not_fit_are_refused(write, file, names, context, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(rows(), file), len(names) if names else 2, names, context)


def test_rows_of_another_file_are_checked_but_may_be_constant(write):
    array = rows(1)
    assert len(read_rows(write(array), 4, NAMES)) == 1
    array[0, 1] = np.inf
    with pytest.raises(DataError, match=r"column height: infinities .* Fill in the values, or leave out the rows"):
        read_rows(write(array), 4, NAMES)
    with pytest.raises(DataError, match="Expected finite numbers"):
        custom(write(rows(), "train.csv"), test_path=write(array)).setup()


# -- the configuration and real rows ------------------------------------------------------------------------------


def test_config_file_builds_it(write):
    from hydra.utils import instantiate

    node = yaml.safe_load(CONFIG.read_text())["dataset"]
    data = instantiate(node | {"seed": 1, "path": write(rows())}, _convert_="all")
    assert data.event_shape == (4,)


def test_real_rows():
    if "CNF_LAB_DATA" not in os.environ:
        pytest.skip("CNF_LAB_DATA does not name a folder of data")
    path = Path(os.environ["CNF_LAB_DATA"]) / "miniboone" / "validation_normalised.npy"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    data = custom(str(path), context=[0])
    assert data.event_shape == (42,)
    assert sum(len(data.split(split)) for split in ("train", "val", "test")) == 3284
