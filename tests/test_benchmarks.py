"""The benchmarks time what they say: baseline and cnf_lab compute the same, and their reports add up."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Hutchinson, Rademacher

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROWS = ["MINIBOONE", "POWER"]
ALL = [*ROWS, "MNIST, one block"]


def load(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return importlib.import_module(name)


cases, baseline, peers, bench, table = map(load, ("cases", "baseline", "peers", "bench", "table"))
SETTING = bench.Setting("cpu", small=True, compile=False)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Leave the machine's load out of it."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


def pair(name, estimator, solver, **options):
    """Both at a small shape in float64, with rows and a probe."""
    case = SETTING.case(name)
    ours = cases.Ours(case, "cpu", estimator, RungeKuttaSolver(**solver))
    ours.flow.double()
    theirs = baseline.Baseline(case.network("cpu").double(), **options)
    x = case.x("cpu").double()
    probe = Rademacher()(tuple(x.shape), x, torch.Generator().manual_seed(0))
    return ours.flow, theirs, x, probe


@pytest.mark.parametrize("name", ALL)
def test_networks_carry_the_same_weights(name):
    flow, theirs, x, _ = pair(name, Exact(), {"method": "rk4", "steps": 1})
    t = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(theirs.network(t, x), flow.transform.field(t, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("graph", [True, False])
def test_loop_is_the_trace_of_the_jacobian(name, graph):
    _, theirs, x, _ = pair(name, Exact(), {"method": "rk4", "steps": 1})
    t = torch.tensor(0.3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: theirs.network(t, row.unsqueeze(0))[0]))(x)
    x.requires_grad_()
    div = baseline._loop(theirs.network(t, x), x, graph)
    torch.testing.assert_close(div, jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-11, atol=1e-11)
    assert div.requires_grad == graph


@pytest.mark.parametrize(("name", "exact"), [*((name, True) for name in ROWS), *((name, False) for name in ALL)])
def test_solves_agree(name, exact):
    grid = {"method": "rk4", "steps": 3}
    flow, theirs, x, probe = pair(name, Exact() if exact else Hutchinson(Rademacher()), grid, **grid)
    with torch.no_grad():
        mapped = flow.pull_back(x, None, torch.Generator().manual_seed(0))
        z, log_det = theirs.pull_back(x, None if exact else probe)
    torch.testing.assert_close(mapped.value, z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mapped.log_det, log_det, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        theirs.log_prob(x, None if exact else probe), flow.base.log_prob(z) + log_det, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("adjoint", [True, False])
def test_gradients_of_a_training_step_agree(adjoint):
    solver = {"method": "dopri5", "atol": 1e-9, "rtol": 1e-9}
    flow, theirs, x, probe = pair("POWER", Hutchinson(Rademacher()), solver, adjoint=adjoint, tolerance=1e-9)
    theirs.log_prob(x, probe).mean().backward()
    flow.log_prob(x, None, torch.Generator().manual_seed(0)).mean().backward()
    found = {name: parameter.grad for name, parameter in theirs.network.named_parameters()}
    for name, parameter in flow.transform.field.named_parameters():
        torch.testing.assert_close(found[name.removeprefix("stack.")], parameter.grad, rtol=1e-6, atol=1e-8)


def test_the_multiscale_flow_agrees_with_the_baseline_and_so_do_its_gradients():
    case, grid = SETTING.case("MNIST, multiscale"), {"method": "rk4", "steps": 2}
    ours = cases.Ours(case, "cpu", Hutchinson(Rademacher()), RungeKuttaSolver(**grid))
    theirs = case.baseline("cpu", adjoint=False, **grid)
    flow, x = ours.flow.double(), case.x("cpu").double()
    theirs.network.double()
    probes = case.probe(x, torch.Generator().manual_seed(0))
    mapped = flow.pull_back(x, None, torch.Generator().manual_seed(0))
    z, log_det = theirs.pull_back(x, probes)
    torch.testing.assert_close(case.latents(mapped.value), z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mapped.log_det, log_det, rtol=1e-11, atol=1e-11)
    theirs.log_prob(x, probes).mean().backward()
    flow.log_prob(x, None, torch.Generator().manual_seed(0)).mean().backward()
    for found, expected in zip(flow.parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("exact", [True, False])
def test_the_posterior_agrees_with_the_baseline_and_so_do_its_gradients(exact):
    case, grid = SETTING.case("MNIST, posterior"), {"method": "rk4", "steps": 2}
    ours = cases.Ours(case, "cpu", Exact() if exact else Hutchinson(Rademacher()), RungeKuttaSolver(**grid))
    theirs = case.baseline("cpu", adjoint=False, **grid)
    flow, x, context = ours.flow.double(), ours.x.double(), ours.context.double()
    theirs.network.double()
    theirs.features = context
    probes = None if exact else case.probe(x, torch.Generator().manual_seed(0))
    mapped = flow.pull_back(x, context, torch.Generator().manual_seed(0))
    z, log_det = theirs.pull_back(x, probes)
    torch.testing.assert_close(mapped.value, z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mapped.log_det, log_det, rtol=1e-11, atol=1e-11)
    assert mapped.log_det.abs().max() > 0.1
    theirs.log_prob(x, probes).mean().backward()
    flow.log_prob(x, context, torch.Generator().manual_seed(0)).mean().backward()
    for found, expected in zip(flow.parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("gradient", "backward"), [("direct", 0), ("checkpoint", 12), ("adjoint", 12)])
def test_evaluations_of_our_steps(gradient, backward):
    solver = RungeKuttaSolver("rk4", steps=3, gradient=gradient)
    run = cases.Ours(SETTING.case("MINIBOONE"), "cpu", Exact(), solver)()
    assert (run.nfe_forward, run.nfe_backward) == (12, backward)


@pytest.mark.parametrize(("adjoint", "backward"), [(True, 12), (False, 0)])
def test_evaluations_of_the_baseline(adjoint, backward):
    case = SETTING.case("MINIBOONE")
    found = baseline.Baseline(case.network("cpu"), "rk4", steps=3, adjoint=adjoint)
    run = cases.Theirs(case, found, "cpu")()
    assert (run.nfe_forward, run.nfe_backward) == (12, backward)
    assert found.evaluations == 12 + backward


def test_low_precision_of_the_baseline_is_the_fields_alone():
    case = SETTING.case("MINIBOONE")
    network = case.network("cpu")
    seen = []
    network.layers[0].linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    log_prob = baseline.Baseline(network, "rk4", steps=1, low_precision=torch.bfloat16).log_prob(case.x("cpu"))
    assert set(seen) == {torch.bfloat16}
    assert log_prob.dtype == torch.float32


# ---------------------------------------------------------------------------------------------- harness


def test_other_weights_stop_the_benchmark(monkeypatch):
    network = cases.Case.network

    def changed(self, device, *view):
        found = network(self, device, *view)
        with torch.no_grad():
            found.layers[1].linear.weight[0, 0] += 1
        return found

    monkeypatch.setattr(cases.Case, "network", changed)
    with pytest.raises(bench.Disagreement, match="log-det|latent"):
        bench.measure(bench.step_rk4(SETTING), "cpu", 1)


def test_other_losses_stop_the_benchmark():
    contenders = [
        bench.Contender("one", lambda: lambda: cases.Run(1.0, 4, 0), "same"),
        bench.Contender("other", lambda: lambda: cases.Run(1.1, 4, 0), "same"),
    ]
    figure = bench.Figure("a comparison", SETTING.case("POWER"), 12, contenders)
    with pytest.raises(bench.Disagreement, match=r"other has loss 1\.100000, one 1\.000000"):
        bench.measure(figure, "cpu", 1)


def test_contenders_run_interleaved_and_a_failure_leaves_the_others():
    order = []

    def make(name):
        return lambda: lambda: (order.append(name), cases.Run(0.0, 1, 2))[1]

    def fail():
        raise RuntimeError("no such thing\nmore")

    contenders = [bench.Contender("a", make("a")), bench.Contender("broken", fail), bench.Contender("b", make("b"))]
    figure = bench.Figure("order", SETTING.case("POWER"), 12, contenders, "a", ["broken", "b"], most_repeats=3)
    report = bench.measure(figure, "cpu", 5)
    found = report["contenders"]
    assert order == ["a", "b"] * 4  # the first round warms up
    assert [len(contender["seconds"]) for contender in found] == [3, 0, 3]
    assert found[1]["error"] == "RuntimeError: no such thing"
    assert report["headline"] == "b"
    assert (found[0]["nfe_forward"], found[0]["nfe_backward"]) == (1, 2)


@pytest.mark.parametrize(("ratio", "expected"), [("gain", 2.0), ("overhead", 0.5)])
def test_ratios(ratio, expected):
    figure = bench.Figure("ratios", SETTING.case("POWER"), 12, [], "slow", ratio=ratio)
    reports = [{"name": "slow", "median_seconds": 4.0}, {"name": "fast", "median_seconds": 2.0}, {"name": "none"}]
    bench.add_ratios(figure, reports)
    assert [report.get("ratio") for report in reports] == [1.0, expected, None]


def test_quartiles():
    assert bench.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert bench.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        held = [torch.empty(2**18), torch.empty(2**18)]  # 1 MiB each
        held.pop()
        held.append(torch.empty(2**17))
        return cases.Run(0.0, 0, 0)

    assert bench.with_peak_memory(run, "cpu") == (cases.Run(0.0, 0, 0), 2.0)


def test_checkpointing_holds_less():
    found = bench.measure(bench.memory(SETTING), "cpu", 1)["contenders"]
    direct, checkpoint, _ = (contender["peak_mib"] for contender in found)
    assert checkpoint < direct / 4
    assert found[1]["ratio"] == pytest.approx(direct / checkpoint)


def test_command_writes_a_report(tmp_path):
    output = tmp_path / "deep" / "bench.json"
    figures = "step_rk4,log_prob_43,overhead_training,step_conv,step_posterior"
    arguments = ["--small", "--no-compile", "--repeats", "2", "--figures", figures, "--output", str(output)]
    assert bench.main(arguments) == 0
    report = json.loads(output.read_text())
    assert list(report["figures"]) == figures.split(",")
    context = report["context"]
    assert context["command"].endswith(f"--output {output}")
    assert {"torch", "torchdiffeq", "cnf-lab"} <= set(context["versions"])
    assert context["machine"]["threads"] == torch.get_num_threads()
    for name, figure in report["figures"].items():
        contenders = {contender["name"]: contender for contender in figure["contenders"]}
        assert {figure["reference"], figure["headline"]} <= set(contenders)
        for contender in contenders.values():
            low, median, high = (
                contender[f"{which}_seconds"] for which in ("lower_quartile", "median", "upper_quartile")
            )
            assert 0 < contender["fastest_seconds"] <= low <= median <= high
            assert contender["nfe_forward"] == {"step_conv": 4, "step_posterior": 8}.get(name, 16)
            gain = contenders[figure["reference"]]["median_seconds"] / median
            assert contender["ratio"] == pytest.approx(gain if figure["ratio"] == "gain" else 1 / gain)


def test_small_report_goes_to_stdout(capsys):
    assert bench.main(["--small", "--no-compile", "--repeats", "1", "--figures", "step_dopri5"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]["step_dopri5"]["contenders"]
    assert [contender["name"] for contender in found][0] == "baseline"
    assert found[1]["nfe_backward"] == 0 < found[0]["nfe_backward"]


@pytest.mark.parametrize("arguments", [["--figures", "step_rk5"], ["--repeats", "0"]])
def test_wrong_options(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "Expected" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_contenders_agree(tmp_path):
    # Run apart: the runtime checks of the tests stop the compiler.
    output = tmp_path / "bench.json"
    command = [sys.executable, FOLDER / "bench.py", "--small", "--repeats", "1", "--figures", "step_rk4"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["figures"]["step_rk4"]
    compiled = [contender for contender in found["contenders"] if "compiled" in contender["name"]]
    assert len(compiled) == 2
    assert all(contender["first_seconds"] > contender["median_seconds"] for contender in compiled)
    assert found["headline"] == "exact, direct, compiled"


# ------------------------------------------------------------------------------------------------ peers


def test_zuko_is_timed_on_its_own_loss():
    pytest.importorskip("zuko")
    case = SETTING.case("MINIBOONE")
    found = peers.Zuko(case, "cpu", 1e-5, exact=True)
    run = found()
    with torch.no_grad():
        assert run.loss == pytest.approx(-float(found.flow().log_prob(case.x("cpu")).mean()), rel=1e-5)
    # Six evaluations per accepted step on the way back, seven per step tried on the way there.
    assert run.nfe_forward % 7 == 0 < run.nfe_backward
    assert run.nfe_backward % 6 == 0


@pytest.mark.parametrize(("package", "figure"), [("torchdyn", "torchdyn"), ("zuko", "zuko_exact")])
def test_missing_package_is_skipped(package, figure, monkeypatch, capsys):
    for module in (package, f"{package}.core", f"{package}.models", f"{package}.nn"):
        monkeypatch.setitem(sys.modules, module, None)
    assert bench.main(["--small", "--no-compile", "--figures", figure]) == 0
    captured = capsys.readouterr()
    assert "pip install" in captured.err
    assert "pip install" in json.loads(captured.out)["figures"][figure]["skipped"]


# ------------------------------------------------------------------------------------------------ table


@pytest.fixture
def root(tmp_path):
    """A project with a report, and READMEs with markers."""
    contender = {"nfe_forward": 16, "lower_quartile_seconds": 0.0101, "upper_quartile_seconds": 2.5}
    contenders = [
        contender | {"name": "baseline", "nfe_backward": 16, "median_seconds": 1.2345, "peak_mib": 115.2, "ratio": 1.0},
        contender | {"name": "exact", "nfe_backward": 0, "median_seconds": 0.0123, "peak_mib": 9.87, "ratio": 100.4},
        {"name": "broken", "seconds": [], "error": "a | b"},
    ]
    case = {"name": "MINIBOONE", "what": "as published", "event_shape": [43], "hidden": [860, 860], "rows": 1000}
    figure = {"title": "training step", "reference": "baseline", "headline": "exact", "quantity": "seconds"}
    figure |= {"ratio": "gain", "note": "Known.", "case": case, "contenders": contenders}
    memory = figure | {"quantity": "peak_mib", "title": "memory"}
    by_steps = [
        contenders[1] | {"name": f"{gradient}, {count} evaluations"}
        for count in (16, 32)
        for gradient in ("direct", "checkpoint")
    ]
    gradients = {"title": "by gradient", "reference": None, "case": case, "contenders": by_steps, "note": ""}
    gradients |= {"headline": None, "quantity": "seconds", "ratio": "gain"}
    figures = {"step": figure, "memory": memory, "gradients": gradients}
    figures |= {"peer": {"skipped": "torchdyn: pip install torchdyn"}}
    machine = {"cpu": "Some CPU", "cores": 2, "flags": ["avx2"]}
    context = {"machine": machine, "versions": {"torch": "2.15.0"}, "commit": "abc", "date": "2026-11-24T00:00:00"}
    (tmp_path / "results").mkdir()
    report = {"context": context | {"command": "python benchmarks/bench.py"}, "figures": figures}
    (tmp_path / "results" / "bench_cpu.json").write_text(json.dumps(report))
    (tmp_path / "benchmarks").mkdir()
    for name in ("README.md", "benchmarks/README.md"):
        markers = ("bench", "gradients")
        marked = "".join(f"<!-- {marker}:begin -->\nold\n<!-- {marker}:end -->\n\n" for marker in markers)
        (tmp_path / name).write_text(f"# Before\n\n{marked}After\n")
    return tmp_path


def test_tables_are_written_between_the_markers(root, capsys):
    assert table.main(["--check"], root) == 1
    assert "Type python benchmarks/table.py." in capsys.readouterr().err
    assert "old" in (root / "README.md").read_text()
    assert table.main([], root) == 0
    assert table.main(["--check"], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("# Before")
    assert text.endswith("After\n")
    assert "old" not in text
    step = "| MINIBOONE (43, 860-860, 1000 rows), training step |"
    assert f"{step} baseline: 1.23 s (16 + 16) | exact: 12.3 ms (16 + 0) | 100× |" in text
    assert "| baseline: 115 MiB | exact: 9.87 MiB | 100× |" in text
    assert "| forward | `direct` | `checkpoint` |" in text
    assert "| 16 evaluations | 12.3 ms, 9.87 MiB | 12.3 ms, 9.87 MiB |" in text
    full = (root / "benchmarks" / "README.md").read_text()
    assert "| exact | 16 + 0 | 12.3 ms | 10.1 ms – 2.5 s | 9.87 MiB | 100× |" in full
    assert "| broken | – | a \\| b | – | – | – |" in full
    assert "skipped, not installed: torchdyn: pip install torchdyn" in full
    assert all(line.count(" | ") == 5 for line in full.splitlines() if line.startswith("| exact"))


def test_stale_table_fails_the_check(root):
    assert table.main([], root) == 0
    path = root / "results" / "bench_cpu.json"
    path.write_text(path.read_text().replace("1.2345", "2.3456"))
    assert table.main(["--check"], root) == 1


def test_missing_markers(root, capsys):
    (root / "README.md").write_text("# Nothing\n")
    assert table.main([], root) == 1
    assert "README.md: Expected the markers" in capsys.readouterr().err


def test_small_cases_keep_the_form():
    for case in cases.CASES.values():
        small = case.small()
        assert len(small.hidden) == len(case.hidden)
        assert len(small.event_shape) == len(case.event_shape)
        assert replace(small, event_shape=case.event_shape, hidden=case.hidden, rows=case.rows) == case
