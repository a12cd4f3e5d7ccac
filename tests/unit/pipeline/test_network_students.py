"""Which students of an image classifier a run makes, by its dial."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from paredown.errors import InfeasibleBudget
from paredown.pipeline._network_students import MILDER, NetworkWorkshop
from paredown.pipeline._settings import Settings, Silent
from paredown.types import Plan

FASTEST = 0.1  # seconds of the fastest plan of `shop`'s table, and of its int8 form


class Shop(NetworkWorkshop):
    """A workshop whose table has a plan for all times but the shortest, and that makes nothing."""

    def student(self, name: str, plan: Plan, minutes: float, *_: Any, **__: Any) -> Any:
        return name, round(minutes, 2)


def shop(int8: float | None, fastest: float = FASTEST, **dial: Any) -> Shop:
    """Of a dense network that takes a second, and `int8` seconds in int8."""

    def plan(name: str, seconds: float, *, int8: bool) -> tuple[Plan, float, tuple[dict[str, Any], ...]]:
        if seconds < fastest * (0.5 if int8 else 1):
            raise InfeasibleBudget("none is so fast", closest=fastest * (0.5 if int8 else 1))
        return Plan("it", {}), seconds, ()

    table: Any = SimpleNamespace(watch=SimpleNamespace(dense=1.0, dense_int8=int8), plan=plan)
    nothing: Any = None
    return Shop(nothing, Settings("", "", None, "", **dial), nothing, Silent(), table)


@pytest.mark.parametrize(
    ("int8", "made"),
    [
        (0.5, [("at the target", 10.0), (MILDER, 10.0)]),  # too slow
        (0.2, [("at the target", 20.0)]),  # the dense network reaches the target in int8
        (1.2, [("at the target", 20.0)]),  # slower than it is, as on CPUs without int8 products
        (None, [("at the target", 20.0)]),  # int8 cannot be the answer
    ],
)
def test_what_is_too_slow_in_int8_has_a_milder_student(int8: float | None, made: list[Any]) -> None:
    assert shop(int8, speedup=3.0, minutes=20.0).for_speed(1.0) == made
    assert shop(int8, latency_ms=300.0, minutes=20.0).for_speed(1.0) == made


def test_what_only_int8_reaches_gets_all_the_minutes() -> None:
    assert shop(0.5, fastest=0.4, speedup=4.0, minutes=20.0).for_speed(1.0) == [(MILDER, 20.0)]


def test_out_of_reach_says_how_near_the_nearest_is() -> None:
    with pytest.raises(InfeasibleBudget, match="closest that can be reached is 2.50"):
        shop(None, fastest=0.4, speedup=9.0).for_speed(1.0)
    with pytest.raises(InfeasibleBudget, match="closest that can be reached is 5.00"):
        shop(0.5, fastest=0.4, speedup=9.0).for_speed(1.0)


def test_a_drop_shares_its_minutes_among_those_within_reach() -> None:
    made: Any = shop(0.5, fastest=0.6, max_drop=0.01, minutes=20.0).for_speed(1.0)
    assert [minutes for _, minutes in made if minutes] == [20.0]
    assert len(made) == 2
