import numpy as np
import pytest
from PIL import Image

from cnf_lab.data.picture import Picture, PictureDataModule, read_picture
from cnf_lab.errors import ConfigError, DataError


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def blob():
    weights = rng(0).random((9, 14)) ** 4
    weights[:, 4:9] = 0
    return weights


@pytest.fixture
def save(tmp_path):
    def write(array, name="picture.png", mode=None):
        image = Image.fromarray(np.asarray(array))
        path = tmp_path / name
        (image.convert(mode) if mode else image).save(path)
        return str(path)

    return write


def corner():
    """White, with a black quarter at the top left."""
    array = np.full((8, 8), 255, dtype=np.uint8)
    array[:4, :4] = 0
    return array


# -- the density -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stretch", [False, True])
def test_mass_entropy_and_rows_agree(blob, stretch):
    picture = Picture(blob, stretch)
    axis = np.linspace(-9, 9, 361)
    log_density = picture.log_density(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    density, cell = np.exp(log_density), (axis[1] - axis[0]) ** 2
    assert abs(density.sum() * cell - 1) < 1e-9
    entropy = -(density * np.where(density > 0, log_density, 0)).sum() * cell
    assert abs(picture.entropy - entropy) < 1e-5
    nll = -picture.log_density(picture.draw(20000, rng(1)))
    assert abs(nll.mean() - entropy) < 4 * nll.std() / np.sqrt(len(nll))


def test_log_density_is_the_mixture_over_all_pixels(blob):
    picture = Picture(blob, stretch=True)
    x = picture.draw(200, rng(2))
    height, width = blob.shape
    rows, columns = np.mgrid[:height, :width]
    centres = np.stack([-4 + 8 * (columns + 0.5) / width, 4 - 8 * (rows + 0.5) / height], axis=-1)
    std = np.array([4 / width, 4 / height])
    terms = np.exp(-(((x[:, None, None] - centres) / std) ** 2).sum(axis=-1) / 2) / (2 * np.pi * std.prod())
    expected = np.log((terms * blob / blob.sum()).sum(axis=(1, 2)))
    np.testing.assert_allclose(picture.log_density(x), expected, rtol=1e-12, atol=1e-12)


def test_a_picture_stands_upright_and_keeps_its_aspect_ratio():
    weights = np.zeros((10, 20))
    weights[0, 0] = 1  # top left
    x = Picture(weights).draw(4000, rng(3))
    np.testing.assert_allclose(x.mean(axis=0), [-3.8, 1.8], atol=0.02)
    np.testing.assert_allclose(x.std(axis=0), 0.2, atol=0.01)
    stretched = Picture(weights, stretch=True).draw(4000, rng(3))
    np.testing.assert_allclose(stretched.mean(axis=0), [-3.8, 3.6], atol=0.04)


def test_rows_outside_have_no_density():
    assert Picture(np.ones((3, 3))).log_density(np.array([[1e30, 0.0], [-50.0, 50.0]])).tolist() == [-np.inf] * 2


# -- reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_dark_pixels_weigh_whatever_the_mode(save, mode):
    array = corner()
    path = save(array.astype(np.uint16) * 257) if mode == "I;16" else save(array, mode=mode)
    weights = read_picture(path)
    np.testing.assert_array_equal(weights / weights.max(), array == 0)
    inverted = read_picture(path, invert=True)
    np.testing.assert_array_equal(inverted / inverted.max(), array == 255)


def test_transparency_counts_as_white(save):
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[:4, :4, 3] = 255
    np.testing.assert_array_equal(read_picture(save(rgba)) / 255, corner() == 0)


def test_a_turned_photograph_is_turned_back(tmp_path):
    image, exif = Image.fromarray(corner()), Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(str(tmp_path / "turned.png")) / 255, corner()[::-1, ::-1] == 0)


def test_a_large_picture_is_made_smaller_and_keeps_its_mass(save):
    array = np.full((60, 90), 255, dtype=np.uint8)
    array[:30, :45] = 0
    weights = read_picture(save(array), max_side=30)
    assert weights.shape == (20, 30)
    assert abs(weights.sum() - 255 * 150) < 255
    assert weights[:, 16:].sum() == 0


def test_faults_are_named(tmp_path, save):
    with pytest.raises(DataError, match=r"got no file .*cat.png. Type dataset.path=cat.png"):
        read_picture(str(tmp_path / "cat.png"))
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"to be a picture, got an error on reading it"):
        read_picture(str(tmp_path / "text.png"))
    whole = tmp_path / "whole.png"
    Image.fromarray(rng(4).integers(0, 256, (64, 64), dtype=np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"half.png to be a picture, got an error on reading it"):
        read_picture(str(tmp_path / "half.png"))
    with pytest.raises(DataError, match="at least two shades, got one shade"):
        read_picture(save(np.full((5, 5), 255, dtype=np.uint8)))


# -- the data module -------------------------------------------------------------------------------------


def test_module_reads_the_picture_when_it_is_needed(save):
    data = PictureDataModule("picture", save(corner()), batch_size=8, evaluation_rows=40, steps_per_epoch=2)
    assert data.event_shape == (2,)
    assert [len(batch.x) for batch in data.train_dataloader()] == [8, 8]
    x = data.head("test", 40).x
    assert (x[:, 0] < 1).all()
    assert (x[:, 1] > -1).all()
    assert np.isfinite(data.truth(x.numpy())).all()
    assert data.entropy < np.log(64)


def test_module_without_a_path_says_what_to_type():
    data = PictureDataModule("picture", None)
    with pytest.raises(ConfigError, match="got null. Type dataset.path=cat.png"):
        data.setup()
    with pytest.raises(ConfigError, match="dataset.max_side of at least 1, got 0"):
        PictureDataModule("picture", None, max_side=0)
