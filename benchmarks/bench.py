"""Time cnf_lab against the original's formulation and other packages: ``python benchmarks/bench.py --device cpu``.

A figure is a comparison of contenders on one shape. They run interleaved, so that a machine that
others use as well slows all of them, and medians, quartiles and ratios of medians are reported.
Before anything is timed, cnf_lab and the baseline must agree.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from baseline import Baseline
from cases import CASES, SEED, Case, Missing, Ours, Run, Theirs
from peers import Torchdyn, Zuko

from cnf_lab.ode import OdeSolver, RungeKuttaSolver, TorchdiffeqSolver
from cnf_lab.trace import DivergenceEstimator, Exact, Hutchinson, Rademacher

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5  # of adaptive solves, the original's for images and in the comparisons of the literature
EAGER = ("eager", False)
COMPILED = {
    "cpu": [("compiled", "default")],
    "cuda": [("compiled", "default"), ("CUDA graphs", "reduce-overhead")],
}
PACKAGES = ("torch", "torchdiffeq", "cnf-lab", "zuko", "torchdyn", "numpy")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


class Disagreement(Exception):
    """Contenders that must compute the same do not."""


@dataclass(frozen=True)
class Contender:
    """One way to do what a figure is about.

    Attributes:
        name: Name within the figure.
        make: Makes the timed function.
        same: Contenders with the same text have the same loss; None for one that is not comparable.
        closeness: How close its loss must be to the first one's, relatively.
        compiled: Whether its first run compiles.
    """

    name: str
    make: Callable[[], Callable[[], Run]]
    same: str | None = None
    closeness: float = 1e-4
    compiled: bool = False


@dataclass(frozen=True)
class Figure:
    """A comparison.

    Attributes:
        title: What is compared.
        case: The shape.
        rows: Number of rows.
        contenders: In the order of a round.
        reference: Name of the contender that ratios are to; None for no ratios.
        headline: Names of contenders; the first that did not fail stands for cnf_lab in the short table.
        quantity: ``seconds`` or ``peak_mib``, of which ratios are taken.
        ratio: ``gain`` of a contender over the reference, or its ``overhead``.
        most_repeats: Rounds at most, where a round is long.
        note: What to know.
        check: Compares cnf_lab and the baseline; raises Disagreement.
    """

    title: str
    case: Case
    rows: int
    contenders: Sequence[Contender]
    reference: str | None = None
    headline: Sequence[str] = ()
    quantity: str = "seconds"
    ratio: str = "gain"
    most_repeats: int = 1000
    note: str = ""
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Setting:
    """Where and how large figures are."""

    device: str
    small: bool
    compile: bool

    def case(self, name: str) -> Case:
        """Return a case, shrunk where asked for."""
        return CASES[name].small() if self.small else CASES[name]

    def rows(self, case: Case, cpu: int | None = None) -> int:
        """Return the batch of a case, or another one where a CPU has to do with less."""
        return cpu if cpu and self.device == "cpu" and not self.small else case.rows[self.device]

    @property
    def modes(self) -> list[tuple[str, Any]]:
        """Names and values of ``compile``."""
        return [EAGER, *(COMPILED[self.device] if self.compile else [])]


# ------------------------------------------------------------------------------------------- contenders


def grid(steps: int) -> dict[str, Any]:
    """Return the options of rk4 with equal steps, 4 evaluations each."""
    return {"method": "rk4", "steps": steps}


ADAPTIVE: dict[str, Any] = {"method": "dopri5"}


def baseline(setting: Setting, case: Case, name: str = "baseline", **options: Any) -> Contender:
    """Return a training step of the baseline."""
    low = options.get("low_precision")

    def make() -> Theirs:
        return Theirs(case, case.baseline(setting.device, tolerance=TOLERANCE, **options), setting.device)

    return Contender(name, make, "probe", closeness(low))


def ours(
    setting: Setting,
    case: Case,
    estimator: DivergenceEstimator,
    solver: dict[str, Any],
    gradients: Sequence[str] = ("direct",),
    modes: Sequence[tuple[str, Any]] = (EAGER,),
    low_precision: torch.dtype | None = None,
    rows: int | None = None,
) -> list[Contender]:
    """Return training steps of cnf_lab, one per gradient and mode of compilation."""
    made = []
    for gradient in gradients:
        for mode, compile in modes:
            options = {**solver, "atol": TOLERANCE, "rtol": TOLERANCE, "gradient": gradient, "compile": compile}

            def make(options: dict[str, Any] = options) -> Ours:
                solver = RungeKuttaSolver(**options)
                return Ours(case, setting.device, estimator, solver, low_precision, rows=rows)

            exact, name = estimator.exact, "exact" if estimator.exact else "Hutchinson"
            same = "exact" if exact else "probe"
            made.append(Contender(f"{name}, {gradient}, {mode}", make, same, closeness(low_precision), bool(compile)))
    return made


def closeness(low_precision: torch.dtype | None) -> float:
    """Return how close losses must be: round-off of the precision, with room for the solve."""
    return 1e-4 if low_precision is None else 2e-2


def hutchinson() -> DivergenceEstimator:
    """Return the estimator of the baseline, by forward mode."""
    return Hutchinson(Rademacher())


def agreement(setting: Setting, case: Case) -> Callable[[], None]:
    """Return a check that latents and log-dets of both are the same, exact and with the same probe.

    On a fixed grid: torchdiffeq's dopri5 steps over the end and interpolates, with an error of its own.
    """
    solver = grid(4)

    def check() -> None:
        exact = (True,) if len(case.event_shape) == 1 else ()
        for exactly in (*exact, False):
            rows = min(8, case.rows[setting.device])
            x, context = case.x(setting.device, rows), case.context(setting.device, rows)
            estimator = Exact() if exactly else hutchinson()
            flow = Ours(case, setting.device, estimator, RungeKuttaSolver(**solver)).flow
            generator = torch.Generator(x.device)
            probe = case.probe(x, generator.manual_seed(SEED))
            with torch.no_grad():
                mapped = flow.pull_back(x, context, generator.manual_seed(SEED))
                found = case.baseline(setting.device, **solver).pull_back(x, None if exactly else probe)
            mine = (case.latents(mapped.value), mapped.log_det)
            for what, one, other in zip(("latent", "log-det"), mine, found, strict=True):
                difference = float((one - other).abs().max())
                if not difference <= 1e-4 * max(1.0, float(other.abs().max())):
                    raise Disagreement(f"{what} of cnf_lab and the baseline differ by {difference:.2g} at {case.name}")

    return check


# ---------------------------------------------------------------------------------------------- figures


def step_rk4(setting: Setting) -> Figure:
    """A training step with equal evaluations."""
    case, solver = setting.case("MINIBOONE"), grid(4)
    contenders = [
        baseline(setting, case, **solver),
        baseline(setting, case, "baseline, direct gradient", adjoint=False, **solver),
        *ours(setting, case, Exact(), solver, ("direct", "checkpoint"), setting.modes),
        *ours(setting, case, hutchinson(), solver),
    ]
    return training(setting, case, "training step, rk4 with 4 steps, float32", contenders)


def step_dopri5(setting: Setting) -> Figure:
    """A training step with the original's solver."""
    case = setting.case("MINIBOONE")
    # A CPU would compile longer than it runs: step_rk4 shows what that gains.
    modes = [EAGER] if setting.device == "cpu" else setting.modes
    contenders = [
        baseline(setting, case, **ADAPTIVE),
        *ours(setting, case, Exact(), ADAPTIVE, ("direct", "checkpoint"), modes),
    ]
    return training(setting, case, "training step, dopri5 at 1e-5, float32", contenders)


def step_bf16(setting: Setting) -> Figure:
    """A training step with the field in bfloat16."""
    case, solver, low = setting.case("MINIBOONE"), grid(4), torch.bfloat16
    contenders = [
        baseline(setting, case, **solver),
        baseline(setting, case, "baseline, bfloat16 field", low_precision=low, **solver),
        *ours(setting, case, Exact(), solver, ("direct",), setting.modes, low),
        *ours(setting, case, Exact(), solver, ("checkpoint",), (EAGER,), low),
    ]
    title = "training step, rk4 with 4 steps, field in bfloat16"
    note = "The baseline is float32 as the original is; state, log-det and gradients are float32 everywhere."
    return training(setting, case, title, contenders, note=note)


def step_power(setting: Setting) -> Figure:
    """A training step of a small field with three hidden layers."""
    case, solver = setting.case("POWER"), grid(4)
    contenders = [
        baseline(setting, case, **solver),
        *ours(setting, case, Exact(), solver, modes=setting.modes),
        *ours(setting, case, hutchinson(), solver, modes=setting.modes),
    ]
    return training(setting, case, "training step, rk4 with 4 steps, float32", contenders)


def step_conv(setting: Setting) -> Figure:
    """A training step of a convolutional field."""
    case, solver = setting.case("MNIST, one block"), grid(1)
    contenders = [
        baseline(setting, case, **solver),
        *ours(setting, case, hutchinson(), solver, modes=setting.modes),
        *ours(setting, case, hutchinson(), solver, ("checkpoint",)),
        *renamed("bfloat16 field", ours(setting, case, hutchinson(), solver, low_precision=torch.bfloat16)),
    ]
    title = "training step, rk4 with 1 step, float32"
    return training(setting, case, title, contenders, "Hutchinson", most_repeats=3)


def step_multiscale(setting: Setting) -> Figure:
    """A training step of the published flow of MNIST."""
    case, solver = setting.case("MNIST, multiscale"), grid(1)
    contenders = [
        baseline(setting, case, **solver),
        *ours(setting, case, hutchinson(), solver, modes=setting.modes),
        *ours(setting, case, hutchinson(), solver, ("checkpoint",)),
        *renamed("bfloat16 field", ours(setting, case, hutchinson(), solver, low_precision=torch.bfloat16)),
    ]
    title = "training step, rk4 with 1 step in each block, float32"
    return training(setting, case, title, contenders, "Hutchinson", most_repeats=3)


def step_posterior(setting: Setting) -> Figure:
    """A training step of the published posterior of MNIST's autoencoder, and of ours."""
    case, solver = setting.case("MNIST, posterior"), grid(1)
    gated = RungeKuttaSolver(**solver, atol=TOLERANCE, rtol=TOLERANCE)
    contenders = [
        baseline(setting, case, **solver),
        *ours(setting, case, hutchinson(), solver, ("direct", "checkpoint"), setting.modes[:1]),
        *renamed("bfloat16 field", ours(setting, case, hutchinson(), solver, low_precision=torch.bfloat16)),
        Contender("gates, exact, direct, eager", lambda: Ours(case, setting.device, Exact(), gated, gated=True)),
    ]
    title = "training step, rk4 with 1 step in each block, float32"
    note = (
        "Gates are our posterior: another field of the same widths, with 4,160 values per row and block, not 272,448."
    )
    return training(setting, case, title, contenders, "Hutchinson", note, most_repeats=3)


def training(
    setting: Setting,
    case: Case,
    title: str,
    contenders: Sequence[Contender],
    headline: str = "exact",
    note: str = "",
    most_repeats: int = 1000,
) -> Figure:
    """Return a figure of training steps against the baseline."""
    names = [contender.name for contender in contenders]
    shown = [name for mode, _ in setting.modes[::-1] if (name := f"{headline}, direct, {mode}") in names]
    check = agreement(setting, case)
    rows = case.rows[setting.device]
    return Figure(title, case, rows, contenders, "baseline", shown, most_repeats=most_repeats, note=note, check=check)


def renamed(suffix: str, contenders: Sequence[Contender]) -> list[Contender]:
    """Return contenders with a suffix to their names."""
    return [
        Contender(f"{found.name}, {suffix}", found.make, found.same, found.closeness, found.compiled)
        for found in contenders
    ]


def log_prob(
    setting: Setting, name: str, solver: dict[str, Any], cpu_rows: int, most_repeats: int, note: str = ""
) -> Figure:
    """An exact log-density against a loop over the dimensions."""
    case = setting.case(name)
    rows, device = setting.rows(case, cpu_rows), setting.device

    def loop() -> Theirs:
        found = Baseline(case.network(device), adjoint=False, keep_graph=False, **solver)
        return Theirs(case, found, device, exact=True, train=False, rows=rows)

    def exact(compile: Any) -> Callable[[], Ours]:
        solved = RungeKuttaSolver(**solver, compile=compile)
        return lambda: Ours(case, device, Exact(), solved, train=False, rows=rows)

    modes = [EAGER] if device == "cpu" and most_repeats <= 2 else setting.modes
    contenders = [Contender("baseline, loop", loop, "exact")]
    contenders += [Contender(f"exact, {mode}", exact(value), "exact", compiled=bool(value)) for mode, value in modes]
    steps = solver["steps"]
    title = f"exact log p(x), {solver['method']} with {steps} step{'s' * (steps > 1)}, float32"
    shown = [f"exact, {mode}" for mode, _ in modes[::-1]]
    check = agreement(setting, case)
    return Figure(
        title, case, rows, contenders, "baseline, loop", shown, most_repeats=most_repeats, note=note, check=check
    )


def log_prob_43(setting: Setting) -> Figure:
    """Two hidden layers, D = 43."""
    return log_prob(setting, "MINIBOONE", grid(4), 1000, 3)


def log_prob_63(setting: Setting) -> Figure:
    """Two hidden layers, D = 63."""
    return log_prob(setting, "BSDS300, two layers", grid(1), 1000, 3)


def log_prob_63_deep(setting: Setting) -> Figure:
    """Three hidden layers, D = 63."""
    note = "No closed form: the products meet in the middle layer, where rows outnumber units."
    return log_prob(setting, "BSDS300", {"method": "euler", "steps": 1}, 1280, 2, note)


def overhead_forward(setting: Setting) -> Figure:
    """What a solve costs beyond its evaluations."""
    return overhead(setting, train=False)


def overhead_training(setting: Setting) -> Figure:
    """What a training step costs beyond its evaluations, each with its own backward pass."""
    return overhead(setting, train=True)


def overhead(setting: Setting, train: bool) -> Figure:
    """The time of a solve over the time of as many bare evaluations."""
    case, steps, device = setting.case("MINIBOONE"), 4, setting.device

    def bare() -> Callable[[], Run]:
        return lambda: evaluations(field, x, 4 * steps, train)

    field, x = case.field(device), case.x(device)
    contenders = [Contender("bare evaluations", bare)]
    solvers = {"solve": RungeKuttaSolver(**grid(steps)), "solve by torchdiffeq": TorchdiffeqSolver(**grid(steps))}
    for name, solver in solvers.items():

        def make(solver: OdeSolver = solver) -> Ours:
            return Ours(case, device, Exact(), solver, train=train)

        contenders.append(Contender(name, make, "exact"))
    kind = "training step" if train else "solve"
    title = f"{kind} of {4 * steps} evaluations over as many bare ones, exact, float32"
    return Figure(
        title, case, case.rows[device], contenders, "bare evaluations", ["solve"], ratio="overhead",
        check=agreement(setting, case),
    )  # fmt: skip


def evaluations(field: torch.nn.Module, x: torch.Tensor, count: int, train: bool) -> Run:
    """Evaluate a field with its exact divergence, and differentiate each evaluation by itself."""
    t, estimator = x.new_zeros(()), Exact()
    parameters = list(field.parameters())
    x = x.detach().requires_grad_(train)
    with torch.set_grad_enabled(train):
        for _ in range(count):
            found = estimator.value_and_divergence(field, t, x, None, None)
            if train:
                torch.autograd.grad(found, [x, *parameters], [torch.ones_like(part) for part in found])
    return Run(0.0, count, 0)


def memory(setting: Setting) -> Figure:
    """Peak memory of 100 evaluations."""
    case, solver = setting.case("MINIBOONE"), grid(25)
    contenders = ours(setting, case, Exact(), solver, ("direct", "checkpoint", "adjoint"))
    title = "peak memory of a training step, rk4 with 25 steps, float32"
    return Figure(
        title, case, case.rows[setting.device], contenders, "exact, direct, eager", ["exact, checkpoint, eager"],
        "peak_mib", most_repeats=1, check=agreement(setting, case),
    )  # fmt: skip


def gradients(setting: Setting) -> Figure:
    """Time and memory of the three gradients against the evaluations."""
    case = setting.case("MINIBOONE")
    rows = setting.rows(case, 250)
    contenders = []
    for steps in (4, 8, 16, 25):
        steps_of = ours(setting, case, Exact(), grid(steps), ("direct", "checkpoint", "adjoint"), rows=rows)
        contenders += [
            Contender(f"{found.name.split(', ')[1]}, {4 * steps} evaluations", found.make, f"{steps} steps")
            for found in steps_of
        ]
    title = "training step by gradient and evaluations, rk4, exact, float32"
    return Figure(title, case, rows, contenders, most_repeats=2, check=agreement(setting, case))


def zuko(setting: Setting) -> Figure:
    """A training step of zuko's CNF with Hutchinson's estimate."""
    return against_peer(setting, "zuko", Zuko, False)


def zuko_exact(setting: Setting) -> Figure:
    """A training step of zuko's CNF with its exact divergence."""
    return against_peer(setting, "zuko", Zuko, True, cpu_rows=32)


def torchdyn(setting: Setting) -> Figure:
    """A training step of torchdyn's CNF with Hutchinson's estimate."""
    return against_peer(setting, "torchdyn", Torchdyn, False)


def against_peer(setting: Setting, name: str, peer: Any, exact: bool, cpu_rows: int | None = None) -> Figure:
    """A training step of another package's CNF."""
    case = setting.case("MINIBOONE")
    rows = setting.rows(case, cpu_rows)
    made = peer(case, setting.device, TOLERANCE, exact, rows)  # raises Missing here, before anything is timed
    reference = f"{name}, {'exact' if exact else 'Hutchinson'}"
    contenders = [
        Contender(reference, lambda: made),
        *ours(setting, case, Exact(), ADAPTIVE, rows=rows),
        *([] if exact else ours(setting, case, hutchinson(), ADAPTIVE, rows=rows)),
    ]
    title = f"training step, dopri5 at 1e-5, float32, against {name}"
    note = f"{name} has its own field of the same hidden sizes, weights and error test: evaluations differ."
    return Figure(
        title, case, rows, contenders, reference, ["exact, direct, eager"], most_repeats=3, note=note,
        check=agreement(setting, case),
    )  # fmt: skip


FIGURES: dict[str, Callable[[Setting], Figure]] = {
    made.__name__: made
    for made in (
        step_rk4, step_dopri5, step_bf16, log_prob_43, log_prob_63, log_prob_63_deep, overhead_forward,
        overhead_training, step_power, memory, step_conv, step_multiscale,
        step_posterior, gradients, zuko, zuko_exact, torchdyn,
    )
}  # fmt: skip


# -------------------------------------------------------------------------------------------- measuring


@dataclass
class Measurement:
    """What was measured of a contender.

    Attributes:
        name: Name within the figure.
        seconds: One entry per round.
        nfe_forward: Evaluations of the solve.
        nfe_backward: Evaluations of the backward pass.
        loss: Mean negative log-density in nats.
        peak_mib: Most memory that torch held beyond what it held before, in MiB.
        first_seconds: Time of the first run where it compiles.
        error: First line of the error of a contender that failed.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    nfe_forward: int = 0
    nfe_backward: int = 0
    loss: float | None = None
    peak_mib: float | None = None
    first_seconds: float | None = None
    error: str | None = None

    def report(self) -> dict[str, Any]:
        """Return everything with median and quartiles."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        if self.seconds:
            low, median, high = quartiles(self.seconds)
            found |= {"fastest_seconds": min(self.seconds), "median_seconds": median}
            found |= {"lower_quartile_seconds": low, "upper_quartile_seconds": high}
        return found


def measure(figure: Figure, device: str, repeats: int) -> dict[str, Any]:
    """Check and time a figure.

    Args:
        figure: The figure.
        device: Device type.
        repeats: Rounds.

    Returns:
        The figure as plain values.

    Raises:
        Disagreement: If contenders do not agree.
    """
    figure.check()
    runs: dict[str, Callable[[], Run]] = {}
    found = {contender.name: Measurement(contender.name) for contender in figure.contenders}
    for contender in figure.contenders:
        try:
            runs[contender.name] = prepare(contender, found[contender.name], device)
        except Exception as failure:  # one that fails leaves the others to be compared
            found[contender.name].error = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            progress(f"  {contender.name}: {found[contender.name].error}")
    compare_losses(figure, found)
    for _ in range(min(repeats, figure.most_repeats)):
        gc.collect()
        for name, run in runs.items():
            found[name].seconds.append(timed(run, device)[0])
    reports = [measurement.report() for measurement in found.values()]
    add_ratios(figure, reports)
    for report in reports:
        if "median_seconds" in report:
            progress(f"  {report['name']}: {report['median_seconds']:.4g} s, ratio {report.get('ratio', 1):.3g}")
    measured = [report["name"] for report in reports if "median_seconds" in report]
    headline = next((name for name in figure.headline if name in measured), None)
    described = {name: getattr(figure, name) for name in ("title", "reference", "quantity", "ratio", "note")}
    case = figure.case
    shape = {"name": case.name, "what": case.what, "event_shape": case.event_shape, "hidden": case.hidden}
    shape |= {"activation": case.activation.__name__, "rows": figure.rows}
    return {**described, "headline": headline, "case": shape, "contenders": reports, "load_average": os.getloadavg()[0]}


def prepare(contender: Contender, found: Measurement, device: str) -> Callable[[], Run]:
    """Make a contender, warm it up, and measure its memory."""
    run = contender.make()
    if contender.compiled:
        found.first_seconds = timed(run, device)[0]
    result, found.peak_mib = with_peak_memory(run, device)
    found.loss, found.nfe_forward, found.nfe_backward = result
    return run


def timed(run: Callable[[], Run], device: str) -> tuple[float, Run]:
    """Return the seconds of a run, and its result."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return time.perf_counter() - start, result


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def with_peak_memory(run: Callable[[], Run], device: str) -> tuple[Run, float]:
    """Run once and return the most memory in MiB that torch's allocator held beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**20
    with quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        result = run()
    assert prof.profiler is not None
    assert prof.profiler.kineto_results is not None
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak / 2**20


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the profiler's library, which writes to stderr past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def compare_losses(figure: Figure, found: dict[str, Measurement]) -> None:
    """Raise Disagreement where contenders that must have the same loss have not."""
    first: dict[str, Measurement] = {}
    for contender in figure.contenders:
        measurement = found[contender.name]
        if contender.same is None or measurement.loss is None:
            continue
        expected = first.setdefault(contender.same, measurement)
        assert expected.loss is not None
        if not abs(measurement.loss - expected.loss) <= contender.closeness * max(1.0, abs(expected.loss)):
            raise Disagreement(
                f"{contender.name} has loss {measurement.loss:.6f}, {expected.name} {expected.loss:.6f}: {figure.title}"
            )


def add_ratios(figure: Figure, reports: Sequence[dict[str, Any]]) -> None:
    """Add to every report its ratio to the reference."""
    key = "median_seconds" if figure.quantity == "seconds" else figure.quantity
    reference = next((report for report in reports if report["name"] == figure.reference), {})
    for report in reports:
        if key in report and key in reference:
            gain = reference[key] / report[key]
            report["ratio"] = gain if figure.ratio == "gain" else 1 / gain


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


# -------------------------------------------------------------------------------------------- reporting


def context(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is behind the numbers: command, machine, versions, commit, seed."""
    return {
        "command": shlex.join(["python", "benchmarks/bench.py", *options.arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": options.device,
        "repeats": options.repeats,
        "small": options.small,
        "seed": SEED,
        "tolerance": TOLERANCE,
        "step": "forward, backward, gradients of all parameters; no optimiser",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "machine": machine(options.device),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "python": platform.python_version(),
        "commit": commit(),
    }


def machine(device: str) -> dict[str, Any]:
    """Return what is known of the machine."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    found: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "load_average": os.getloadavg(),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def version_of(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit that is checked out, marked where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--tags"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def progress(line: str) -> None:
    """Say on stderr what goes on."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(COMPILED), default="cpu")
    parser.add_argument("--figures", nargs="+", default=["all"], help=f"all, or some of: {', '.join(FIGURES)}")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; figures with long rounds take fewer")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--small", action="store_true", help="shrink every shape, to try the benchmark itself")
    parser.add_argument("--no-compile", action="store_true", help="leave out contenders that compile")
    parser.add_argument("--output", help="JSON file; results/bench_<device>.json by default, stdout when small")
    options = parser.parse_args(arguments)
    options.arguments = list(arguments)
    options.figures = [name for part in options.figures for name in part.split(",")]
    if options.figures == ["all"]:
        options.figures = list(FIGURES)
    for name in options.figures:
        if name not in FIGURES:
            parser.error(f"Expected --figures of all, {', '.join(FIGURES)}, got {name}. Type --figures all.")
    if options.repeats < 1:
        parser.error(f"Expected --repeats of at least 1, got {options.repeats}. Type --repeats 5.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a GPU for --device cuda, got none. Type --device cpu.")
    return options


def write(output: Path | None, report: dict[str, Any]) -> None:
    """Write the report, after every figure, so that what is measured survives an interruption."""
    text = json.dumps(report, indent=1) + "\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


def main(arguments: Sequence[str]) -> int:
    """Measure the figures and write the report."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    default = None if options.small else ROOT / "results" / f"bench_{options.device}.json"
    output = Path(options.output) if options.output else default
    setting = Setting(options.device, options.small, not options.no_compile)
    if options.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, of convolutions too
    report: dict[str, Any] = {"context": context(options), "figures": {}}
    if os.getloadavg()[0] > 0.5:
        progress(f"Others use this machine (load average {os.getloadavg()[0]:.1f}): compare fastest_seconds as well.")
    begin = time.perf_counter()
    for name in options.figures:
        start = time.perf_counter()
        progress(f"{name} (at {start - begin:.0f} s)")
        torch.compiler.reset()  # a step is compiled anew for each field, up to a limit
        try:
            found = measure(FIGURES[name](setting), options.device, options.repeats)
        except Missing as missing:
            found = {"skipped": str(missing)}
            progress(f"  skipped, not installed: {missing}")
        except Disagreement as disagreement:
            progress(f"Expected contenders that compute the same, got a difference: {disagreement}.")
            return 1
        report["figures"][name] = {**found, "took_seconds": time.perf_counter() - start}
        report["context"]["took_seconds"] = time.perf_counter() - begin
        write(output, report)
    if output is None:
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
