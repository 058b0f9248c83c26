"""Folders of other libraries' averages: true profiles, what is asked for, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edm2.cli import main
from edm2.ema import reconstruct, reconstruct_many, sigma_rel_to_gamma
from edm2.interop import open_ema_folder
from edm2.interop.ema_folders import update_profile
from edm2.interop.torch_file import open_torch_file

SIGMA_RELS = (0.05, 0.28)
STEPS = 1200


def walk(steps: int, seed: int = 0) -> np.ndarray:
    """Weights at each step [steps, 500]: a random walk of a tenth of their size."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(500) + np.cumsum(rng.standard_normal((steps, 500)) * 0.1 / steps**0.5, axis=0)


def average(path: np.ndarray, sigma_rel: float) -> np.ndarray:
    """The exact average at the last step."""
    mass = np.diff((np.arange(len(path) + 1) / len(path)) ** (sigma_rel_to_gamma(sigma_rel) + 1))
    return mass @ path


def write(
    folder: Path, path: np.ndarray, update_every: int, *, library: str = "ema-pytorch", every: int = 100
) -> None:
    """Files as the library writes them, by its update rule."""
    folder.mkdir(exist_ok=True)
    late = 99 if library == "pytorch-posthoc-ema" else 0
    dtype = torch.float16 if library == "ema-pytorch" else torch.float32
    for track, sigma_rel in enumerate(SIGMA_RELS):
        value = path[late]
        for step in range(late + 1, len(path) + 1):
            own = step - late
            if (own - 1) % update_every == 0:
                decay = (1 - 1 / (own + 1)) ** (1 + sigma_rel_to_gamma(sigma_rel))
                value = decay * value + (1 - decay) * path[step - 1]
            if step % every:
                continue
            tensors = {"w": torch.from_numpy(value).reshape(25, 20).to(dtype), "n": torch.tensor(7)}
            if library == "nitrous-ema":
                state: dict[str, Any] = {f"ema_model.{n}": x for n, x in tensors.items()}
                state["_extra_state"] = {"initted": True, "step": own}
            elif library == "ema-pytorch":
                state = {f"ema_model.{n}": x for n, x in tensors.items()} | {"initted": torch.tensor(True)}
                state = {n: x.to(dtype) for n, x in (state | {"step": torch.tensor(own)}).items()}
            else:
                state = tensors | {"initted": torch.tensor(True), "step": torch.tensor(own)}
            torch.save(state, folder / f"{track}.{step}.pt")


@pytest.mark.parametrize("update_every", [1, 7, 100])
@pytest.mark.parametrize("late", [0, 99])
def test_a_profile_is_the_update_rule_carried_out(update_every: int, late: int) -> None:
    steps, gamma = 1000, 5.0
    mass = np.zeros(steps + 1)  # of the weights of each step
    for own in range(1, steps - late + 1, update_every):
        decay = 0.0 if own == 1 else (1 - 1 / (own + 1)) ** (gamma + 1)
        mass *= decay
        mass[late + own] = 1 - decay
    profile = update_profile(steps, gamma, update_every, late=late)
    assert steps - update_every < profile.t < steps + update_every
    # Between updates the profile is spread; half-way between two of them all mass up to there is counted.
    between = np.arange(late + 1, steps, update_every) + update_every / 2 - 0.5
    expected = np.cumsum(mass)[np.ceil(between - 0.5).astype(int)]
    np.testing.assert_allclose(profile.cumulative(between), expected, atol=1e-12)
    mean = float((mass * (np.arange(steps + 1) - 0.5)).sum())
    assert steps - float(profile.integral(np.array([steps]))[0]) == pytest.approx(
        mean, abs=0.01 * update_every + 0.01
    )


def test_long_runs_have_profiles_of_bounded_size() -> None:
    exact = update_profile(4000, 9.0, 1)
    long = update_profile(400_000, 9.0, 1)
    at = np.linspace(0, 1, 50)
    np.testing.assert_allclose(long.cumulative(at * 400_000), exact.cumulative(at * 4000), atol=3e-3)
    assert long._edges.size <= 8192


@pytest.mark.parametrize("library", ["ema-pytorch", "nitrous-ema", "pytorch-posthoc-ema"])
def test_averages_are_recovered(tmp_path: Path, library: str) -> None:
    path = walk(STEPS)
    write(tmp_path, path, 10, library=library)
    folder = open_ema_folder(tmp_path, sigma_rels=SIGMA_RELS, update_every=10)
    for sigma_rel, result in zip(
        (0.08, 0.15), reconstruct_many(folder, [0.08, 0.15], warn_above=1), strict=True
    ):
        exact = average(path, sigma_rel)
        error = np.linalg.norm(result.tensors["w"].double().flatten().numpy() - exact) / np.linalg.norm(exact)
        assert error < 5e-3
        assert error < result.expected_error < 0.05
        assert result.clock == "steps"
        assert result.t == STEPS
        assert result.tensors["n"] == 7, "integers that were stored as floats are copied"


@pytest.mark.filterwarnings("ignore::edm2.ema.AccuracyWarning")
def test_commands_take_these_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", walk(STEPS), 10)
    given = ["--given-sigma-rels", "0.05,0.28", "--update-every", "10"]
    main(["ema", "list", str(tmp_path / "a"), *given])
    assert "24 files" in capsys.readouterr().out.splitlines()[0]
    main(
        [
            "ema",
            "reconstruct",
            str(tmp_path / "a"),
            *given,
            "--sigma-rel",
            "0.1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert "ema-0.1.safetensors  expected relative error" in capsys.readouterr().out
    main(
        [
            "ema",
            "profile",
            str(tmp_path / "a"),
            *given,
            "--sigma-rel",
            "0.1",
            "--out",
            str(tmp_path / "p.png"),
        ]
    )
    assert (tmp_path / "p.png").exists()
    with pytest.raises(SystemExit):
        main(["ema", "list", str(tmp_path / "a")])
    assert "give sigma_rels and update_every as PostHocEMA got them" in capsys.readouterr().err


def test_settings_that_the_files_do_not_say_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path, walk(300), 10)
    for options, told in (
        ({}, "give sigma_rels and update_every as PostHocEMA got them"),
        ({"sigma_rels": SIGMA_RELS}, "give update_every as PostHocEMA got them"),
        ({"sigma_rels": (0.05,), "update_every": 10}, "holds tracks 0, 1, but 1 sigma_rels are given"),
        ({"sigma_rels": SIGMA_RELS, "update_every": 0}, "update_every 0 must be at least 1"),
        ({"sigma_rels": (0.05, 0.5), "update_every": 10}, "sigma_rel 0.5 is outside"),
    ):
        with pytest.raises(ValueError, match=told):
            open_ema_folder(tmp_path, **options)  # type: ignore[arg-type]


def _other_shape(folder: Path) -> None:
    state = torch.load(folder / "0.200.pt")
    torch.save(state | {"ema_model.w": torch.zeros(3, 3).half()}, folder / "0.200.pt")


def _not_finite(folder: Path) -> None:
    state = torch.load(folder / "0.200.pt")
    torch.save(state | {"ema_model.w": torch.full((25, 20), torch.inf).half()}, folder / "0.200.pt")


def _other_run(folder: Path) -> None:
    write(folder.parent / "other", walk(400, seed=1), 10)
    for name in ("0.300.pt", "1.300.pt"):
        shutil.copy(folder.parent / "other" / name, folder / name)


def _renamed(folder: Path) -> None:
    shutil.copy(folder / "0.200.pt", folder / "0.900.pt")


def _other_content(folder: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, folder / "0.200.pt")


def _list(folder: Path) -> None:
    torch.save([torch.zeros(3)], folder / "0.200.pt")


def _cut(folder: Path) -> None:
    (folder / "0.200.pt").write_bytes((folder / "0.200.pt").read_bytes()[:-100])


def _transposed(folder: Path) -> None:
    state = torch.load(folder / "0.200.pt")
    torch.save(state | {"ema_model.w": torch.zeros(20, 25).half().T}, folder / "0.200.pt")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            _other_shape,
            "hold different models: 1 tensors are missing, new, or of another shape or type, first 'w'",
        ),
        (_not_finite, r"0\.200\.pt holds values that are not finite in 'w'"),
        (_other_run, "apart, as weights of different training runs do: move the files of each run"),
        (_renamed, r"0\.900\.pt counts 200 steps inside, which does not fit the other files"),
        (_other_content, r"0\.200\.pt is not an average of ema-pytorch"),
        (_list, "holds a list, not a dict of tensors"),
        (_cut, r"0\.200\.pt is not a file of tensors that torch\.save wrote"),
        (_transposed, r"stores 'ema_model\.w' in another order than row-major"),
    ],
)
def test_files_that_do_not_belong_together_are_named(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    folder = tmp_path / "a"
    write(folder, walk(400), 10)
    damage(folder)
    with pytest.raises(ValueError, match=told):
        open_ema_folder(folder, sigma_rels=SIGMA_RELS, update_every=10)


def test_folders_without_such_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder: give the checkpoint folder of ema-pytorch"):
        open_ema_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no averages named like 0\.1000\.pt"):
        open_ema_folder(tmp_path)


def test_whole_numbers_alone_are_nothing_to_average(tmp_path: Path) -> None:
    torch.save({"ema_model.w": torch.ones(3), "step": torch.tensor(100)}, tmp_path / "0.100.pt")
    with pytest.raises(ValueError, match=r"0\.100\.pt holds whole numbers alone, which are not averaged"):
        open_ema_folder(tmp_path, sigma_rels=(0.1,), update_every=10)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "executed",)

    torch.save({"ema_model.w": Hostile()}, tmp_path / "0.100.pt")
    with pytest.raises(ValueError, match="is not a file of tensors that torch"):
        open_ema_folder(tmp_path, sigma_rels=(0.1,), update_every=1)
    assert not (tmp_path / "executed").exists()


def test_tensors_lie_where_they_are_said_to_lie(tmp_path: Path) -> None:
    shared = torch.arange(10.0)
    content = {
        "a": torch.randn(3, 5),
        "b": shared[2:6],
        "empty": torch.zeros(0, 3),
        "c": torch.tensor(5),
        "d": shared,
    }
    torch.save(content | {"text": "x"}, tmp_path / "a.pt")
    opened = open_torch_file(tmp_path / "a.pt")
    assert opened.others == {"text": "x"}
    data = (tmp_path / "a.pt").read_bytes()
    for name, tensor in content.items():
        begin = opened.file.offsets[name]
        assert data[begin : begin + tensor.nbytes] == tensor.numpy().tobytes()


def test_one_width_for_each_track_is_enough(tmp_path: Path) -> None:
    path = walk(400)
    write(tmp_path, path, 1)
    folder = open_ema_folder(tmp_path, sigma_rels=SIGMA_RELS, update_every=1)
    only = reconstruct(folder, 0.06, tracks=[0.05], warn_above=9)
    assert {name.partition(".")[0] for name in only.coefficients} == {"0"}
    with pytest.raises(ValueError, match=r"track 0\.07 is not stored in .*: choose among 0\.05, 0\.28"):
        reconstruct(folder, 0.06, tracks=[0.07])
