"""Description of a survey in words."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from edm2.data.files import SKIP
from edm2.data.prepare.survey import Survey

_MODES = {
    "L": "gray", "LA": "gray with alpha", "RGB": "RGB", "RGBA": "RGBA", "F": "one band of numbers", "array": "arrays",
}  # fmt: skip


def describe(found: Survey) -> str:
    """Text that `edm2 data info` prints.

    Args:
        found: Result of `survey`.
    """
    problems, changes = _problems(found), _changes(found)
    lines = [
        f"source    {found.where}",
        f"images    {found.num_images:,}, {_bytes(found.num_bytes)} as stored",
        f"size      {_counted(found.sizes, lambda size: f'{size[0]}x{size[1]} (height x width)')}",
        f"mode      {_counted(found.modes, _MODES.__getitem__)}",
        *_values(found),
        *_classes(found),
        *_others(found),
    ]
    if changes:
        lines += ["when read", *(f"  - {change}" for change in changes)]
    lines += ["to fix", *(f"  - {problem}" for problem in problems)] if problems else ["to fix    nothing"]
    return "\n".join(lines)


def _values(found: Survey) -> list[str]:
    if found.mean is None or found.std is None:
        return []
    (channels, dtype), _ = found.kinds.most_common(1)[0]
    of = "of x / 127.5 - 1, " if dtype == "uint8" else ""
    part = "" if found.num_decoded == found.num_images else f"on {found.num_decoded:,} images, "
    return [
        f"values    {_channels(channels)} of {dtype}, {found.minimum:g} to {found.maximum:g}",
        f"mean      {_numbers(found.mean)}  ({of}{part}by channel)",
        f"std       {_numbers(found.std)}",
        *_coding(found.mean, found.std),
    ]


def _classes(found: Survey) -> list[str]:
    sizes = found.class_sizes
    if sizes is None:
        return ["classes   none"]
    names = found.class_names or tuple(str(number) for number in range(len(sizes)))
    order = sizes.argsort(kind="stable")
    small, large = order[0], order[-1]
    lines = [
        f"classes   {len(sizes)}, of {sizes[small]:,} ({names[small]}) to {sizes[large]:,} ({names[large]}) images"
    ]
    if len(sizes) <= 20:
        lines += [f"  {name}: {size:,}" for name, size in zip(names, sizes, strict=True)]
    return lines


def _others(found: Survey) -> list[str]:
    if not found.passed_over:
        return []
    counts = Counter(found.passed_over)
    return [f"others    {_counted(counts, str, always=True)} (files that are neither images nor labels)"]


def _problems(found: Survey) -> list[str]:
    problems = []
    if found.damaged:
        shown = "; ".join(f"{name!r} ({reason})" for name, reason in found.damaged[:5])
        more = " ..." if len(found.damaged) > 5 else ""
        problems.append(
            f"cannot be read: {_images(len(found.damaged))}: {shown}{more}. Replace them, or leave them out with {SKIP}"
        )
    if found.unread:
        problems.append(f"{found.unread}: convert them to PNG or JPEG to include them")
    if len(found.sizes) > 1:
        side = min(min(size) for size in found.sizes)
        problems.append(
            f"{len(found.sizes)} different sizes: run 'edm2 data convert {found.where} --out NEW.zip --size N', "
            f"N up to {side} enlarges no image"
        )
    if len(found.kinds) > 1:
        kinds = _counted(found.kinds, lambda kind: f"{_channels(kind[0])} of {kind[1]}")
        problems.append(f"different kinds of images ({kinds}): train on each separately")
    if found.class_sizes is not None and (found.class_sizes == 0).any():
        problems.append(f"classes without images: {(found.class_sizes == 0).sum()}")
    flat = [str(channel) for channel in _constant(found.mean or (), found.std or ())]
    if flat:
        problems.append(f"channel {', '.join(flat)} is constant: leave it out of the images")
    return problems


def _changes(found: Survey) -> list[str]:
    changes = [f"{note}: {_images(count)}" for note, count in found.notes.items()]
    if len(found.modes) > 1 and len(found.kinds) == 1:
        (channels, _), _ = found.kinds.most_common(1)[0]
        changes.append(f"different modes: all with {_channels(channels)}, transparent parts on white")
    return changes


def _coding(mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    magnitude = (sum(m * m + s * s for m, s in zip(mean, std, strict=True)) / len(mean)) ** 0.5
    if 0.5 / 1.5 <= magnitude <= 0.5 * 1.5 or _constant(mean, std):
        return []
    return [
        f"coding    measured (the default) brings these to 0 and 0.5; plain would leave the magnitude {magnitude:.3g}, "
        f"far from sigma_data 0.5"
    ]


def _constant(mean: tuple[float, ...], std: tuple[float, ...]) -> list[int]:
    return [i for i, (m, s) in enumerate(zip(mean, std, strict=True)) if s <= 1e-6 * abs(m)]


def _counted(counts: Counter[Any], words: Callable[[Any], str], *, always: bool = False) -> str:
    shown = [f"{words(key)}: {count:,}" for key, count in counts.most_common(4)]
    if len(counts) == 1 and not always:
        return words(next(iter(counts)))
    return "; ".join(shown) + (f"; {len(counts) - 4} more" if len(counts) > 4 else "")


def _channels(count: int) -> str:
    return f"{count} channel" + ("" if count == 1 else "s")


def _images(count: int) -> str:
    return f"{count:,} image" + ("" if count == 1 else "s")


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
