"""Which weights are left alone by their names, and what globs that match nothing are told as."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.settings import Settings

HEADS = ["lm_head", "model.lm_head", "embed_out", "gpt_neox.embed_out", "score", "model.score", "head", "model.head",
         "classifier", "model.classifier", "output_projection", "decoder.output_projection"]  # fmt: skip
OTHERS = [
    "model.layers.0.mlp.up_proj",
    "heads.0",
    "blocks.0.heads",
    "scores",
    "lm_head_norm",
    "classifiers.0",
    "q_proj",
]


@pytest.mark.parametrize("name", HEADS)
def test_output_heads_keep_dense_gradients_by_default(name) -> None:
    assert Settings().reason_to_skip(f"{name}.weight") == "output head, excluded by default"
    assert Settings(exclude=[]).reason_to_skip(f"{name}.weight") is None


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_other_names_do_not(name) -> None:
    assert Settings().reason_to_skip(f"{name}.weight") is None


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.score = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.tanh(self.up(x))
        torch._dynamo.graph_break()
        return self.score(self.down(hidden))


def test_globs_that_have_matched_nothing_so_far_are_listed() -> None:
    """In a function that Dynamo breaks a later graph may match: nothing is refused, and the list says what is left."""
    backend = oasis_backend({"up.*": 2, "*down*": 3, "*nothing*": 4}, exclude=["*score*", "gone.*"], inner="aot_eager")
    assert backend.unmatched_globs() == ("*down*", "*nothing*", "*score*", "gone.*", "up.*")
    model = Net()
    torch.compile(model, backend=backend)(torch.randn(5, 6)).sum().backward()
    assert backend.unmatched_globs() == ("*nothing*", "gone.*")
    assert isinstance(model.up.weight.grad, LowRankGrad) and not isinstance(model.score.weight.grad, LowRankGrad)
