"""The comparison at equal budgets: its commands compose, and its page says what was measured."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    compare = importlib.import_module("compare")
CONTENDERS = [(data, name) for data in compare.DATA for name in compare.contenders(data)]


@pytest.mark.parametrize(("data", "name"), CONTENDERS)
def test_every_command_composes(data, name, lab_config):
    config = lab_config(*compare.command(data, name, minutes=1.5, threads=1))
    assert config.trainer.max_time == "00:00:01:30"
    assert config.threads == 1
    assert (config.model.name == "nsf") == name.startswith("nsf")


def test_the_best_recipe_gets_steps_for_its_time(lab_config):
    matching, likelihood = compare.DATA["power"]["steps"]
    config = lab_config(*compare.command("power", "best", minutes=3.0, threads=2))
    assert config.objective.flow_matching.steps == 6 * matching
    assert config.objective.likelihood.steps == 6 * likelihood


def test_the_curve_pairs_values_with_the_time_of_their_epoch(tmp_path: Path):
    table = tmp_path / "metrics.csv"
    table.write_text(
        "step,time/elapsed_seconds,val/nll\n9,,2.5\n9,1.04,\n19,2.0,\n29,,1.5\n29,3.0,\n39,,1.0\n"  # the last was cut
    )
    assert compare.curve(table) == [[1.0, -2.5], [3.0, -1.5]]


def test_the_gaussian_is_that_of_the_training_rows(tmp_path: Path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 2)) @ np.array([[1.0, 0.5], [0.0, 2.0]]) + 3
    np.save(tmp_path / "rows.npy", rows)
    common = ["dataset=custom", f"dataset.path={tmp_path / 'rows.npy'}", "dataset.shuffle=false"]
    monkeypatch.setitem(compare.DATA, "drawn", {"common": common, "nsf": []})
    train, test = rows[:320], rows[360:]
    centred = test - train.mean(axis=0)
    covariance = np.cov(train.T, ddof=0)
    squared = np.einsum("ij,jk,ik->i", centred, np.linalg.inv(covariance), centred)
    expected = -0.5 * (squared + np.linalg.slogdet(2 * np.pi * covariance).logabsdet)
    found = compare.gaussian("drawn")
    assert found["log_likelihood"] == pytest.approx(expected.mean())
    assert found["standard_error"] == pytest.approx(expected.std(ddof=1) / len(test) ** 0.5)


def test_the_page_and_its_curves(tmp_path: Path, monkeypatch):
    def fit(nll, curve, solver):
        context = {"solver": solver, "machine": "a machine", "command": f"python -m cnf_lab.train x={nll}"}
        report = {"test/nll": nll, "test/nll_standard_error": 0.1, "time/fit_seconds": 60.0, "train/steps": 7.0}
        return {"report": {**report, "context": context}, "train": 1.5, "curve": curve, "minutes": 1.0, "threads": 1}

    content = {
        "data": "power",
        "gaussian": {"log_likelihood": -7.0, "standard_error": 0.05},
        "contenders": {
            "nsf": fit(-0.5, [[10.0, 0.1], [20.0, 0.4]], None),
            "best": fit(-1.0, [[5.0, 0.9]], {"method": "dopri5", "rtol": 1e-6}),
            "ffjord": fit(6.0, [], {"method": "dopri5", "rtol": 1e-6}),
        },
    }
    (tmp_path / "compare_power_1min.json").write_text(json.dumps(content))
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    compare.tables()
    page = (tmp_path / "COMPARE.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| recipe", "| Gaussian", "| best", "| nsf", "| ffjord"]
    assert "| best | 1.00 ± 0.10 | +8.00 | none in the budget | 1.50 | 60 | 7 | dopri5 1e-06, exact |" in rows
    assert "closed form" in rows[3]
    assert "    python -m cnf_lab.train x=-0.5" in page
    assert (tmp_path / "compare_power_1min.png").stat().st_size > 5000
