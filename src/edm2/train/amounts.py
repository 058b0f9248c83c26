"""Numbers of images as people write them: 128Ki, 8Mi."""

from typing import Annotated

from edm2.extras import needed

with needed("edm2.train"):
    import tyro

_UNITS = {"Gi": 1 << 30, "Mi": 1 << 20, "Ki": 1 << 10}


def parse_amount(text: str) -> int:
    """Read a whole number, which may end in Ki, Mi or Gi (1024, 1024^2, 1024^3): `8Mi`, `1.5Ki`, `100_000`.

    Raises:
        ValueError: If it is not one.
    """
    number, unit = text.strip(), 1
    for name, size in _UNITS.items():
        if number.lower().endswith(name.lower()):
            number, unit = number[: -len(name)].strip(), size
            break
    try:
        value = int(number) * unit if unit == 1 else float(number) * unit
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text!r} must be a whole number, which may end in Ki, Mi or Gi, as in 128Ki or 8Mi")


def amount_text(number: int) -> str:
    """Write a number the way `parse_amount` reads it: with a unit where it is a multiple of one."""
    for name, size in _UNITS.items():
        if number and number % size == 0:
            return f"{number // size}{name}"
    return str(number)


# An option of the command line.
Amount = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N[Ki|Mi|Gi]",
        instance_from_str=lambda words: parse_amount(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda number: [amount_text(number)],
    ),
]
