"""Pairs that anyone can judge by eye: small pictures and large ones, and films of moving digits.

python examples/picture_pairs.py digits runs/sharper     # handwritten digits, 4x4 to 8x8
python examples/picture_pairs.py fashion runs/fashion    # Fashion-MNIST, 16x16 to 32x32
python examples/picture_pairs.py moving runs/moving      # a digit that bounces off the walls at random, frame by frame
python examples/picture_pairs.py draw ENSEMBLE.npz PICTURE.png

The first three write `pairs.npz` to train on and `test.npz` with pairs, or films, of other images. The last draws what
`edm2 sample --members` or `edm2 forecast` made of them. docs/picture_pairs.md shows all commands.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from edm2.data import open_dataset
from edm2.forecast import read_forecast
from edm2.report.ensemble_figures import field_picture, field_table

SIDE, FILM = 16, 14  # pixels and frames of a film
PAST = 2
WIDTH = 64  # pixels of an image in the picture


def halved(images: np.ndarray) -> np.ndarray:
    """Each 2x2 pixels replaced by their mean."""
    n, c, h, w = images.shape
    means = images.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))
    return np.rint(means).astype(np.uint8)


def films(digits: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Films of a digit that keeps its velocity until it meets a wall, and then takes a new one at random.

    Args:
        digits: `[N, 1, 8, 8]` bytes.
        count: Films to make.
        seed: Seed of digits, places and velocities.

    Returns:
        `[count, FILM, 1, SIDE, SIDE]` bytes.
    """
    rng = np.random.default_rng(seed)
    made = np.zeros((count, FILM, 1, SIDE, SIDE), np.uint8)
    room = SIDE - digits.shape[-1]
    for film in made:
        digit = digits[rng.integers(len(digits)), 0]
        place, velocity = rng.integers(0, room + 1, 2), _velocity(rng)
        for frame in film:
            y, x = place
            frame[0, y : y + digit.shape[0], x : x + digit.shape[1]] = digit
            while ((place + velocity < 0) | (place + velocity > room)).any():
                velocity = _velocity(rng)
            place = place + velocity
    return made


def _velocity(rng: np.random.Generator) -> np.ndarray:
    while not (velocity := rng.integers(-1, 2, 2)).any():
        pass
    return velocity


def write_sizes(name: str, tests: int, out: Path) -> None:
    """Pairs of images at half and at full size."""
    for split, file in (("train", "pairs.npz"), ("test", "test.npz")):
        dataset = open_dataset(
            name, split=split, labels=False, pad_to=32 if name == "fashion-mnist" else None
        )
        images = dataset.images(np.arange(len(dataset) if split == "train" else tests))
        np.savez(out / file, images=images, conditions=halved(images))


def write_films(count: int, tests: int, out: Path) -> None:
    """Pairs of two frames and the next, and whole films of other digits."""
    train, test = (open_dataset("digits", split=split, labels=False) for split in ("train", "test"))
    seen = films(train.images(np.arange(len(train))), count, seed=1)
    moments = range(PAST, FILM)
    images = np.concatenate([seen[:, t] for t in moments])
    conditions = np.concatenate([seen[:, t - PAST : t, 0] for t in moments])
    np.savez(out / "pairs.npz", images=images, conditions=conditions)
    np.savez(out / "test.npz", frames=films(test.images(np.arange(len(test))), tests, seed=2))


def draw(ensemble: Path, out: Path, cases: int = 8, members: int = 5) -> None:
    """Draw one ensemble for each condition in a column, or the forecast of one film over time."""
    found = read_forecast(ensemble)
    assert found.truth is not None
    truth, made = found.truth[:, :, 0].astype(float), found.members[:, :, :, 0].astype(float)
    leads = truth.shape[1]

    def column(case: int, lead: int) -> list[Image.Image | None]:
        mean, spread = made[case, :, lead].mean(axis=0), made[case, :, lead].std(axis=0)
        shown = [truth[case, lead], *made[case, :members, lead], mean]
        return [*map(_grey, shown), _picture(spread, 96.0, "magma")]

    names = ["truth", *(f"sample {m + 1}" for m in range(members)), "mean", "spread"]
    if leads == 1:
        given = halved(found.truth[:cases, 0])[:, 0]
        names = ["given", *names]
        columns = [[_grey(given[case]), *column(case, 0)] for case in range(cases)]
        titles = [""] * cases
    else:
        past = [] if found.start is None else list(found.start[0, :, 0])
        columns = [[_grey(field), *[None] * (len(names) - 1)] for field in past]
        columns += [column(0, lead) for lead in range(leads)]
        titles = ["given"] * len(past) + [f"step {i + 1}" for i in range(leads)]
    table = field_table([list(row) for row in zip(*columns, strict=True)], titles, names=names)
    page = Image.new("RGB", (table.width + 16, table.height + 16), "white")
    page.paste(table, (8, 8), table)
    page.save(out)


def _grey(field: np.ndarray) -> Image.Image:
    return _picture(field, 255.0, "gray")


def _picture(field: np.ndarray, high: float, colours: str) -> Image.Image:
    return field_picture(field.astype(float), 0, high, colours=colours, scale=WIDTH // field.shape[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["digits", "fashion", "moving", "draw"])
    parser.add_argument("path", type=Path, help="folder to write, or the ensemble to draw")
    parser.add_argument("picture", type=Path, nargs="?", help="the picture to draw")
    parser.add_argument("--films", type=int, default=2000, help="films of `moving` to train on")
    parser.add_argument("--tests", type=int, default=200, help="pairs or films to judge")
    args = parser.parse_args()
    if args.what == "draw":
        draw(args.path, args.picture)
    else:
        args.path.mkdir(parents=True, exist_ok=True)
        if args.what == "moving":
            write_films(args.films, args.tests, args.path)
        else:
            write_sizes("fashion-mnist" if args.what == "fashion" else "digits", args.tests, args.path)
