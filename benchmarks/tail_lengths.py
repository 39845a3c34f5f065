"""A tail at two learning rates, where bases see little of the gradient at first: mean loss of 20 steps.

    .venv/bin/python -m benchmarks.tail_lengths      # 1 minute on one core

A Llama of two blocks (d = 128) learns to count upwards from random numbers; batches of 8 x 64 tokens.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

from oasis_fx import OasisAdamW, oasis_backend

STEPS, VOCABULARY = 20, 512
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "rank 16": {"rank": 16},
    "rank 48": {"rank": 48},
    "rank 16, tail 32": {"rank": 16, "tail": 32},
    "rank 16, tail 112": {"rank": 16, "tail": 112},
}
RATES = (1e-3, 3e-3)


def mean_loss(lr: float, settings: dict[str, Any]) -> float:
    """Train for `STEPS` steps with a rate that falls to 0; return the mean of the losses."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if settings:
        model.compile(backend=oasis_backend(inner="aot_eager", **settings))
    kind: Any = OasisAdamW if settings else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=lr, weight_decay=0.0)
    starts = torch.randint(VOCABULARY, (8 * STEPS, 1), generator=torch.Generator().manual_seed(0))
    rows = (starts + torch.arange(64)) % VOCABULARY
    total = 0.0
    for step, batch in enumerate(rows.split(8)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / STEPS)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += float(loss.detach())
    return total / STEPS


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [[name, *(f"{mean_loss(lr, given):.3f}" for lr in RATES)] for name, given in METHODS.items()]
    print(tabulate(rows, headers=["", *(f"lr {lr}" for lr in RATES)], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
