"""What layers are called in the pictures of a study."""

from __future__ import annotations

import pytest

from paredown.report._heat import layer_names


@pytest.mark.parametrize("stem", ["encoder.stages", "a_word_longer_than_a_picture_has_room_for", "x"])
def test_no_two_layers_are_called_alike(stem: str) -> None:
    """Those of transformers' networks have long names with the same end: one curve each, not one for all of an end."""
    names = [f"model.{stem}.{i}.layers.{j}.layer.0.convolution" for i in range(3) for j in range(2)]
    called = layer_names([*names, "model.embedder.convolution"])
    assert len(set(called.values())) == len(names) + 1


def test_long_names_keep_first_letters() -> None:
    names = [f"net.encoder.stages.{i}.layers.0.layer.3.convolution" for i in (0, 1)] + ["net.head"]
    assert list(layer_names(names).values()) == ["e.s.0.l.0.l.3.convolution", "e.s.1.l.0.l.3.convolution", "head"]
