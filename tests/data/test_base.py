from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnf_lab.data.base import ArrayRows, Batch, FlowDataModule, Rows, ShardSampler, Splits, StreamSampler
from cnf_lab.errors import ConfigError, DataError


class Numbers(FlowDataModule):
    """Rows that hold their own number."""

    def __init__(self, rows: int = 30, **options: Any) -> None:
        super().__init__("numbers", **({"batch_size": 4, "evaluation_batch_size": 7} | options))
        self.rows = rows

    def load(self) -> Splits:
        array = np.arange(self.rows, dtype=np.float64)[:, None]
        return Splits(ArrayRows(array), ArrayRows(array[:11]), ArrayRows(array[:13]))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (1,)


def epoch(sampler: StreamSampler, number: int) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


# -- StreamSampler ---------------------------------------------------------------------------------


@given(length=st.integers(1, 50), batch=st.integers(1, 9), seed=st.integers(0, 5), number=st.integers(0, 4))
def test_a_pass_covers_every_row_once(length, batch, seed, number):
    sampler = StreamSampler(length, batch, steps_per_epoch=None, seed=seed)
    assert sorted(epoch(sampler, number)) == list(range(length))
    assert len(sampler) == length


@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 7),
    steps=st.integers(1, 12),
    world=st.integers(1, 3),
)
def test_every_pass_of_the_stream_covers_every_row_once(length, batch, steps, world):
    samplers = [StreamSampler(length, batch, steps, world, rank) for rank in range(world)]
    stream: list[int] = []
    for number in range(2 + 2 * length // (batch * steps * world)):
        shares = [epoch(sampler, number) for sampler in samplers]
        assert all(len(share) == batch * steps for share in shares)
        stream += [row for rows in zip(*shares, strict=True) for row in rows]
    assert len(stream) >= 2 * length
    for first in range(0, len(stream) - length + 1, length):
        assert sorted(stream[first : first + length]) == list(range(length))


def test_passes_differ_in_order_and_seeds_differ():
    sampler = StreamSampler(100, 10, None)
    assert epoch(sampler, 0) != epoch(sampler, 1)
    assert epoch(sampler, 0) != epoch(StreamSampler(100, 10, None, seed=1), 0)


@pytest.mark.parametrize("steps", [None, 2, 25], ids=["pass", "shorter", "longer"])
def test_a_resumed_epoch_is_the_uninterrupted_one(steps):
    uninterrupted = StreamSampler(37, 5, steps, world_size=2, rank=1, seed=3)
    for number in range(4):
        last = epoch(uninterrupted, number)
    assert epoch(StreamSampler(37, 5, steps, world_size=2, rank=1, seed=3), 3) == last


@pytest.mark.parametrize("length", [None, 37], ids=["endless", "rows"])
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(length):
    one = StreamSampler(length, 10, 6)
    two = [StreamSampler(length, 5, 6, world_size=2, rank=rank) for rank in range(2)]
    for number in range(3):
        whole, halves = epoch(one, number), [epoch(sampler, number) for sampler in two]
        for step in range(6):
            union = sorted(halves[0][5 * step : 5 * step + 5] + halves[1][5 * step : 5 * step + 5])
            assert union == sorted(whole[10 * step : 10 * step + 10])


def test_processes_share_a_pass_and_pad_it_to_equal_lengths():
    shares = [epoch(StreamSampler(11, 4, None, world_size=3, rank=rank), 2) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    everything = sum(shares, [])
    assert set(everything) == set(range(11))
    assert len(everything) - len(set(everything)) == 1


def test_groups_stay_together_and_are_shuffled_inside_and_outside():
    starts = np.array([0, 10, 15, 40])
    order = np.array(epoch(StreamSampler(50, 8, None, group_starts=starts), 0))
    groups = np.searchsorted(starts, order, side="right")
    changes = np.flatnonzero(np.diff(groups)) + 1
    assert len(changes) == 3
    assert sorted(order) == list(range(50))
    assert any((np.diff(part) < 0).any() for part in np.split(order, changes))
    sequences = {
        tuple(
            dict.fromkeys(np.searchsorted(starts, epoch(StreamSampler(50, 8, None, group_starts=starts), e), "right"))
        )
        for e in range(10)
    }
    assert len(sequences) > 1


def test_endless_numbers_never_repeat():
    sampler = StreamSampler(None, 5, 4)
    assert sum((epoch(sampler, number) for number in range(3)), []) == list(range(60))


def test_endless_data_need_steps_per_epoch():
    with pytest.raises(ConfigError, match="Type dataset.steps_per_epoch=200"):
        StreamSampler(None, 5, None)


# -- ShardSampler ----------------------------------------------------------------------------------


@given(length=st.integers(0, 30), world=st.integers(1, 7))
def test_shards_cover_every_row_exactly_once(length, world):
    shards = [ShardSampler(length, world, rank) for rank in range(world)]
    assert sorted(row for shard in shards for row in shard) == list(range(length))
    assert all(len(shard) == len(list(shard)) for shard in shards)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


# -- ArrayRows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("float64", torch.float64),
        ("int64", torch.float32),
        ("uint8", torch.float32),
    ],
)
def test_rows_keep_their_floating_type(dtype, expected):
    rows = ArrayRows(np.arange(12).reshape(4, 3).astype(dtype))
    assert isinstance(rows, Rows)
    x, context = rows.__getitems__([2, 0])
    assert x.dtype == expected
    assert x.tolist() == [[6, 7, 8], [0, 1, 2]]
    assert context is None


def test_rows_of_a_memory_mapped_file(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 2))
    np.save(tmp_path / "rows.npy", array)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    rows = ArrayRows(mapped, context=mapped[:, :1], indices=np.array([3, 5, 8]))
    assert len(rows) == 3
    x, context = rows.__getitems__([2, 1])
    np.testing.assert_array_equal(x.numpy(), array[[8, 5]])
    np.testing.assert_array_equal(context.numpy(), array[[8, 5], :1])
    x.zero_()  # neither the file nor the map may change
    np.testing.assert_array_equal(mapped, array)


# -- FlowDataModule --------------------------------------------------------------------------------


def test_loaders_give_whole_batches_of_the_right_rows():
    data = Numbers(rows=30, steps_per_epoch=None)
    train = list(data.train_dataloader())
    assert all(isinstance(batch, Batch) for batch in train)
    assert [len(batch.x) for batch in train] == [4] * 7 + [2]
    assert sorted(torch.cat([batch.x for batch in train]).flatten().tolist()) == list(range(30))
    assert [len(batch.x) for batch in data.val_dataloader()] == [7, 4]
    assert torch.cat([batch.x for batch in data.test_dataloader()]).flatten().tolist() == list(range(13))
    assert [len(batch.x) for batch in data.evaluation_dataloader("train", 20)] == [20, 10]


def test_head_is_spread_over_the_split():
    data = Numbers(rows=30)
    assert data.head("train", 4).x.flatten().tolist() == [0, 9, 19, 29]
    assert len(data.head("train", 1000).x) == 30


def test_worker_processes_give_the_same_batches():
    here, there = (Numbers(steps_per_epoch=3, num_workers=workers).train_dataloader() for workers in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.x, b.x)


def test_lightning_hands_over_the_epoch():
    class Recorder(pl.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.seen: list[list[float]] = []
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, step):
            self.seen.append(batch.x.flatten().tolist())

        def validation_step(self, batch, step):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data, recorder = Numbers(steps_per_epoch=2), Recorder()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=data)
    sampler = StreamSampler(30, 4, 2)
    expected = [row for number in range(3) for row in epoch(sampler, number)]
    assert sum(recorder.seen, []) == expected


@pytest.mark.parametrize("option", ["batch_size", "evaluation_batch_size"])
def test_batch_sizes_are_checked(option):
    with pytest.raises(ConfigError, match=f"Expected dataset.{option} of at least 1, got 0. Type"):
        Numbers(**{option: 0})


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="at least one row in the train split of numbers"):
        Numbers(rows=0).setup()


def test_an_unknown_split_is_named():
    with pytest.raises(ConfigError, match="one of train, val, test, got dev"):
        Numbers().split("dev")


def test_description_holds_plain_values():
    assert Numbers().describe() == {
        "name": "numbers",
        "notes": [],
        "entropy": None,
        "column_names": None,
        "context_names": None,
        "rows": {"train": 30, "val": 11, "test": 13},
    }
