"""What is compared: for each name, the optimizer, the backend, and the learning rates to try."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from oasis_fx.ranks import parse_auto_rank
from oasis_fx.rules import PCA, GradientSVD, Oja, PrincipalRandom, rule_of


@dataclass(frozen=True)
class Method:
    """What tells one way to train from another.

    Attributes:
        optimizer: its name, in oasis_fx or, without a ``backend``, in torch.optim.
        rates: learning rates to try.
        backend: arguments of `oasis_backend`; None for stock `torch.compile`.
        options: of the optimizer.
        weight_decay: at learning rates as high as SGD's the usual 0.1 would halve weights in ten steps.
        exact_every: at each so many steps the gradient is dense, by stock `torch.compile`; 0: never.
        schedule: factors of the rank, from shares of all steps on.
        tail: columns of the tail as a multiple of the rank; 0 for none.
    """

    optimizer: str
    rates: tuple[float, ...]
    backend: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.1
    exact_every: int = 0
    schedule: dict[float, float] = field(default_factory=dict)
    tail: float = 0


LOW = (5e-4, 1e-3, 2e-3, 4e-3)
SGD = (0.1, 0.3, 1.0, 3.0)
METHODS = {
    "adamw": Method("AdamW", LOW, options={"fused": True}),
    "sgd": Method("SGD", SGD, options={"momentum": 0.9}, weight_decay=0.0),
    "oja": Method("OasisAdamW", LOW, {"subspace": "oja"}),
    "oja-auto": Method("OasisAdamW", LOW, {"subspace": Oja(lr="auto")}),
    "oja-exact20": Method("OasisAdamW", LOW, {"subspace": "oja"}, {"step_outside_subspace": True}, exact_every=20),
    "oja-growing": Method("OasisAdamW", LOW, {"subspace": "oja"}, schedule={0.0: 0.5, 0.5: 1.0, 0.75: 2.0}),
    "oja-tail": Method("OasisAdamW", LOW, {"subspace": "oja"}, tail=1),
    "oja-tail3": Method("OasisAdamW", LOW, {"subspace": "oja"}, tail=3),
    "pca": Method("OasisAdamW", LOW, {"subspace": PCA(every=50)}),
    "random": Method("OasisAdamW", LOW, {"subspace": "random"}),
    "principal_random": Method("OasisAdamW", LOW, {"subspace": PrincipalRandom(every=50)}),
    "principal_random-full": Method(
        "OasisAdamW",
        LOW,
        {"subspace": PrincipalRandom(every=50)},
        {"full_size_states": True},
    ),
    "sampled": Method("OasisAdamW", LOW, {"subspace": "sampled"}),
    "gradient_svd": Method("OasisAdamW", LOW, {"subspace": GradientSVD(every=50)}),
    "gradient_oja": Method("OasisAdamW", LOW, {"subspace": "gradient_oja"}),
    "gradient_power": Method("OasisAdamW", LOW, {"subspace": "gradient_power"}),
    "dct": Method("OasisAdamW", LOW, {"subspace": "dct"}),
    "oja-sgd": Method("OasisSGD", SGD, {"subspace": "oja"}, weight_decay=0.0),
    "oja-lion": Method("OasisLion", (1e-4, 3e-4, 1e-3, 3e-3), {"subspace": "oja"}),
    "oja-muon": Method("OasisMuon", (1e-3, 3e-3, 1e-2, 3e-2), {"subspace": "oja"}),
    "oja-muon-tail": Method("OasisMuon", (1e-3, 3e-3, 1e-2, 3e-2), {"subspace": "oja"}, tail=1),
}


FINETUNED = ("adamw", "lora", "galore", "oasis")


def build(
    method: Method,
    model: torch.nn.Module,
    *,
    rank: int | str,
    lr: float,
    weight_decay: float,
    inner: str,
    rank_scaling: bool,
    **overrides: Any,
) -> torch.optim.Optimizer:
    """Compile ``model`` in place and return its optimizer. ``overrides`` go to the backend."""
    import oasis_fx

    parameters = [p for p in model.parameters() if p.requires_grad]
    if method.backend is None:
        model.compile(backend=inner)
        stock = getattr(torch.optim, method.optimizer)
        return stock(parameters, lr=lr, weight_decay=weight_decay, **method.options)
    # Settings of runs are kept as JSON, where the step size of the rule has a name of its own and AutoRank is a text.
    rule = rule_of(method.backend["subspace"], lr=overrides.pop("subspace_lr", None))
    columns = parse_auto_rank(rank) if isinstance(rank, str) else rank
    if method.tail:
        assert isinstance(columns, int)
        overrides["tail"] = round(method.tail * columns)
    model.compile(backend=oasis_fx.oasis_backend(columns, inner=inner, subspace=rule, **overrides))
    optimizer = getattr(oasis_fx, method.optimizer)
    options = dict(method.options)
    if method.optimizer != "OasisSGD":
        options["rank_scaling"] = rank_scaling
    return optimizer(parameters, lr=lr, weight_decay=weight_decay, **options)


def known(names: Iterable[str]) -> list[str]:
    """``names``, all of which must be methods.

    Raises:
        ValueError: naming one that is not.
    """
    for name in (names := list(names)):
        if name not in (*METHODS, *FINETUNED):
            raise ValueError(f"--methods names {name!r}: it must be of {', '.join((*METHODS, *FINETUNED))}")
    return names
