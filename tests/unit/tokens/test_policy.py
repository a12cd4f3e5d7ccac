"""A token policy is a value: it survives JSON, has an id, and refuses what makes no sense in one sentence."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from paredown.types import RULES, TokenPolicy, TokenStage

STAGES = (TokenStage(2, 0.7), TokenStage(4, 0.45))
FULL = TokenPolicy("learned", STAGES, "quantile", "drop", 3, True, 12, (2, 3))
OTHER: dict[str, Any] = {  # another value for every field
    "scorer": "norm",
    "stages": STAGES[:1],
    "rule": "ratio",
    "action": "merge",
    "least": 4,
    "exit": False,
    "off_below": 0,
    "special_ids": (3,),
}


@pytest.mark.parametrize("policy", [FULL, TokenPolicy("norm"), TokenPolicy("norm", (TokenStage(1, 0.5),))])
def test_json_and_back(policy: TokenPolicy) -> None:
    again = TokenPolicy.from_json(policy.to_json())
    assert again == policy and again.to_json() == policy.to_json() and again.id == policy.id
    assert type(again.stages) is tuple and type(again.special_ids) is tuple and hash(again) == hash(policy)
    assert TokenPolicy.from_json(json.dumps(json.loads(policy.to_json()), indent=1)) == policy  # in another layout
    assert json.loads(policy.to_json()).keys() == {field.name for field in fields(TokenPolicy)}


@pytest.mark.parametrize(("rule", "keep"), [("ratio", 1), ("quantile", 0), ("threshold", 2), ("ratio", np.float64(1))])
def test_a_number_written_otherwise_is_the_same_policy(rule: str, keep: Any) -> None:
    policy = TokenPolicy("norm", (TokenStage(1, keep),), rule)
    again = TokenPolicy.from_json(policy.to_json())
    assert again == policy and again.id == policy.id


def test_the_id_is_that_of_all_its_fields() -> None:
    assert len(FULL.id) == 64 and FULL.id == replace(FULL).id
    without_exit = replace(FULL, exit=False)  # merging has none
    changed = [replace(without_exit if name == "action" else FULL, **{name: value}) for name, value in OTHER.items()]
    assert {*OTHER, "version"} == {field.name for field in fields(TokenPolicy)}
    assert len({FULL.id, *(policy.id for policy in changed)}) == 1 + len(OTHER)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_not_guessed_at(version: object) -> None:
    raw = {**json.loads(FULL.to_json()), "version": version}
    with pytest.raises(ValueError, match=rf"version {version!r} is not known to this release"):
        TokenPolicy.from_json(json.dumps(raw))
    del raw["version"]
    with pytest.raises(ValueError, match="version None"):
        TokenPolicy.from_json(json.dumps(raw))


def test_a_field_that_nobody_knows_or_that_lacks_is_refused() -> None:
    raw = json.loads(FULL.to_json())
    with pytest.raises(TypeError, match="colour"):
        TokenPolicy.from_json(json.dumps({**raw, "colour": "red"}))
    for name in ("stages", "special_ids", "scorer"):
        with pytest.raises((KeyError, TypeError), match=name):
            TokenPolicy.from_json(json.dumps({key: value for key, value in raw.items() if key != name}))
    with pytest.raises(ValueError, match="rule is 'best'"):
        TokenPolicy.from_json(json.dumps({**raw, "rule": "best"}))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"rule": "best"}, "rule is 'best'; choose ratio, quantile, threshold"),
        ({"action": "hide"}, "action is 'hide'; choose drop, merge"),
        ({"action": "merge", "rule": "threshold"}, "merging takes a ratio or a quantile"),
        ({"action": "merge", "exit": True}, "and no exit"),
        ({"stages": (TokenStage(0, 0.5),)}, r"after layers \[0\]"),
        ({"stages": (TokenStage(-1, 0.5), TokenStage(2, 0.5))}, r"after layers \[-1, 2\]"),
        ({"stages": (TokenStage(3, 0.5), TokenStage(2, 0.5))}, "and they rise"),
        ({"stages": (TokenStage(2, 0.5), TokenStage(2, 0.5))}, "and they rise"),
        ({"stages": (TokenStage(1, 0.5), TokenStage(2, 1.1))}, r"a ratio is a share from 0 to 1; got \[0\.5, 1\.1\]"),
        ({"stages": (TokenStage(1, -0.1),), "rule": "quantile"}, "a quantile is a share from 0 to 1"),
        ({"stages": (TokenStage(1, float("nan")),)}, "a ratio is a share"),
        ({"stages": (TokenStage(1, float("nan")),), "rule": "threshold"}, "a threshold is a finite number"),
        ({"stages": (TokenStage(1, float("inf")),), "rule": "threshold"}, "a threshold is a finite number"),
        ({"least": 0}, "least is 1 or more"),
        ({"off_below": -1}, "off_below 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        TokenPolicy("norm", **bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", RULES)
def test_the_ends_of_a_range_are_fine(rule: str) -> None:
    for keep in (0.0, 1.0):
        assert TokenPolicy("norm", (TokenStage(1, keep),), rule).stages[0].keep == keep
    assert TokenPolicy("norm", (TokenStage(1, -7.5),), "threshold").stages[0].keep == -7.5


def test_which_policies_can_drop_nothing() -> None:
    def policy(rule: str, *keeps: float, **options: Any) -> TokenPolicy:
        return TokenPolicy("norm", tuple(TokenStage(i, keep) for i, keep in enumerate(keeps, 1)), rule, **options)

    for rule in RULES:
        assert policy(rule).is_identity  # no stage
    assert policy("ratio", 1.0).is_identity and policy("ratio", 1.0, 1.0, action="merge").is_identity
    assert policy("quantile", 0.0, 0.0).is_identity
    assert not policy("ratio", 1.0, 0.99).is_identity and not policy("ratio", 0.0).is_identity
    assert not policy("quantile", 0.0, 0.01).is_identity and not policy("quantile", 1.0).is_identity
    for keep in (-100.0, 0.0, 1.0):  # who knows what scores there are
        assert not policy("threshold", keep).is_identity
    assert not policy("ratio", 0.5, off_below=10**6).is_identity
