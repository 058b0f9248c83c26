"""Search for the tracks and times whose worst error over a range of EMA lengths is smallest."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from edm2.ema.maths.plans import Plan, best_errors, spread
from edm2.ema.maths.profiles import MAX_SIGMA_REL, FloatArray, gamma_to_sigma_rel, sigma_rel_to_gamma
from edm2.ema.storage.encoding import TYPICAL_ROUNDING

_DEFAULT_TRACKS = 8
_DEFAULT_MID_RUN_TIMES = 8
_MOST_TRACKS, _MOST_TIMES = 12, 64
_MOST_SEARCHED = 32
_STEPS = 1200


def plan(
    sigma_range: tuple[float, float] = (0.03, 0.25),
    *,
    tracks: int | None = None,
    times: int | None = None,
    num_params: int | None = None,
    memory_bytes: int | None = None,
    storage_bytes: int | None = None,
    dtype: str = "fp32",
    mid_run: bool = False,
) -> Plan:
    """Find the tracks and snapshot times whose worst error over a range of EMA lengths is smallest.

    Args:
        sigma_range: Shortest and longest EMA length wanted, in (0, 0.2887).
        tracks: Number of averages to track, 1 to 12. Default: 8, or as many as the budgets allow.
        times: Number of times at which they are stored. Default: as many as `storage_bytes` allows, up to 64;
            without that budget only the end, or 8 times with `mid_run`.
        num_params: Number of averaged parameters; needed for budgets.
        memory_bytes: Room for the running averages, in float32. Their base and windows take another 1.5 times as
            much as one average, or 2.5 times with two averages.
        storage_bytes: Room for all snapshots.
        dtype: How they are stored: fp32, bf16 or fp16.
        mid_run: Whether every length is wanted at each stored time, not only at the end.

    Returns:
        The plan. It depends on the arguments only, and is computed once per process.

    Raises:
        ValueError: If a range, number or budget cannot be met.
    """
    low, high = _checked(sigma_range, dtype, tracks=tracks, times=times, num_params=num_params)
    most_tracks = _affordable("memory_bytes", memory_bytes, num_params, 4)
    most_files = _affordable("storage_bytes", storage_bytes, num_params, 4 if dtype == "fp32" else 2)
    if tracks is None:
        tracks = min(_DEFAULT_TRACKS, most_tracks, max(most_files // (times or 1), 1))
    if times is None:
        free = _DEFAULT_MID_RUN_TIMES if mid_run else 1
        times = free if storage_bytes is None else max(1, min(most_files // tracks, _MOST_TIMES))
    if tracks > most_tracks:
        raise ValueError(f"{tracks} tracks need more than memory_bytes allows, {most_tracks}: take fewer")
    if tracks * times > most_files:
        raise ValueError(
            f"{tracks} tracks at {times} times are more files than storage_bytes allows, {most_files}: take"
            " fewer, a smaller dtype, or more room"
        )
    return _found(low, high, tracks, times, dtype, mid_run)


def _checked(sigma_range: tuple[float, float], dtype: str, **numbers: int | None) -> tuple[float, float]:
    low, high = (float(s) for s in sigma_range)
    if not 0 < low < high < MAX_SIGMA_REL:
        raise ValueError(
            f"sigma_range must be two EMA lengths with 0 < low < high < {MAX_SIGMA_REL:.4f}, got ({low:g}, {high:g})"
        )
    if dtype not in TYPICAL_ROUNDING:
        raise ValueError(f"dtype {dtype!r} is not known: choose fp32, bf16 or fp16")
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, most in (("tracks", _MOST_TRACKS), ("times", 1024)):
        if (numbers[name] or 1) > most:
            raise ValueError(f"{name} must be at most {most}, got {numbers[name]}: more gain nothing")
    return low, high


def _affordable(name: str, room: int | None, num_params: int | None, bytes_each: int) -> int:
    """Number of averages that fit into a budget."""
    if room is None:
        return _MOST_TRACKS * 1024
    if num_params is None:
        raise ValueError(f"{name} needs num_params too, the number of averaged parameters")
    count = room // (bytes_each * num_params)
    if count < 1:
        raise ValueError(
            f"{name} of {room:,} does not hold one average of {num_params:,} parameters,"
            f" {bytes_each * num_params:,} bytes: give more room"
        )
    return count


@lru_cache(maxsize=64)
def _found(low: float, high: float, tracks: int, times: int, dtype: str, mid_run: bool) -> Plan:
    sigma_rels = best_widths(low, high, tracks)
    power = 1.0
    # In mid-run the first stored time, which has no history to help it, is the worst: its best widths are known.
    if times > 1 and not mid_run and tracks * times <= _MOST_SEARCHED:
        sigma_rels, power = _search(low, high, sigma_rels, times, dtype)
    return Plan(
        name=f"{tracks} tracks" + (f" at {times} times" if times > 1 else ""),
        sigma_rels=tuple(round(s, 4) for s in sigma_rels),
        times=tuple(round(t, 4) for t in _spaced(times, power)),
        dtype=dtype,
        sigma_range=(low, high),
    )


def best_widths(low: float, high: float, count: int) -> tuple[float, ...]:
    """EMA lengths whose averages at one time come closest to every length of a range.

    The relative L2 distance of the profile `x**g` to the span of `x**g_i` is the product of
    `|h - h_i| / (h + h_i)` with `h = g + 1/2` (Muntz). Its largest value over a range of h is least
    at Zolotarev's points, those of the alternating direction method: `h_i = b dn((2i - 1) K / 2n, k)`.

    Args:
        low: Shortest EMA length wanted.
        high: Longest EMA length wanted.
        count: Number of lengths.

    Returns:
        EMA lengths in increasing order.
    """
    a, b = sigma_rel_to_gamma(high) + 0.5, sigma_rel_to_gamma(low) + 0.5
    parts = (2 * np.arange(count) + 1) / (2 * count)
    points = b * _delta_amplitude(parts, np.sqrt(1 - (a / b) ** 2))
    return tuple(np.atleast_1d(gamma_to_sigma_rel(points - 0.5)).tolist())


def _delta_amplitude(parts: FloatArray, k: float) -> FloatArray:
    """Jacobi's dn at parts of the quarter period, by descending Landen steps."""
    mean, other, gaps = 1.0, np.sqrt((1 - k) * (1 + k)), []
    while mean - other > 1e-14 * mean:
        gap = (mean - other) / 2
        mean, other = (mean + other) / 2, np.sqrt(mean * other)
        gaps.append(gap / mean)
    angle = 2.0 ** len(gaps) * parts * np.pi / 2
    for gap in reversed(gaps):
        angle = (angle + np.arcsin(gap * np.sin(angle))) / 2
    return np.asarray(np.sqrt(1 - (k * np.sin(angle)) ** 2))


def _search(
    low: float, high: float, start: tuple[float, ...], times: int, dtype: str
) -> tuple[tuple[float, ...], float]:
    """EMA lengths, and power of the spacing, for several times; this has no closed form."""
    wanted = spread((low, high), 41)

    def cost(x: FloatArray) -> float:
        widths = np.sort(_squash(x[:-1]))
        if np.min(np.diff(np.log(widths)), initial=1.0) < 0.02 or not -1.5 < x[-1] < 1.5:
            return np.inf
        stored = _spaced(times, float(np.exp(x[-1])))
        return float(np.log(best_errors(stored, widths.tolist(), 1.0, wanted, dtype)[0].max()))

    found = minimise(cost, np.append(_stretch(np.array(start)), 0.0), steps=_STEPS)
    return tuple(np.sort(_squash(found[:-1])).tolist()), float(np.exp(found[-1]))


def _squash(x: FloatArray) -> FloatArray:
    return np.asarray(MAX_SIGMA_REL / (1 + np.exp(-x)))


def _stretch(widths: FloatArray) -> FloatArray:
    return np.asarray(-np.log(MAX_SIGMA_REL / widths - 1))


def _spaced(times: int, power: float) -> list[float]:
    return [float(x) for x in ((np.arange(times) + 1) / times) ** power]


def minimise(cost: Callable[[FloatArray], float], start: FloatArray, *, steps: int) -> FloatArray:
    """Minimise by the Nelder-Mead simplex search, restarted twice from where it ended; deterministic.

    Args:
        cost: Function to minimise; infinite where it is undefined.
        start: First guess [n].
        steps: Largest total number of steps.

    Returns:
        The best point found [n].
    """
    best = start
    for size in (0.25, 0.1, 0.03):
        points = np.concatenate([best[None], best + size * np.eye(best.size)])
        values = np.array([cost(p) for p in points])
        for _ in range(steps // 3):
            order = np.argsort(values, kind="stable")
            points, values = points[order], values[order]
            if values[-1] - values[0] < 1e-5:
                break
            point, value = _moved(cost, points, values)
            if value < values[-1]:
                points[-1], values[-1] = point, value
            else:
                points[1:] = (points[0] + points[1:]) / 2
                values[1:] = [cost(p) for p in points[1:]]
        best = points[np.argmin(values)]
    return best


def _moved(
    cost: Callable[[FloatArray], float], points: FloatArray, values: FloatArray
) -> tuple[FloatArray, float]:
    """The worst point, reflected, stretched or drawn in."""
    centre = points[:-1].mean(axis=0)
    away = centre - points[-1]
    reflected = centre + away
    value = cost(reflected)
    if value < values[0]:
        further = centre + 2 * away
        far = cost(further)
        return (further, far) if far < value else (reflected, value)
    if value < values[-2]:
        return reflected, value
    inside = centre + (0.5 if value < values[-1] else -0.5) * away
    return inside, cost(inside)
