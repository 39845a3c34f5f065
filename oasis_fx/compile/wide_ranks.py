"""Say where a rank is over the width of a weight: its basis is cut to that width, and saves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oasis_fx._torch.fake_tensors import known_fake
from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.graph.matricization import num_features
from oasis_fx.ranks import ALL_COLUMNS
from oasis_fx.settings import Settings

_NAMES_SHOWN = 5


def wide_ranks(record: CompiledGraph, example_inputs: Sequence[Any], settings: Settings) -> str | None:
    """Return a message on the weights of a graph that are narrower than their rank, or None where there is none.

    ``rank=10**6`` says that all columns are wanted, and is no mistake.
    """
    narrow: dict[int, list[str]] = {}
    widths: list[int] = []
    for group in record.groups:
        for index, features in zip(group.weights, group.features, strict=True):
            name, rank = record.names[index], settings.rank_asked_for(record.names[index])
            n = num_features(known_fake(example_inputs[index]).shape, features)
            # A size that varies is a symbol, and a comparison would fix it.
            if isinstance(n, int) and isinstance(rank, int) and n < rank < ALL_COLUMNS:
                narrow.setdefault(rank, []).append(name)
                widths.append(n)
    if not narrow:
        return None
    names = [name for found in narrow.values() for name in found]
    others = f" and {len(names) - _NAMES_SHOWN} others" if len(names) > _NAMES_SHOWN else ""
    ranks, width = " and ".join(map(str, sorted(narrow))), f"{min(widths)} in_features"
    return (
        f"rank is {ranks}, over the width of {', '.join(names[:_NAMES_SHOWN])}{others} "
        f"({width if len(set(widths)) == 1 else f'{width} and more'}): each has as many columns as it is wide, and its "
        "gradient and optimizer states take more memory than dense ones. Give a smaller rank, a fraction such as "
        "rank=0.25, or exclude=[...] for them; rank=10**6 asks for all columns on purpose"
    )
