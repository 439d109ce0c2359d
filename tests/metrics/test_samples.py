"""Sample metrics against closed forms, brute force, scipy and scikit-learn."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.stats import ks_2samp, norm, wasserstein_distance
from sklearn.neighbors import KNeighborsClassifier

from cnf_lab.errors import ConfigError
from cnf_lab.metrics.clouds import (
    Chamfer,
    EarthMover,
    Euclidean,
    across,
    coverage,
    minimum_matching_distance,
    nearest_neighbour_accuracy,
    to_clouds,
    within,
)
from cnf_lab.metrics.samples import (
    METRICS,
    SampleMetrics,
    kernel_mmd,
    kolmogorov_smirnov,
    median_bandwidth,
    sliced_wasserstein,
)

TINY = 1e-9  # GiB: every block becomes a single row


def normal(*shape, seed=0, shift=0.0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape) + shift)


def by_hand(x, y, squared):
    return ((x[:, None] - y[None]) ** 2).sum(-1) ** (1.0 if squared else 0.5)


def chamfer_by_tree(x, y, power):
    return (cKDTree(y).query(x)[0] ** power).mean() + (cKDTree(x).query(y)[0] ** power).mean()


def mover_by_permutations(x, y, squared):
    cost, rows = by_hand(x, y, squared), range(len(x))
    return min(cost[rows, order].mean() for order in map(list, itertools.permutations(rows)))


# -- distances between clouds ------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.5, TINY])
@pytest.mark.parametrize("squared", [True, False])
@settings(max_examples=6)
@given(k=st.integers(1, 9), size=st.integers(1, 9), d=st.integers(1, 5), pairs=st.integers(1, 4))
def test_chamfer_is_that_of_a_tree(squared, memory, k, size, d, pairs):
    a, b = normal(pairs, k, d), normal(pairs, size, d, seed=1)
    expected = [chamfer_by_tree(x, y, 2 if squared else 1) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(Chamfer(squared, memory).between(a, b), expected, rtol=1e-12)


@pytest.mark.parametrize("squared", [True, False])
@settings(max_examples=6)
@given(k=st.integers(1, 6), d=st.integers(1, 4))
def test_earth_mover_is_the_best_permutation(squared, k, d):
    a, b = normal(2, k, d), normal(2, k, d, seed=1, shift=0.3)
    expected = [mover_by_permutations(x, y, squared) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(EarthMover(squared).between(a, b), expected, rtol=1e-12)


def test_earth_mover_on_a_line_is_scipys():
    a, b = normal(1, 50, 1), normal(1, 50, 1, seed=1)
    expected = wasserstein_distance(a.flatten().numpy(), b.flatten().numpy())
    assert float(EarthMover(squared=False).between(a, b)) == pytest.approx(expected, rel=1e-12)


def test_earth_mover_of_a_shift_is_its_length():
    a = normal(3, 20, 4)
    shift = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    # No assignment moves the mean by less, and the parallel one attains it.
    torch.testing.assert_close(EarthMover(squared=True).between(a, a + shift), torch.full((3,), 25.0).double())


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("memory", [0.5, 1e-5], ids=["dense", "lazy"])
def test_sinkhorn_approaches_the_assignment_from_above(squared, memory):
    pytest.importorskip("ot")
    a, b = normal(1, 60, 3), normal(1, 60, 3, seed=1, shift=0.5)
    exact = float(EarthMover(squared).between(a, b))
    gaps = []
    for regularisation in (0.3, 0.1, 0.01):
        mover = EarthMover(squared, memory, exact_up_to=59, regularisation=regularisation)
        assert mover.solved(60) == f"sinkhorn {regularisation:g}"
        gaps.append(float(mover.between(a, b)) / exact - 1)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.02
    assert EarthMover(squared, exact_up_to=1).between(a[:, :1].expand(-1, 9, -1), a[:, :1].expand(-1, 9, -1)) == 0


def test_sinkhorn_without_pot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ConfigError, match=r"Expected the package POT .*Type pip install 'cnf-lab\[metrics\]'"):
        EarthMover(squared=False, exact_up_to=3).between(normal(1, 4, 2), normal(1, 4, 2, seed=1))


@pytest.mark.parametrize("squared", [True, False])
def test_euclidean_is_that_of_long_vectors(squared):
    a, b = normal(5, 3, 2), normal(4, 3, 2, seed=1)
    expected = by_hand(a.flatten(1), b.flatten(1), squared)
    torch.testing.assert_close(Euclidean(squared).table(a, b), expected)
    torch.testing.assert_close(Euclidean(squared).between(a[:4], b), expected[:4].diagonal())


# -- sets ------------------------------------------------------------------------------------------

DISTANCES = {
    "l2": (Euclidean, lambda x, y: float(((x - y) ** 2).sum())),
    "chamfer": (Chamfer, lambda x, y: chamfer_by_tree(x, y, 2)),
    "earth_mover": (EarthMover, lambda x, y: mover_by_permutations(x, y, squared=True)),
}


@pytest.mark.parametrize("memory", [0.5, TINY])
@pytest.mark.parametrize("name", DISTANCES)
def test_set_metrics_are_those_of_loops(name, memory):
    kind, naive = DISTANCES[name]
    reference, generated = normal(9, 4, 2), normal(7, 4, 2, seed=1, shift=0.2)
    distance = kind(squared=True, memory=memory)
    both = across(reference, generated, distance)
    table = [[naive(r, g) for g in generated.numpy()] for r in reference.numpy()]
    assert minimum_matching_distance(both) == pytest.approx(sum(min(row) for row in table) / 9)
    matched = {min(range(9), key=lambda row, column=column: table[row][column]) for column in range(7)}
    assert coverage(both) == pytest.approx(len(matched) / 9)
    clouds = list(enumerate(generated.numpy()))
    own = [min(naive(a, b) for j, b in clouds if j != i) for i, a in clouds]
    np.testing.assert_allclose(within(generated, distance), own, rtol=1e-12)


def accuracy(reference, generated, distance):
    return nearest_neighbour_accuracy(
        across(reference, generated, distance), within(reference, distance), within(generated, distance)
    )


@pytest.mark.parametrize("shift", [0.0, 0.7, 20.0])
def test_nearest_neighbour_accuracy_is_scikit_learns(shift):
    x, y = normal(40, 3), normal(40, 3, seed=1, shift=shift)
    rows, labels = torch.cat([x, y]).numpy(), np.repeat([0, 1], 40)
    told = []
    for left_out in range(80):
        others = np.arange(80) != left_out
        classifier = KNeighborsClassifier(1).fit(rows[others], labels[others])
        told.append(classifier.predict(rows[left_out : left_out + 1])[0] == labels[left_out])
    assert accuracy(to_clouds(x, 1), to_clouds(y, 1), Euclidean(squared=False)) == pytest.approx(np.mean(told))


@pytest.mark.parametrize("name", DISTANCES)
def test_shuffled_copies_are_met_and_covered(name):
    kind, _ = DISTANCES[name]
    distance, clouds = kind(squared=True), normal(12, 5, 3)
    copies = clouds[torch.randperm(12)] if name == "l2" else clouds[torch.randperm(12)][:, torch.randperm(5)]
    both = across(clouds, copies, distance)
    assert minimum_matching_distance(both) == 0
    assert coverage(both) == 1
    assert accuracy(clouds, copies, distance) == 0  # the nearest neighbour is always the copy
    same = clouds[:1].expand(6, -1, -1)
    assert accuracy(same, same, distance) == 0.5  # nothing to tell them by


# -- distributions ---------------------------------------------------------------------------------


def gaussian_mmd(shift, d, bandwidth):
    # E k of N(0, I) and N(m, I), whose difference is N(m, 2 I)
    factor = (bandwidth**2 / (bandwidth**2 + 2)) ** (d / 2)
    return 2 * factor * (1 - math.exp(-(shift**2) * d / (2 * (bandwidth**2 + 2))))


def test_kernel_mmd_is_unbiased_for_gaussians():
    d, shift, bandwidths, trials = 3, 0.6, [1.0, 2.5], 60
    values = torch.stack(
        [
            kernel_mmd(normal(80, d, seed=2 * t), normal(50, d, seed=2 * t + 1, shift=shift), bandwidths)
            for t in range(trials)
        ]
    )
    error = values.std(dim=0) / math.sqrt(trials)
    truth = torch.tensor([gaussian_mmd(shift, d, bandwidth) for bandwidth in bandwidths]).double()
    assert ((values.mean(dim=0) - truth).abs() < 3.5 * error).all()
    assert (error < truth / 5).all()
    null = torch.stack(
        [kernel_mmd(normal(50, d, seed=2 * t), normal(50, d, seed=2 * t + 1), [1.0]) for t in range(trials)]
    )
    assert abs(null.mean()) < 3.5 * null.std() / math.sqrt(trials)
    assert (null < 0).any()


@pytest.mark.parametrize("memory", [0.5, TINY])
def test_kernel_mmd_is_that_of_loops(memory):
    x, y = normal(11, 2), normal(7, 2, seed=1, shift=1.0)

    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(math.exp(-float(((a[i] - b[j]) ** 2).sum()) / (2 * 0.8**2)) for i, j in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert float(kernel_mmd(x, y, [0.8], memory)) == pytest.approx(expected, rel=1e-9)
    pairs = [float((x[i] - x[j]).norm()) for i in range(11) for j in range(i)]
    assert median_bandwidth(x) == pytest.approx(sorted(pairs)[27])
    assert median_bandwidth(x[:1].expand(5, -1)) == 1


@pytest.mark.parametrize("d", [1, 4])
def test_sliced_wasserstein_of_shifted_gaussians(d):
    """W2 of a direction is |θ·m|, and E (θ·m)² = |m|²/d."""
    x, shift = normal(1000, d), torch.full((d,), 2.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    exact = float(shift.norm()) / math.sqrt(d)
    # The same rows moved: the only error is that of 1000 directions, less than 2 % of deviation; on a line none.
    moved = sliced_wasserstein(x, x + shift, 1000, generator)
    assert moved == pytest.approx(exact, rel=0.05 if d > 1 else 1e-12)
    other = sliced_wasserstein(x, normal(800, d, seed=1, shift=2.0), 200, generator)
    assert other == pytest.approx(exact, rel=0.1)


@settings(max_examples=10)
@given(n=st.integers(1, 9), m=st.integers(1, 9))
def test_sliced_wasserstein_of_unequal_numbers_on_a_line(n, m):
    x, y = normal(n, 1), normal(m, 1, seed=1)
    repeated = zip(
        x.flatten().sort().values.repeat_interleave(m), y.flatten().sort().values.repeat_interleave(n), strict=True
    )
    expected = math.sqrt(np.mean([float(a - b) ** 2 for a, b in repeated]))
    for memory in (0.5, TINY):
        assert sliced_wasserstein(x, y, 5, torch.Generator(), memory) == pytest.approx(expected)


def test_kolmogorov_smirnov_is_scipys_and_the_definition():
    x, y = normal(60, 3), normal(45, 3, seed=1, shift=0.5)
    y[:, 2] = x[0, 2]  # ties
    found = kolmogorov_smirnov(x, y)
    for feature in range(3):
        a, b = x[:, feature].numpy(), y[:, feature].numpy()
        steps = [abs((a <= t).mean() - (b <= t).mean()) for t in np.concatenate([a, b])]
        assert float(found[feature]) == pytest.approx(max(steps))
        assert float(found[feature]) == pytest.approx(ks_2samp(a, b).statistic)
    # Of quantiles of N(0, 1) and N(1, 1), which differ most half-way.
    levels = (np.arange(5000) + 0.5) / 5000
    column = torch.from_numpy(norm.ppf(levels)[:, None])
    assert float(kolmogorov_smirnov(column, column + 1)) == pytest.approx(2 * norm.cdf(0.5) - 1, abs=1e-3)


# -- all of them -----------------------------------------------------------------------------------


def values(rows):
    return {(row["metric"], row["distance"]): row["value"] for row in rows}


@pytest.mark.parametrize("cloud_size", [1, 5])
def test_all_metrics_of_a_shuffled_copy(cloud_size):
    x = normal(40, 3)
    order = torch.cat([start + torch.randperm(5) for start in range(0, 40, 5)])  # within the clouds
    found = values(SampleMetrics(x, cloud_size=cloud_size, projections=20).measure(x[order]))
    assert {metric for metric, _ in found} == set(METRICS)
    for (metric, _), value in found.items():
        if metric == "coverage":
            assert value == 1
        elif metric == "kernel_mmd":
            assert value < 0  # the unbiased estimate counts no row against itself
        else:
            assert value == pytest.approx(0, abs=1e-12), metric


@pytest.mark.parametrize("cloud_size", [1, 4])
def test_memory_and_repetition_change_nothing(cloud_size):
    x, y = normal(42, 3), normal(30, 3, seed=1)
    usual = values(SampleMetrics(x, cloud_size=cloud_size, projections=20).measure(y))
    assert usual == values(SampleMetrics(x, cloud_size=cloud_size, projections=20).measure(y))
    little = values(SampleMetrics(x, cloud_size=cloud_size, projections=20, memory=TINY).measure(y))
    assert little == pytest.approx(usual, rel=1e-9)
    other = values(SampleMetrics(x, cloud_size=cloud_size, projections=20, seed=1).measure(y))
    assert {key for key in usual if usual[key] != other[key]} == {("sliced_wasserstein", "2-wasserstein")}


def test_rows_say_what_they_depend_on():
    x, y = normal(42, 3), normal(30, 3, seed=1)
    rows = SampleMetrics(x, cloud_size=4).measure(y)
    used = {
        (row["metric"], row["distance"]): (row["n_reference"], row["n_generated"], row["cloud_size"]) for row in rows
    }
    assert used["chamfer", "chamfer"] == used["earth_mover", "emd"] == (28, 28, 4)
    assert used["coverage", "chamfer"] == (40, 28, 4)
    assert used["coverage", "l2"] == (42, 30, 1)
    assert used["nearest_neighbour_accuracy", "l2"] == (30, 30, 1)
    squared = {row["distance"]: row["squared"] for row in rows if row["metric"] == "coverage"}
    assert squared == {"chamfer": True, "emd": False, "l2": True}
    assert all(row["squared"] for row in SampleMetrics(x, ("coverage",), 4, squared=True).measure(y))
    (mover,) = SampleMetrics(x, ("earth_mover",)).measure(y)
    assert (mover["cloud_size"], mover["solved"]) == (30, "exact")
    expected = float(EarthMover(squared=False).between(x[None, :30], y[None]))
    assert mover["value"] == pytest.approx(expected)
    pairs = Chamfer(squared=True).between(to_clouds(x[:28], 4), to_clouds(y[:28], 4))
    assert values(rows)["chamfer", "chamfer"] == pytest.approx(float(pairs.mean()))
