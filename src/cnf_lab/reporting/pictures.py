"""Pictures of runs, small enough for one page."""

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnf_lab.reporting.collect import Run

#: What is shown first, by the beginning of a file's name; the curves are drawn by the page itself.
ORDER = ("samples", "density", "marginals", "reconstructions", "trajectories", "pairs", "walks", "strip")
WIDTHS = (560, 420, 300, 200, 130)
QUALITY = 78
SMALLEST = 1500  # characters, below which no picture is tried


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Attributes:
        run: Number of the run.
        name: The file without its ending.
        uri: Its content as a data URI.
        width: Pixels.
        height: Pixels.
    """

    run: int
    name: str
    uri: str
    width: int
    height: int


def candidates(run: Run) -> list[Path]:
    """Return the pictures of a run, those to be shown first first; of the test split, else the last ones."""
    try:
        files = sorted((run.path / "plots").glob("*.png"))
    except OSError:
        return []
    chosen: dict[str, Path] = {}
    for tag in ("test", "last"):
        for file in files:
            name, _, end = file.stem.rpartition("_")
            if end == tag and name != "curves":
                chosen.setdefault(name, file)
    if not chosen:  # a run that was killed has those of its epochs
        epochs = [file for file in files if "_epoch_" in file.stem]
        chosen = {file.stem.partition("_epoch_")[0]: file for file in epochs}
    ranks = {name: next((k for k, word in enumerate(ORDER) if name.startswith(word)), len(ORDER)) for name in chosen}
    return [chosen[name] for name in sorted(chosen, key=lambda name: (ranks[name], name))]


def choose(runs: Sequence[Run], each: int, budget: int) -> tuple[list[Picture], int]:
    """Return pictures within a size, the first of every run before the second of any, and how many were left out.

    Args:
        runs: The runs of the page.
        each: Most pictures of a run.
        budget: Characters of all data URIs together.
    """
    files = [candidates(run) for run in runs]
    queue = [
        (number, files[number][turn])
        for turn in range(each)
        for number in range(len(runs))
        if turn < len(files[number])
    ]
    left_out = sum(max(0, len(own) - each) for own in files)
    chosen: list[Picture] = []
    for place, (number, file) in enumerate(queue):
        # An even share of what is left, so that many runs get small pictures rather than some none.
        share = max(SMALLEST, budget // min(len(queue) - place, max(len(runs), 1)))
        picture = shrink(number, file, min(share, budget)) if budget >= SMALLEST else None
        if picture is None:
            left_out += 1
            continue
        budget -= len(picture.uri) + 400
        chosen.append(picture)
    return sorted(chosen, key=lambda picture: picture.run), left_out


def shrink(run: int, file: Path, most: int) -> Picture | None:
    """Return a picture of at most so many characters, or None where it would be too small to see or is damaged."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    for width in WIDTHS:
        if width == WIDTHS[0] or width < image.width:
            small = image.copy()
            small.thumbnail((width, 2 * width))
            content = io.BytesIO()
            small.save(content, "WEBP", quality=QUALITY, method=2)
            uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
            if len(uri) <= most:
                return Picture(run, file.stem, uri, *small.size)
    return None
