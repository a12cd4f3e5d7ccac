"""What the text of an option says: shares, amounts, figures and sizes."""

from __future__ import annotations

import math

import typer

BARE_BELOW = 0.1  # from here on a number without a percent sign could be meant in percent: 0.5, 1


def share(text: str) -> float:
    """The share that "1%" or "0.01" means. Anything that could be meant in two ways is refused.

    Raises `typer.BadParameter`.
    """
    said = str(text).strip()
    percent = said.endswith("%")
    try:
        number = float(said.removesuffix("%"))
    except ValueError:
        raise typer.BadParameter(f"{said!r} is not a share: write 1% or 0.01") from None
    value = number / 100 if percent else number
    if not math.isfinite(value) or value < 0 or (percent and value > 1):
        raise typer.BadParameter(f"{said} is not a share between 0% and 100%: write 1% or 0.01")
    if not percent and value >= BARE_BELOW:
        raise typer.BadParameter(
            f"{said} could mean {number:g}% or {number:.0%}: write {number:g}% or {number / 100:g}"
        )
    return value


def amount(text: str) -> float:
    """What "25%" (0.25), "0.25" or "2" takes away: a share of the original model's, or a number.

    Raises `typer.BadParameter`.
    """
    said = str(text).strip()
    try:
        value = float(said.removesuffix("%")) / (100 if said.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{said!r} is not an amount: write 25%, 0.25 or 2") from None
    if not math.isfinite(value) or value < 0 or (value >= 1 and (said.endswith("%") or value != int(value))):
        raise typer.BadParameter(f"{said} is neither a share below 100% nor a whole number: write 25%, 0.25 or 2")
    return value


def figures(text: str) -> tuple[float, ...]:
    """What ".485,.456,.406" says of red, green and blue. Raises `typer.BadParameter`."""
    try:
        found = tuple(float(one) for one in str(text).split(","))
    except ValueError:
        found = ()
    if len(found) != 3 or not all(map(math.isfinite, found)):
        raise typer.BadParameter(f"{text!r} is not three numbers: write .485,.456,.406")
    return found


def deviations(text: str) -> tuple[float, ...]:
    """The same where each must be above 0."""
    found = figures(text)
    if min(found) <= 0:
        raise typer.BadParameter(f"{text!r} holds a deviation that is not above 0")
    return found


def picture_size(text: str) -> tuple[int, int]:
    """The (height, width) that "224x224", or "224" for both, means. Raises `typer.BadParameter`."""
    sides = str(text).lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise typer.BadParameter(f"{text!r} is not a size: write 224x224, the height first")
    return int(sides[0]), int(sides[-1])
