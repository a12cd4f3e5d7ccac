"""Which students of an image classifier a run makes, by its dial."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from paredown.errors import InfeasibleBudget
from paredown.pipeline._ladder import MARGIN
from paredown.pipeline._network_students import MILDER, NetworkWorkshop
from paredown.pipeline._settings import Settings, Silent
from paredown.types import Plan

GOAL = round(1 / 3 / MARGIN, 4)  # seconds that a third of a second is planned for
FASTEST = 0.1  # seconds of the fastest plan of `shop`'s table, and of its int8 form


class Shop(NetworkWorkshop):
    asked: dict[str, float]  # seconds of the table, by student

    """A workshop that says what it would make."""

    def student(self, name: str, plan: Plan, minutes: float, *_: Any, **__: Any) -> Any:
        return name, round(minutes, 2), self.asked[name]


def shop(int8: float | None, fastest: float = FASTEST, **dial: Any) -> Shop:
    """Of a dense network that takes a second, `int8` seconds in int8, and cut `fastest`, half of it in int8: as it is,
    what is asked for beyond that is not there; in int8, it is timed and found too slow.
    """

    def plan(name: str, seconds: float, *, int8: bool) -> tuple[Plan, float, tuple[dict[str, Any], ...]]:
        found.asked[name] = round(seconds, 4)
        least = fastest * (0.5 if int8 else 1)
        if seconds < least and not int8:
            raise InfeasibleBudget("none is so fast", closest=least)
        return Plan("it", {}), max(seconds, least), ()

    table: Any = SimpleNamespace(watch=SimpleNamespace(dense=1.0, dense_int8=int8), plan=plan)
    nothing: Any = None
    found = Shop(nothing, Settings("", "", None, "", **dial), nothing, Silent(), table)
    found.asked = {}
    return found


@pytest.mark.parametrize(
    ("int8", "made"),
    [
        (0.5, [("at the target", 10.0, GOAL), (MILDER, 10.0, GOAL)]),  # too slow
        (0.32, [("at the target", 20.0, GOAL)]),  # the dense network reaches in int8 what was asked for
        (1.2, [("at the target", 20.0, GOAL)]),  # slower than it is, as on CPUs without int8 products
        (None, [("at the target", 20.0, GOAL)]),  # int8 cannot be the answer
    ],
)
def test_what_is_too_slow_in_int8_has_a_milder_student(int8: float | None, made: list[Any]) -> None:
    assert shop(int8, speedup=3.0, minutes=20.0).for_speed(1.0) == made
    assert shop(int8, latency_ms=1e3 / 3, minutes=20.0).for_speed(1.0) == made


def test_what_only_int8_reaches_gets_all_the_minutes() -> None:
    assert shop(0.5, fastest=0.4, speedup=4.0, minutes=20.0).for_speed(1.0) == [(MILDER, 20.0, round(0.25 / MARGIN, 4))]


def test_what_the_dense_network_reaches_in_int8_is_not_out_of_reach() -> None:
    assert shop(0.2, fastest=0.4, speedup=3.0).for_speed(1.0) == []


def test_out_of_reach_says_how_near_the_nearest_is() -> None:
    with pytest.raises(InfeasibleBudget, match="closest that can be reached is 2.50"):
        shop(None, fastest=0.4, speedup=9.0).for_speed(1.0)
    with pytest.raises(InfeasibleBudget, match="closest that can be reached is 5.00"):
        shop(0.5, fastest=0.4, speedup=9.0).for_speed(1.0)


def test_a_drop_shares_its_minutes_among_those_within_reach() -> None:
    made: Any = shop(0.5, fastest=0.6, max_drop=0.01, minutes=20.0).for_speed(1.0)
    assert made == [("1.15 times", 0.0, round(1 / 1.15, 4)), ("1.4 times, trained", 20.0, round(1 / 1.4, 4))]
    assert [minutes for _, minutes, _ in cast(Any, shop(0.5, max_drop=0.01, minutes=21.0).for_speed(1.0))] == [
        0,
        7,
        7,
        7,
    ]
