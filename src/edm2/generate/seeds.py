"""Seeds as text, and in batches; each seed is one image."""

import re
from collections.abc import Iterator

_MOST = 10_000_000


def parse_seeds(text: str) -> list[int]:
    """Read seeds from text such as `0-63` or `1,5,10-12`.

    Raises:
        ValueError: If the text has another form, a range is empty, a seed is too large or occurs twice, or there are
            too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", part)
        if not match:
            raise ValueError(
                f"seeds {text!r}: {part!r} is neither a number nor a range; write 0-63 or 1,5,10-12"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"seeds {text!r}: the range {part.strip()} ends before it begins")
        if last >= 2**63:
            raise ValueError(f"seeds {text!r}: {last} is too large; seeds must be below 2^63")
        if len(seeds) + last - first >= _MOST:
            raise ValueError(f"seeds {text!r}: more than {_MOST:,} images; sample them in several folders")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        seen: set[int] = set()
        twice = next(seed for seed in seeds if seed in seen or seen.add(seed))  # type: ignore[func-returns-value]
        raise ValueError(f"seeds {text!r}: seed {twice} is given twice; each seed is one image")
    return seeds


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that divide `count` seeds into batches of at most `size`.

    Raises:
        ValueError: If one of them is below 1.
    """
    if count < 1 or size < 1:
        raise ValueError(f"{count} seeds in batches of {size}: both must be at least 1")
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
