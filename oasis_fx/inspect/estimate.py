"""What weights with dense gradients would have saved in a subspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oasis_fx._torch.joint_graphs import input_placeholders
from oasis_fx.graph.edits import shape, value
from oasis_fx.graph.facts import Contraction, JointFacts, LiftedWeight
from oasis_fx.graph.matricization import num_features
from oasis_fx.inspect.graphs import GraphSet
from oasis_fx.memory.node_costs import hint, num_bytes, num_tokens, saved_storages, storage_node
from oasis_fx.passes.find_weight_gradients import find_weight_gradients


@dataclass(frozen=True)
class Estimate:
    """What one weight by itself would save, in bytes. An activation that the backward pass reads elsewhere stays.

    Attributes:
        activation: N n of what it reads, as far as that is kept for the backward pass now.
        projection: N r + n r of P and C in its place.
    """

    activation: int
    projection: int

    @property
    def saved(self) -> int:
        """The bytes that would no longer be kept; never less than 0."""
        return max(0, self.activation - self.projection)


def estimate_dense(shown: GraphSet, rank_of: Callable[[str, int], int | None]) -> dict[str, Estimate]:
    """Estimate, by weight name, what the weights would save whose dense gradient is a matmul of an activation.

    Args:
        rank_of: the rank for a weight's name and in_features, as `Settings.rank_of`; None for it gives no estimate.
    """
    kept = saved_storages(shown.forward.graph, shown.trace.num_forward_outputs)
    rewritten = {site.inputs.weight for site in shown.trace.sites}
    estimates = {}
    for position, name in shown.record.names.items():
        if position in rewritten:
            continue
        activation = projection = 0
        n, terms = _terms(shown, position)
        for term in terms:
            rank = rank_of(name, n)
            if rank is None:
                break
            itemsize = value(term.x).dtype.itemsize
            activation += num_bytes(value(term.x)) if storage_node(term.x).name in kept else 0
            projection += num_tokens(term, n) * rank * itemsize + n * rank * max(itemsize, 4)  # C has the basis' dtype
        if projection:
            estimates[name] = Estimate(activation, projection)
    return estimates


def _terms(shown: GraphSet, position: int) -> tuple[int, tuple[Contraction, ...]]:
    """in_features, and the contractions of a dense gradient, one for each activation; none where it has others."""
    placeholder = input_placeholders(shown.before.graph).get(position)
    if placeholder is None:
        return 0, ()
    size = [hint(length) for length in shape(placeholder)]
    # No pass has looked at it; only one way to see it as rows and features can match.
    for features in dict.fromkeys([(len(size) - 1, len(size)), (len(size) - 2, len(size) - 1), (1, len(size)), (0, 1)]):
        # The analysis wants a slot and a basis with gradients; the weight stands in for them.
        weight = LiftedWeight(position, position, position, None, features)
        sites = find_weight_gradients(shown.before, JointFacts(shown.trace.num_forward_outputs, (weight,))).sites
        if sites:
            return num_features(size, features), tuple({term.x: term for term in sites[0].terms}.values())
    return 0, ()
