"""The wheel, built from the source archive, runs from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def python(*arguments: str | Path, **options: str | Path | dict[str, str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def sources(folder: Path, *suffixes: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes}


def test_wheel_holds_the_package_and_every_config_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"cnf_lab/conf/{name}" for name in sources(ROOT / "conf", ".yaml")}
    assert "cnf_lab/conf/train.yaml" in configs
    assert configs | sources(ROOT / "src", ".py", ".typed") <= names


@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "dashboard"])
def test_installed_command_shows_help_from_another_folder(command: str, site: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = python("-c", "import cnf_lab; print(cnf_lab.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(site)
    assert command in python("-m", f"cnf_lab.{command}", "--help", cwd=tmp_path, env=environment)
    assert not list(tmp_path.iterdir())
