from __future__ import annotations

import pytest
import torch

from paredown.anatomy import describe
from paredown.models import build_empty
from paredown.surgery import fold
from tests.contracts.families import TASKS, batch, stock, tiny


def test_what_was_done_is_said() -> None:
    model = tiny("bert", "text-embedding")
    with torch.no_grad():
        model.get_submodule("encoder.layer.1.attention.self.key").bias.zero_()
    folded, done = fold(model, describe(model))
    assert done == (
        "key biases dropped in 2 layers",
        "value biases moved into the output biases of 3 layers",
        "pooler dropped, which this task never reads",
    )
    assert folded.pooler is None and model.pooler is not None
    assert not any("pooler" in name for name in folded.state_dict())


def test_the_value_bias_arrives_in_the_output_bias() -> None:
    model = tiny("roberta")
    folded, _ = fold(model, describe(model))
    before, after = (m.get_submodule("roberta.encoder.layer.2.attention") for m in (model, folded))
    expected = before.output.dense.bias + before.output.dense.weight @ before.get_submodule("self.value").bias
    assert torch.allclose(after.output.dense.bias, expected, atol=1e-6)
    assert torch.equal(after.output.dense.weight, before.output.dense.weight)
    assert (stock(folded, batch(model)) - stock(model, batch(model))).abs().max() < 1e-5


def test_a_classifier_keeps_the_pooler_that_it_reads() -> None:
    model = tiny("bert")
    folded, done = fold(model, describe(model))
    assert folded.get_submodule("bert.pooler") is not None and len(done) == 2


@pytest.mark.parametrize("task", TASKS)
def test_an_empty_shell_takes_a_folded_state(task: str) -> None:
    model = tiny("mpnet", task)
    folded, _ = fold(model, describe(model))
    empty = build_empty(model.config.to_dict(), task)
    shell, done = fold(empty, describe(empty))
    assert len(done) == (task == "text-embedding")
    shell.load_state_dict(folded.state_dict(), assign=True)
    assert torch.equal(stock(shell, batch(model)), stock(folded, batch(model)))
