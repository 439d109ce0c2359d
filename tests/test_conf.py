"""Every yaml of every group composes, fits the signature of its target, and survives a short run."""

import gzip
import inspect
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from scipy.io import savemat

from cnf_lab.data.images import FashionMnist, Mnist, Svhn
from cnf_lab.data.vae_images import BinaryMnist, Caltech101Silhouettes, FreyFaces, Omniglot
from cnf_lab.train import train
from cnf_lab.training.command import config_folder

ComposeConfig = Callable[..., DictConfig]
CONF = config_folder()
TABULAR = ("power", "gas", "hepmass", "miniboone", "bsds300")
IMAGES = ("mnist", "fashion_mnist", "cifar10", "svhn", "digits", "image_folder", "images")
VAE = ("binary_mnist", "omniglot", "freyfaces", "caltech101", "mnist_vae", "vae", "posteriors")
IMAGE_FIELDS = ("conv", "conv_encoder_decoder", "parallel_multiscale", "unet", "flattened")
#: Arguments that the lab gives besides those of the yaml.
GIVEN = {
    "architecture": {"event_shape", "context_features"},
    "preprocess": {"event_shape"},
    "normalisation": {"event_shape"},
    "objective": {"regularisers"},
    "regulariser": set(),
    "optimiser": {"params"},
    "schedule": {"optimizer"},
    "model": {
        "event_shape",
        "context_features",
        "field",
        "solver",
        "evaluation_solver",
        "divergence",
        "evaluation_divergence",
        "preprocess",
        "normalisation",
        "dequantisation",
        "posterior",
    },
    "posterior": {
        "dimension",
        "context_features",
        "field",
        "solver",
        "evaluation_solver",
        "divergence",
        "evaluation_divergence",
    },
    "trainer": {"callbacks", "logger", "default_root_dir", "enable_progress_bar"},
}
#: Keys of a yaml that the lab takes out before it makes the target.
TAKEN = {
    "model": {"name", "module", "monitor", "evaluation_trace", "dequantisation"},
    "solver": {"evaluation"},
    "posterior": {"field"},
}
#: Targets of other libraries need not list all of their options.
PARTLY = (
    "torch.",
    "pytorch_lightning.",
    "cnf_lab.training.callbacks.MovableCheckpoint",
    "cnf_lab.training.callbacks.Stage",
)


def options(group: str) -> list[str]:
    return sorted(
        path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).glob("**/*.yaml")
    )


def cases(*groups: str) -> list[Any]:
    names = [f"{group}={option}" for group in groups for option in options(group) if "/" not in option]
    assert names
    return [pytest.param(name, id=name) for name in names]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the true formats of all data sets that are read from disk."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for folder in ("power", "miniboone", "gas", "hepmass", "BSDS300", "bsds300/images/train"):
        (root / folder).mkdir(parents=True)
    np.save(root / "power" / "data.npy", rng.normal(size=(60, 8)))
    np.save(root / "miniboone" / "data.npy", rng.normal(size=(60, 43)))
    names = ["Time", "Meth", "Eth", *(f"R{number}" for number in range(8))]
    pd.DataFrame(rng.normal(size=(60, 11)), columns=names).to_pickle(root / "gas" / "ethylene_CO.pickle")
    for file, extra in (("train", 0), ("test", 1)):
        table = np.column_stack([np.ones(60), rng.normal(size=(60, 27 + extra))])
        header = ["# label", *(f"f{number}" for number in range(27)), "mass"][: table.shape[1]]
        pd.DataFrame(table, columns=header).to_csv(root / "hepmass" / f"1000_{file}.csv", index=False)
    with h5py.File(root / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for split in ("train", "validation", "test"):
            file[split] = rng.normal(size=(80, 63))
    for number in range(12):
        pixels = rng.integers(0, 255, (321, 481), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "bsds300" / "images" / "train" / f"{number}.jpg")
    Image.fromarray(rng.integers(0, 255, (20, 30), dtype=np.uint8)).save(root / "picture.png")
    for number in range(30):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / "bsds300" / f"{number}.png")
    (root / "cifar10").mkdir()
    np.savez(root / "cifar10" / "part.npz", x=rng.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8))
    for kind in (Mnist, FashionMnist):
        for file, shape in zip(kind.files, ((30, 28, 28), (30,), (10, 28, 28), (10,)), strict=True):
            (root / file.path).parent.mkdir(parents=True, exist_ok=True)
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            (root / file.path).write_bytes(gzip.compress(header + pixels.tobytes()))
    for file in Svhn.files:
        table = {"X": rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8), "y": np.ones((20, 1), dtype=np.uint8)}
        savemat(root / file.path, table)
    np.save(root / "rows.npy", rng.normal(size=(80, 3)))
    for folder in ("omniglot", "freyfaces", "caltech101_silhouettes", "binarized_mnist"):
        (root / folder).mkdir()
    characters = {"data": rng.random((784, 30)), "testdata": rng.random((784, 10))}
    savemat(root / Omniglot.file.path, characters)
    shapes = {f"{key}_data": rng.integers(0, 2, (20, 784), dtype=np.uint8) for key in ("train", "val", "test")}
    savemat(root / Caltech101Silhouettes.published.path, shapes)
    (root / FreyFaces.file.path).write_bytes(pickle.dumps([rng.integers(0, 256, (40, 560), dtype=np.uint8)], 0))
    for file in BinaryMnist.published:
        (root / file.path).write_text("\n".join(" ".join(map(str, row)) for row in rng.integers(0, 2, (20, 784))))
    return root


@pytest.fixture(autouse=True)
def small_files_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let go of the published checksums of images, which small files have not."""
    from torchvision.datasets import SVHN

    for kind in (Mnist, FashionMnist, Svhn):
        monkeypatch.setattr(kind, "files", tuple(replace(file, checksum=None) for file in kind.files))
    monkeypatch.setattr(Omniglot, "file", replace(Omniglot.file, checksum=None))
    monkeypatch.setattr(FreyFaces, "file", replace(FreyFaces.file, checksum=None))
    monkeypatch.setattr(Caltech101Silhouettes, "published", replace(Caltech101Silhouettes.published, checksum=None))
    monkeypatch.setattr(BinaryMnist, "rows", (20, 20, 20))
    monkeypatch.setattr(SVHN, "split_list", {split: ["", f"{split}_32x32.mat", None] for split in ("train", "test")})


def image_needs(name: str, root: Path) -> list[str]:
    """What a set of images needs, and what keeps its run short."""
    given = {
        "digits": ["dataset.limit=20", "dataset.test_images=10"],
        "image_folder": [f"dataset.path={root / 'bsds300'}", "dataset.size=[8,8]", "dataset.test_images=8"],
        "cifar10": [f"dataset.root={root}", "dataset.allow_partial=true"],
    }
    coarse = ["solver.atol=1e-2", "solver.rtol=1e-2", "solver.evaluation.atol=1e-2", "solver.evaluation.rtol=1e-2"]
    small = [
        "dataset.val_images=8",
        "recipe.hidden=[4,4]",
        "recipe.channels=4",
        "recipe.blocks=1",
        "dataset.val_limit=4",
        *coarse,
    ]
    return [*given.get(name, [f"dataset.root={root}"]), *small]


def needs(option: str, root: Path) -> list[str]:
    """What an option needs from the user, and what keeps a run of it short."""
    name = option.rsplit("/", 1)[-1].rsplit("=", 1)[-1]
    short = ["dataset.batch_size=8", "dataset.evaluation_batch_size=16", "debug=fast", "threads=1"]
    short += [
        "trainer.check_val_every_n_epoch=1",
        "recipe.flow_matching_steps=3",
        "recipe.likelihood_steps=3",
    ]  # an epoch of each
    if name in IMAGES:
        chosen = ["dataset=digits"] if name == "images" else []
        return [*chosen, *image_needs("digits" if name == "images" else name, root), *short]
    if name in VAE:
        chosen = ["dataset=freyfaces"] if name == "vae" else []
        small = ["recipe.hidden=[4]", "recipe.blocks=1", "recipe.rank=1", "model.latent=4", "model.features=8"]
        return [*chosen, f"dataset.root={root}", *small, *short]
    if name in TABULAR:
        return [f"dataset.root={root}", "dataset.allow_partial=true", "architecture.hidden=[8]", *short]
    if name == "bsds300_patches":
        patches = [f"dataset.{split}_patches=80" for split in ("train", "val", "test")]
        return [f"dataset.root={root}", "dataset.allow_partial=true", "architecture.hidden=[8]", *patches, *short]
    if name == "custom":
        return [f"dataset.path={root / 'rows.npy'}", *short]
    if name == "picture":
        return [f"dataset.path={root / 'picture.png'}", "dataset.evaluation_rows=20", *short]
    if option.endswith("/tabular") or "baseline" in option:
        return ["dataset=custom", f"dataset.path={root / 'rows.npy'}", *short]
    return ["dataset.evaluation_rows=20", *short]


def survive(config: DictConfig) -> None:
    assert np.isfinite(train(config))
    assert (Path(config.paths.run) / "metrics.json").is_file()


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("option", cases("dataset"))
def test_data_sets(option: str, data_root: Path, lab_config: ComposeConfig) -> None:
    survive(lab_config(option, "callbacks=[default]", *needs(option, data_root)))


@pytest.mark.parametrize("name", options("experiment"))
def test_experiments(name: str, data_root: Path, lab_config: ComposeConfig) -> None:
    option = f"experiment={name}"
    survive(lab_config(option, *needs(option, data_root), "callbacks=[default,early_stopping]"))


@pytest.mark.parametrize(
    "option",
    cases("architecture/convolution", "model/dequantisation")
    + [f"architecture={name}" for name in IMAGE_FIELDS]
    + ["model=image", "preprocess=logit", "preprocess=centre", "trace=bottleneck", "normalisation=actnorm"],
)
def test_parts_of_images(option: str, data_root: Path, lab_config: ComposeConfig) -> None:
    field = {"trace=bottleneck": "conv_encoder_decoder"}.get(option, "conv")
    chosen = [option] if option.startswith("architecture=") else [f"architecture={field}", option]
    if "encoder_decoder" in "".join(chosen):
        chosen.append("architecture.hidden=[4,4,4,2,4,4,4]")
    objective = ["objective=likelihood", "schedule=constant"]
    survive(lab_config("dataset=digits", *chosen, *objective, "callbacks=[default]", *needs("digits", data_root)))


@pytest.mark.parametrize("option", [*cases("posterior"), pytest.param("model=vae", id="model=vae")])
def test_parts_of_autoencoders(option: str, data_root: Path, lab_config: ComposeConfig) -> None:
    small = ["model=vae", "objective=elbo", "recipe.hidden=[4]", "recipe.rank=1", "model.latent=8", "model.features=8"]
    survive(
        lab_config(
            "dataset=digits", *small, "callbacks=[default]", "schedule=constant", option, *needs("digits", data_root)
        )
    )


@pytest.mark.parametrize(
    "option",
    [
        option
        for option in cases("solver", "trace", "architecture", "objective", "regulariser", "preprocess")
        + cases("architecture/layer", "architecture/activation", "optimiser", "schedule", "model", "paths")
        + cases("objective/path", "objective/times", "objective/coupling", "normalisation")
        if option.id.partition("=")[2] not in (*IMAGE_FIELDS, "image", "vae", "elbo", "logit", "centre")
    ],
)
def test_parts(option: str, data_root: Path, lab_config: ComposeConfig) -> None:
    extra = ["architecture=encoder_decoder"] if option == "trace=bottleneck" else []
    if option.startswith("regulariser"):
        extra = [f"regulariser=[none,kinetic,{option.partition('=')[2]}]"]
    if option.startswith("objective/"):
        extra = ["objective=flow_matching"]
    survive(lab_config(option, *extra, "callbacks=[default]", *needs("", data_root)))


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("option", cases("callbacks", "debug", "logger", "trainer"))
def test_surroundings(option: str, data_root: Path, lab_config: ComposeConfig) -> None:
    if option in ("trainer=gpu", "trainer=ddp") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if option == "trainer=ddp_cpu":
        pytest.skip("processes are tested in test_train.py")
    group, name = option.split("=")
    chosen = f"callbacks=[default,{name}]" if group == "callbacks" else option
    overrides = [item for item in needs("", data_root) if item != "debug=fast"]
    small = ["trainer.max_epochs=1", "dataset.steps_per_epoch=2", "trainer.check_val_every_n_epoch=1"]
    figures = ["callbacks.plots.resolution=10", "callbacks.plots.samples=20"] if name == "plots" else []
    survive(lab_config("callbacks=[default]", chosen, *overrides, *small, *figures))


@pytest.mark.parametrize(
    "option",
    cases("dataset", "solver", "trace", "architecture", "objective", "regulariser", "preprocess", "normalisation")
    + cases("optimiser", "schedule", "model", "trainer", "callbacks", "logger", "posterior"),
)
def test_keys_are_the_arguments_of_the_target(option: str, lab_config: ComposeConfig) -> None:
    group, name = option.split("=")
    if group in ("callbacks", "logger", "regulariser", "preprocess"):
        config = lab_config(f"{group}=[{name}]")[group]
        nodes = [node for node in config.values() if OmegaConf.is_dict(node)]
    else:
        nodes = [lab_config(option)[group]]
    for node in nodes:
        if "_target_" not in node:
            assert not node, "an option without a target says nothing"
            continue
        parameters = inspect.signature(get_object(node._target_)).parameters
        keys = {str(key) for key in node if not str(key).startswith("_")} - TAKEN.get(group, set())
        given = GIVEN.get(group, set())
        assert keys <= parameters.keys(), "unknown keys"
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        required = {
            key
            for key, parameter in parameters.items()
            if parameter.default is parameter.empty and parameter.kind not in variadic
        }
        assert required <= keys | given, "missing keys"
        if not node._target_.startswith(PARTLY):
            assert parameters.keys() == keys | (given & parameters.keys()), "options that the yaml does not show"


@pytest.mark.parametrize(
    "option", cases("architecture", "model", "optimiser", "schedule") + ["solver=bosh3", "solver=rk4"]
)
def test_choices_of_the_user_win_over_a_recipe(option: str, lab_config: ComposeConfig) -> None:
    """A recipe leaves nothing in an option that was chosen instead of its own."""
    group = option.partition("=")[0]
    alone = set(lab_config(option, "dataset=line")[group])
    for data_set in ("checkerboard", "bsds300_patches", "mnist", "digits", "omniglot"):  # one recipe of each kind
        assert set(lab_config(option, f"dataset={data_set}")[group]) == alone


def test_every_yaml_begins_with_what_it_is() -> None:
    for path in CONF.glob("**/*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), path
        assert any(line.startswith("# ") and "@package" not in line for line in lines[:3]), path
