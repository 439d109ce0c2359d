"""The report over handmade run folders, over a sweep of real ones, and in a browser."""

import csv
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cnf_lab.errors import ConfigError
from cnf_lab.report import main, parsed, report
from cnf_lab.reporting.budgets import budgets
from cnf_lab.reporting.collect import Run, collect, differing, find_runs, read_run
from cnf_lab.reporting.curves import curves
from cnf_lab.reporting.page import Limits, render
from cnf_lab.reporting.pictures import choose
from cnf_lab.reporting.published import beside, published

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
POWER = {"train": 1659917, "val": 184435, "test": 204928}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--allow-file-access-from-files",  # the frame of the test's wrapper
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
]


def make_run(
    folder: Path,
    value: float | None = 1.5,
    data: str = "line",
    notes: tuple[str, ...] = (),
    rows: dict[str, int] | None = None,
    monitor: str = "val/nll",
    **extra: Any,
) -> Path:
    """Write a run folder as the lab does; without a value it has not ended."""
    (folder / ".hydra").mkdir(parents=True)
    config = {"seed": 3, "model": {"name": "density", "monitor": monitor}, "dataset": {"name": data}, **extra}
    (folder / "config_resolved.yaml").write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"dataset={data}", f"seed={folder.name}"]))
    name = monitor.partition("/")[2]
    header = f"epoch,nfe/backward,nfe/forward,step,time/elapsed_seconds,time/step_seconds,train/{name},val/{name}\n"
    lines = [f"{k},,,{10 * k + 9},,,,{3 - k}\n{k},2,14,{10 * k + 9},{k + 1}.5,0.1,{3.1 - k},\n" for k in range(3)]
    (folder / "metrics.csv").write_text(header + "".join(lines))
    (folder / "train.log").write_text("[x] - model density with 17,928 parameters; run folder y\n")
    if value is not None:
        context = {
            "data": {"name": data, "notes": list(notes), "rows": rows or {"train": 5, "val": 5, "test": 5}},
            "solver": {"method": "dopri5", "atol": 1e-6},
            "command": f"python -m cnf_lab.train dataset={data}",
            "git": "abc123",
        }
        numbers = {f"test/{name}": value, f"test/{name}_standard_error": 0.01, f"val/{name}": value + 0.1}
        (folder / "metrics.json").write_text(json.dumps({**numbers, "train/steps": 30.0, "context": context}))
    return folder


def picture(folder: Path, name: str, size: int = 400) -> None:
    (folder / "plots").mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "plots" / f"{name}.png")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Runs in every state."""
    root = tmp_path / "outputs"
    make_run(root / "sweep" / "2", 1.5)
    make_run(root / "sweep" / "10", 0.5)
    picture(root / "sweep" / "2", "density_test")
    make_run(root / "failed", None)
    (root / "failed" / "FAILED").write_text(f"SolverError: {HOSTILE}\n")
    make_run(root / "killed", None)
    with (root / "killed" / "metrics.csv").open("a") as file:
        file.write("3,2,14,39,4")  # cut off
    make_run(root / "damaged")
    (root / "damaged" / "metrics.json").write_text('{"test/nll": 1.')
    return root


def texts(page: str) -> str:
    """Return the text of a page, without scripts and style."""
    found: list[str] = []

    class Reader(HTMLParser):
        CDATA_CONTENT_ELEMENTS = ("script", "style")

        def handle_data(self, data: str) -> None:
            if self.cdata_elem is None:
                found.append(data)

    Reader().feed(page)
    return " ".join(found)


def test_runs_are_collected_in_every_state(zoo: Path) -> None:
    runs = {run.name: run for run in collect([zoo])[0]}
    assert list(runs) == ["damaged", "failed", "killed", "sweep/2", "sweep/10"], "jobs in the order of their numbers"
    assert {name: run.status for name, run in runs.items()} == {
        "sweep/2": "done",
        "sweep/10": "done",
        "failed": "failed",
        "killed": "unfinished",
        "damaged": "damaged",
    }
    assert runs["failed"].reason.startswith("SolverError")
    assert "killed, or still running" in runs["killed"].reason
    assert "metrics.json cannot be read" in runs["damaged"].reason
    done = runs["sweep/2"]
    assert (done.value("test"), done.steps, done.seconds, done.parameters) == (1.5, 30.0, 3.5, 17928)
    assert runs["killed"].first("val/nll") == 1.0, "a run that was killed shows its last value"
    assert differing([runs["sweep/2"], runs["sweep/10"]]) == ["seed=2", "seed=10"]


def test_links_are_followed_once(zoo: Path) -> None:
    (zoo / "sweep" / "loop").symlink_to(zoo)
    (zoo / "again").symlink_to(zoo / "sweep" / "2")
    (zoo / "nowhere").symlink_to(zoo / "missing")
    elsewhere = make_run(zoo.parent / "elsewhere")
    (zoo / "linked").symlink_to(elsewhere)
    found = find_runs([zoo])[0]
    assert len(found) == 6
    assert zoo / "sweep" / "2" in found
    assert zoo / "linked" in found


def test_no_damage_ends_in_a_traceback(tmp_path: Path) -> None:
    files = ("metrics.json", "config_resolved.yaml", "evaluation.json", "metrics.csv", ".hydra/overrides.yaml")
    contents = (b"", b"\xff\xfe\0{", b"[1, 2]", b"{{: -\n\t- ]", b"step,val/nll\nx,y\n", b"null")
    for place, file in enumerate(files):
        for number, content in enumerate(contents):
            folder = make_run(tmp_path / f"{place}_{number}")
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
    report([str(tmp_path)])
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "report.csv").read_text().splitlines())}
    assert len(rows) == len(files) * len(contents)
    assert rows["0_3"]["status"] == "damaged"
    assert "metrics.json" in rows["0_3"]["reason"]
    assert rows["1_3"]["status"] == "done", "the numbers are there"
    assert "config_resolved.yaml" in rows["1_3"]["reason"]
    assert "metrics.csv" in rows["3_4"]["reason"]


def test_values_of_the_wrong_kind_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    bad = {"test/nll": "high", "val/nll": None, "x": True, "context": {"data": 3, "versions": [1], "solver": "?"}}
    (folder / "metrics.json").write_text(json.dumps(bad))
    wrong = {"nll": 3, "bits_per_dim": {"value": 1, "confidence": "x"}, "elbo": {"value": 1, "confidence": 0.9}}
    evaluation = {"nll": "x", "budget": wrong, "samples": [3, {"value": None}]}
    (folder / "evaluation.json").write_text(json.dumps({"test": evaluation, "val": 2, "rows": {"budget": []}}))
    assert [budget.quantity for budget in budgets(0, read_run(folder, "run"))] == ["elbo"]
    assert report([str(tmp_path)]).is_file()


def test_curves_against_seconds_steps_and_evaluations(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"), "run")
    found = curves(run)
    # Steps, seconds since training began, and 16 evaluations in each of 10 steps.
    assert found["val"] == [[10, 1.5, 160, 3], [20, 2.5, 320, 2], [30, 3.5, 480, 1]]
    assert [row[3] for row in found["nfe"]] == [14, 14, 14]
    run.series["nfe/forward"] = run.series["nfe/forward"][1:]  # the first epoch did not solve
    assert [row[2] for row in curves(run)["val"]] == [0, 160, 320]
    assert len(curves(run, most=2)["val"]) == 2


def test_whatever_is_written_there_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<img src=x onerror=alert(2)>", data=HOSTILE, notes=(HOSTILE,), note=HOSTILE)
    (folder / "FAILED").write_text(HOSTILE)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([HOSTILE]))
    own = {"value": 1.0, "confidence": 0.99, "unit": HOSTILE, "half_width": 0.1, "sources": {HOSTILE: 0.1}}
    rows = [{"metric": HOSTILE, "distance": HOSTILE, "value": 1, "seed": HOSTILE}]
    evaluation = {"<b onclick=alert(3)>": {"nll": 1, "budget": {HOSTILE: own}, "samples": rows}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = report([str(tmp_path), f"title={HOSTILE}"]).read_text()
    assert page.count("<script") == 3
    assert "<img src=x" not in page
    assert HOSTILE not in page
    assert HOSTILE in html.unescape(texts(page))
    assert "<img" not in (tmp_path / "report.md").read_text()


def test_the_page_asks_no_network(zoo: Path) -> None:
    page = report([str(zoo)]).read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", page)


def test_markdown_and_csv_have_all_runs(zoo: Path) -> None:
    report([str(zoo), "runs=1"])
    rows = list(csv.DictReader((zoo / "report.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["damaged", "failed", "killed", "sweep/2", "sweep/10"]
    assert (rows[3]["test"], rows[3]["test_standard_error"], rows[3]["status"]) == ("1.5", "0.01", "done")
    assert rows[3]["git"] == "abc123"
    assert rows[3]["seed"] == "3"
    assert HOSTILE in rows[1]["reason"]
    text = (zoo / "report.md").read_text()
    assert "| sweep/2 | done | line | density | seed=2 | 1.5000 ± 0.0100 |" in text
    assert "5 runs: 2 done, 1 failed, 1 unfinished, 1 damaged." in text
    assert "`" not in text.replace("\\`", "")
    assert "the newest 1 on this page" in " ".join(texts((zoo / "report.html").read_text()).split())


def test_published_numbers_only_beside_the_same_protocol(tmp_path: Path) -> None:
    same = make_run(tmp_path / "same", -0.5, "power", rows=POWER)
    part = make_run(tmp_path / "part", -0.9, "power", rows=POWER, notes=("power: 200,000 of 2,049,280 rows",))
    other = make_run(tmp_path / "other", -0.9, "power", rows={**POWER, "test": 100})
    untested = make_run(tmp_path / "untested", -0.9, "power", rows=POWER)
    numbers = json.loads((untested / "metrics.json").read_text())
    (untested / "metrics.json").write_text(json.dumps({key: numbers[key] for key in numbers if "test/" not in key}))
    unrelated = make_run(tmp_path / "unrelated", 0.1, "line")
    runs = [read_run(folder, folder.name) for folder in (same, part, other, untested, unrelated)]
    (table,) = beside(runs, [run.name for run in runs])
    ranked = [row.name for row in table["ranked"]]
    assert [row.name for row in table["ranked"] if row.run is not None] == ["same"]
    assert ranked.index("TAN") > ranked.index("same") > ranked.index("Stochastic interpolant"), "by value"
    why = {row.name: "; ".join(row.reasons) for row in table["apart"]}
    assert why.keys() == {"part", "other", "untested"}
    assert "200,000 of 2,049,280" in why["part"]
    assert "100 test rows" in why["other"]
    assert "not the test split" in why["untested"]


def test_autoencoders_of_another_size_are_not_comparable(tmp_path: Path) -> None:
    rows = {"train": 50000, "val": 10000, "test": 10000}
    for name, latent in (("published", 64), ("small", 8)):
        folder = make_run(tmp_path / name, 90.0, "binary_mnist", rows=rows, monitor="val/negative_elbo")
        config = yaml.safe_load((folder / "config_resolved.yaml").read_text())
        config["model"] |= {"latent": latent, "features": 256}
        (folder / "config_resolved.yaml").write_text(yaml.safe_dump(config))
    runs = collect([tmp_path])[0]
    (table,) = beside(runs, [run.name for run in runs])
    assert [row.name for row in table["apart"]] == ["small"]
    assert "model.latent is 8, published: 64" in table["apart"][0].reasons


def test_every_published_number_has_its_source() -> None:
    numbers = published()
    for entry in numbers["benchmarks"]:
        assert entry["models"]["FFJORD, multiscale" if entry["data"] == "mnist" else "FFJORD"]
        for value, error, source, *note in entry["models"].values():
            assert isinstance(value, float)
            assert error is None or error > 0
            assert source in numbers["sources"]
            assert len(note) <= 1


def test_budgets_of_an_evaluation_and_without_one(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"), "run")
    (fallback,) = budgets(0, run)
    assert not fallback.whole
    assert fallback.sources == pytest.approx({"rows": 0.02576})
    sources = {"rows": 0.04, "probes": 0.02, "draws": None, "solver": 1e-4}
    own = {"value": 1.4, "unit": "nats", "half_width": 0.0401, "confidence": 0.99, "sources": sources}
    sample = {"metric": "mmd", "distance": "chamfer", "value": 0.25, "oracle": 0.125, "n_reference": 777}
    written = {"test": {"nll": 1.4, "budget": {"nll": own}, "samples": [sample]}}
    (run.path / "evaluation.json").write_text(json.dumps(written))
    (budget,) = budgets(0, read_run(run.path, "run"))
    assert budget.whole
    assert (budget.quantity, budget.unit, budget.half_width) == ("nll", "nats", 0.0401)
    assert budget.sources == {"rows": 0.04, "probes": 0.02, "draws": None, "solver": 1e-4}
    page = report([str(tmp_path)]).read_text()
    assert 'class="bar solver" style="width:0.25%"' in page
    assert 'class="bar total" style="width:100.00%"' in page
    assert "draws unknown" in page
    said = " ".join(texts(page).split())
    assert "mmd chamfer 0.25 0.125 777" in re.sub(r"\s+", " ", said)


def test_many_runs_and_pictures_stay_below_the_size(tmp_path: Path) -> None:
    first = make_run(tmp_path / "0")
    for name in ("samples_test", "density_test", "reconstructions_last", "curves_last"):
        picture(first, name, 200)
    run = read_run(first, "0")
    runs = [Run(**{**run.__dict__, "name": f"sweep/{number}"}) for number in range(24)]
    page = render(runs, ["x"] * 24, [], "t", Limits(pictures=2, megabytes=0.4), time.time())
    assert len(page.encode()) < 400_000
    assert page.count("data:image/webp") >= 24
    assert "left out" in page
    assert 'alt="curves' not in page
    small = render(runs, ["x"] * 24, [], "t", Limits(pictures=2, megabytes=0.06), time.time())
    assert len(small.encode()) < 60_000
    assert "on this page, all in report.csv" in " ".join(texts(small).split())


def test_damaged_pictures_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    picture(folder, "samples_test")
    (folder / "plots" / "density_test.png").write_bytes(b"\x89PNG no")
    chosen, left_out = choose([read_run(folder, "run")], 3, 10**6)
    assert [item.name for item in chosen] == ["samples_test"]
    assert left_out == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"Expected a folder of runs, got none\. Type python -m cnf_lab\.report outputs/"),
        (["nowhere"], r"Expected a folder of runs, got nowhere, which is none"),
        (["."], r"Expected runs below \., got none"),
        ([".", "picture=3"], r"got picture\. Type pictures=3\."),
        ([".", "pictures=many"], r"Expected pictures to be a whole number of at least 0, got many\. Type pictures=3\."),
        ([".", "megabytes=nan"], r"Expected megabytes to be a number"),
        (["--what"], r"got --what\. Type python -m cnf_lab\.report --help"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        report(arguments)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_place_that_cannot_be_written_is_named(zoo: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected a folder that can be written, got /proc/x \(No such file"):
        report([str(zoo), "output=/proc/x"])
    assert parsed([str(zoo), "output=a", "runs=5"]) == ([zoo], {"output": "a", "runs": 5})


PROBE = r"""<!doctype html><body><pre id="found"></pre>
<iframe id="frame" src="report.html" width="380" height="900"></iframe>
<script>
document.getElementById("frame").addEventListener("load", async (event) => {
  const frame = event.target.contentWindow, page = frame.document, found = {};
  const shown = () => [...page.querySelectorAll("#table tbody tr")].filter((row) => !row.hidden)
    .map((row) => row.cells[0].querySelector("a").textContent);
  const click = (column) => page.querySelectorAll("#table thead button")[column].click();
  found.start = shown();
  click(5); found.up = shown(); click(5); found.down = shown();
  found.sorted = page.querySelectorAll("#table thead th")[5].getAttribute("aria-sort");
  const filter = page.getElementById("filter");
  const type = (text) => { filter.value = text; filter.dispatchEvent(new frame.Event("input")); };
  type("FAILED density"); found.filtered = shown(); found.count = page.getElementById("count").textContent;
  found.hidden = [...page.querySelectorAll("article")].every((item) => item.hidden);
  type("");
  found.paths = page.querySelectorAll("#likelihood path").length;
  page.getElementById("none").click(); found.none = page.querySelectorAll("#likelihood path").length;
  page.querySelector("#legend input").click(); found.one = page.querySelectorAll("#likelihood path").length;
  const titles = () => [...page.querySelectorAll("#likelihood .title")].map((item) => item.textContent).join("|");
  found.axes = ["0", "1", "2"].map((axis) => {
    page.getElementById("axis").value = axis;
    page.getElementById("axis").dispatchEvent(new frame.Event("change"));
    return titles();
  });
  const details = page.querySelector("#details details");
  details.open = true;
  await new Promise((resolve) => setTimeout(resolve, 300));
  found.config = details.querySelector("pre.config").textContent;
  found.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def browse(folder: Path, address: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page of a folder in Chromium and return its DOM and what the browser said."""
    profile = folder / "profile"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", f"file://{folder}/{address}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def asked(log: Path) -> list[str]:
    """Return the addresses in a log of Chromium's network that are not the browser's own."""
    events = json.loads(log.read_text())
    urls = {str(event.get("params", {}).get("url", "")) for event in events["events"]}
    return [url for url in urls if url.startswith(("http", "ws")) and "gvt1" not in url and "google" not in url]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_works_in_a_browser(zoo: Path, tmp_path: Path) -> None:
    report([str(zoo), f"output={tmp_path / 'page'}"])
    folder = tmp_path / "page"
    (folder / "probe.html").write_text(PROBE)
    log = folder / "net.json"
    done = browse(folder, "probe.html", f"--log-net-log={log}", "--window-size=600,1000")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S).group(1)))
    assert found["start"] == ["damaged", "failed", "killed", "2", "10"]
    assert found["up"][:2] == ["10", "2"], "by the test likelihood"
    assert found["down"][:2] == ["2", "10"]
    assert found["sorted"] == "descending"
    assert found["filtered"] == ["failed"]
    assert found["count"] == "1 of 5"
    assert found["hidden"]
    assert (found["paths"], found["none"], found["one"]) == (5, 0, 1)
    assert ["training steps" in found["axes"][0], "seconds" in found["axes"][1], "evaluations" in found["axes"][2]]
    assert len(set(found["axes"])) == 3
    assert yaml.safe_load(found["config"])["seed"] == 3, "the configuration is unpacked when it is opened"
    assert found["overflow"] <= 0, "nothing sticks out at the width of a phone"
    assert asked(log) == []


@pytest.mark.slow
def test_sweeps_with_a_killed_job(tmp_path: Path) -> None:
    """Jobs of all three families, one of them killed: the page has the others, and says what happened.

    Chromium opens it without an error of a script, and nothing is asked of a network.
    """
    common = [sys.executable, "-m", "cnf_lab.train", "logger=csv", "threads=1", "callbacks=[default]"]
    small = ["trainer.max_epochs=2", "dataset.steps_per_epoch=2", "dataset.batch_size=16", "recipe.hidden=[8,8]"]
    vae = [
        "dataset=digits",
        "model=vae",
        "objective=elbo",
        "model.latent=8",
        "model.features=8",
        "schedule=constant",
        "trainer.precision=32-true",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, choices in (
        ("density", ["-m", "dataset=line", "seed=0,1"]),
        ("vae", ["-m", *vae, "posterior=none,planar"]),
        ("image", ["-m", "dataset=digits,custom"]),  # custom without a file fails
    ):
        command = [*common, *small, *choices, f"hydra.sweep.dir={tmp_path / 'outputs' / name}"]
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    long = [*common, "dataset=line", "trainer.max_epochs=10000", "dataset.steps_per_epoch=2"]
    folder = tmp_path / "outputs" / "killed"
    process = subprocess.Popen([*long, f"hydra.run.dir={folder}"], cwd=tmp_path, env=environment)
    until = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    evaluate = [sys.executable, "-m", "cnf_lab.evaluate", "-m", "limit=20", "mass=false"]
    some = [tmp_path / "outputs" / name for name in ("density/0_*", "vae/0_*", "image/0_*")]
    runs = ",".join(f"'{path}'" for pattern in some for path in tmp_path.glob(str(pattern.relative_to(tmp_path))))
    subprocess.run([*evaluate, f"run={runs}"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    page = report([str(tmp_path / "outputs")])
    rows = {row["run"]: row for row in csv.DictReader((page.parent / "report.csv").read_text().splitlines())}
    states = [row["status"] for row in rows.values()]
    assert (states.count("done"), states.count("failed"), states.count("unfinished")) == (5, 1, 1), rows
    assert {row["family"] for row in rows.values() if row["status"] == "done"} == {"density", "image", "vae"}
    assert page.stat().st_size < 5_000_000
    text = page.read_text()
    for quantity in ("nll", "bits per dim", "negative elbo"):
        assert f": {quantity} (" in text, "budgets of all families"
    if CHROMIUM is not None:
        log = page.parent / "net.json"
        done = browse(page.parent, page.name, f"--log-net-log={log}")
        assert "CONSOLE" not in done.stderr, done.stderr
        assert asked(log) == []
    assert rows["killed"]["status"] == "unfinished"
    assert page.stat().st_size < 5e6
