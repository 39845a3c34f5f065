"""The entry point of `torch.compile`: settings in, compiled graphs out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from oasis_fx._old_arguments import rank_without_text, rule_with
from oasis_fx.errors import OasisWarning, survive, warn_user
from oasis_fx.runtime.subspaces.rules import Rule
from oasis_fx.settings import Rank, Settings

if TYPE_CHECKING:  # these load Inductor
    from oasis_fx.compile.lowering import CompiledGraph
    from oasis_fx.inspect.graphs import GraphSet
    from oasis_fx.inspect.report import GraphReport
    from oasis_fx.inspect.stats import Stats
    from oasis_fx.runtime.subspaces.subspace import Subspace

Compiled = Callable[..., Any]


_NOT_CALLED = (
    "backend is oasis_backend itself, which makes a backend: call it, as in "
    "torch.compile(model, backend=oasis_backend(rank=32))"
)


def oasis_backend(
    rank: Rank = 32,
    *given: Any,
    subspace: str | Rule = "oja",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    inner: str = "inductor",
    memory_budget: float | str = 1.0,
    stats: bool = True,
    tail: int | float | None = None,
    options: Mapping[str, Any] | None = None,
    subspace_lr: float | str | None = None,
    subspace_every: int | None = None,
) -> OasisBackend:
    """Make a backend for `torch.compile` that trains linear layers in a learned activation subspace.

        model = torch.compile(model, backend=oasis_backend(rank=32))
        optimizer = OasisAdamW(model.parameters(), lr=1e-3)

    The forward pass and the gradients of activations are exact. The gradient of a rewritten weight
    W[m,n] is ``dW @ Q`` (m x rank), for the basis Q[n,rank] of the activation that the layer reads.

    Args:
        given: nothing; what `torch.compile` gives, where ``backend=oasis_backend`` was written without a call.
        rank: the number of columns of each basis: a whole number from 1, a fraction of in_features between 0 and 1,
            `AutoRank` of such a fraction, which is shared out over the weights during training, or a dict of globs over
            weight names to numbers, where the first glob that matches counts and weights that none matches keep dense
            gradients. A weight that is narrower than a whole number has all of its columns, with a warning; 10**6 asks
            for all columns on purpose.
        subspace: how a basis is chosen and moves: a rule of `oasis_fx.rules` with its settings, such as
            ``Oja(lr=0.5, every=10)``, or the name of a rule, which stands for the rule with its defaults: ``"oja"`` of
            OASIS (arXiv 2604.09406), ``"pca"``, ``"random"``, ``"principal_random"``, ``"sampled"``, ``"dct"`` for
            activations; ``"gradient_svd"``, ``"gradient_oja"``, ``"gradient_power"`` for weight gradients.
            docs/subspaces.md says what each does.
        include: globs over weight names; others keep dense gradients. Default: every weight.
        exclude: globs over weight names that keep dense gradients. Default: output heads, and embeddings
            with whatever is tied to one.
        inner: what compiles the rewritten graphs: ``"inductor"``, or ``"aot_eager"`` to run them node by node.
        memory_budget: how much a graph may keep for its backward pass; the rest is recomputed, what is cheapest for
            its bytes first. 0 to 1 is a share of what it would keep without; 1 leaves torch's own setting. A size
            such as ``"12GiB"`` (or MiB, GB, ...) holds for each compiled graph, inputs aside.
        stats: let graphs compute ||X||^2 for `OasisBackend.stats`, one more sum over each activation.
        tail: the number of columns beside each basis that are drawn anew at every optimizer step, outside of the basis:
            a whole number from 1, or a fraction of in_features; None for none. Weight gradients have coordinates for
            them too, moments do not: what the basis leaves out is learned at no cost in optimizer states. For
            ``"oja"``. docs/subspaces.md says when it is worth it.
        options: options of Inductor, as in `torch.compile(options=...)`, which override these.
        subspace_lr: the old form of ``subspace=Oja(lr=...)``, which goes with the next release.
        subspace_every: the old form of ``subspace=Oja(every=...)``, which goes with the next release.

    Raises:
        ValueError: an argument has a value that is not allowed, or the rule has no use for a setting. The message names
            the argument, its value, and what is allowed.
    """
    if isinstance(rank, fx.GraphModule):
        return _raise_when_called(ValueError(_NOT_CALLED))  # type: ignore[return-value]  # torch takes it for a graph
    if given:
        raise ValueError(f"oasis_backend got {given!r} after the rank: other settings are given by their names")
    settings = Settings(
        rank=rank_without_text(rank),
        subspace=rule_with(subspace, subspace_lr, subspace_every),
        include=include,  # type: ignore[arg-type]  # Settings makes a tuple of it
        exclude=exclude,  # type: ignore[arg-type]
        inner=inner,
        memory_budget=memory_budget,
        stats=stats,
        tail=tail,
        options=dict(options or {}),
    )
    return OasisBackend(settings)


class OasisBackend:
    """A backend of `torch.compile`, made by `oasis_backend`. One object may compile any number of models."""

    __name__ = "oasis"  # what torch shows for this backend in its logs

    def __init__(self, settings: Settings, inner_compile: Compiled | None = None) -> None:
        """``inner_compile`` stands in for Inductor's code generation, where graphs are wanted and not their code."""
        self.settings = settings
        self._inner_compile = inner_compile
        self._records: list[CompiledGraph] = []
        # What its own graphs have used, of the store that all backends share (`runtime_inputs.OnUse`).
        self._subspaces: WeakKeyDictionary[Subspace, tuple[str, ...]] = WeakKeyDictionary()
        self._unmatched = set(settings.globs())
        self._warned_of_width = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"OasisBackend({self.settings})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OasisBackend:
        """A copied model is compiled by the same backend, as it would be where the backend is a function."""
        return self

    def __reduce__(self) -> Any:
        rank = self.settings.rank
        settings = {**vars(self.settings), "rank": dict(rank) if isinstance(rank, Mapping) else rank}
        return _rebuild, (settings, self._inner_compile)  # what it has compiled does not travel

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compile one graph of Dynamo; `mode` and `options` are those of `torch.compile`.

        Raises:
            ValueError: ``options`` names ``custom_partitioner_fn``.
        """
        try:
            from oasis_fx._torch import dynamo_graphs
            from oasis_fx.compile import groups, lowering
        except ImportError as error:
            survive(error, f"gradients stay dense, oasis_fx does not know this torch ({torch.__version__})")
            return torch._inductor.compile(gm, list(example_inputs), options=dict(options or {}) or None)
        merged = self._inductor_options(mode, options)
        if not torch.is_grad_enabled():
            return lowering.compile_plainly(gm, example_inputs, self.settings, merged)
        try:
            names, partial = groups.parameter_names(gm, example_inputs), dynamo_graphs.is_partial_graph(gm)
            problem = self._unmatched_globs(names, partial)
        except Exception as error:
            survive(error, lowering.STAYS_DENSE)
            return lowering.compile_alone(gm, example_inputs, self.settings, merged, self._inner_compile)
        if problem is not None:
            return _raise_when_called(ValueError(problem))
        compiled, record = lowering.lower(
            gm, example_inputs, self.settings, merged, self._inner_compile, self._subspaces.setdefault
        )
        try:
            self._warn_of_wide_ranks(record, example_inputs)
        except OasisWarning as error:  # under ``-W error``
            return _raise_when_called(error)
        with self._lock:
            self._records.append(record)
        return compiled

    def report(self) -> list[GraphReport]:
        """Return one report for each graph compiled so far, in order; `str()` of one is a table.

        Where nothing was compiled the list is empty, and taking an item of it says what may be the reason.
        """
        from oasis_fx.inspect.report import report
        from oasis_fx.inspect.reports import Reports

        return Reports(report(self.compiled_graphs()))

    def graphs(self) -> list[GraphSet]:
        """Return the joint graph before and after, and the two partitions, of each graph with candidate weights."""
        from oasis_fx.inspect.graphs import graphs

        return graphs(self.compiled_graphs())

    def stats(self, model: torch.nn.Module | None = None) -> Stats:
        """Return how each subspace does at present, in the order in which graphs first used them.

        `str()` of it is a table. The call waits for the device.

        Args:
            model: the model whose names of weights are used. None: the names that the compiled graphs know, which start
                at the module that was compiled.
        """
        from oasis_fx.inspect.stats import collect_stats

        return collect_stats(self._subspaces, model)

    def unmatched_globs(self) -> tuple[str, ...]:
        """Return the globs of the settings that have matched no weight of any graph yet."""
        with self._lock:
            return tuple(sorted(self._unmatched))

    def compiled_graphs(self) -> list[CompiledGraph]:
        """Return what is known of each training graph compiled so far, in order."""
        with self._lock:
            return list(self._records)

    def reset(self) -> None:
        """Forget the compiled graphs. Bases belong to their weights and stay. `torch._dynamo.reset()` calls this."""
        with self._lock:
            self._records.clear()

    def _warn_of_wide_ranks(self, record: CompiledGraph, example_inputs: Sequence[Any]) -> None:
        from oasis_fx.compile.wide_ranks import wide_ranks

        if not self._warned_of_width and (message := wide_ranks(record, example_inputs, self.settings)):
            self._warned_of_width = True  # blocks that are compiled one by one would each say the same
            warn_user(message)

    def _inductor_options(self, mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
        by_mode = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else {}
        merged = {**by_mode, **self.settings.options, **(options or {})}
        Settings(options=merged)  # refuses what cannot be combined with this backend
        return merged

    def _unmatched_globs(self, names: Iterable[str], partial: bool) -> str | None:
        """Note which globs match a weight of this graph; say so if one matches none and no other graph can."""
        known = list(names)
        with self._lock:
            self._unmatched -= {glob for glob in self._unmatched if any(fnmatchcase(n, glob) for n in known)}
            unmatched = sorted(self._unmatched)
        if not unmatched or not known or partial:
            return None
        return (
            f"no weight matches {', '.join(map(repr, unmatched))} (include, exclude or rank): "
            f"the weights of this graph are {_some_of(known, unmatched)}"
        )


_NAMES_SHOWN = 5


def _some_of(names: Sequence[str], globs: Iterable[str]) -> str:
    """List names of weights for a message: all of a few, of many those that are most like one of the globs."""
    if len(names) <= _NAMES_SHOWN:
        return ", ".join(names)
    close = {name: None for glob in globs for name in get_close_matches(glob, names, n=2, cutoff=0.0)}
    shown = list(dict.fromkeys([*close, *names]))[:_NAMES_SHOWN]
    return f"{', '.join(shown)} and {len(names) - len(shown)} others; names are those of model.named_parameters()"


def _rebuild(settings: dict[str, Any], inner_compile: Compiled | None) -> OasisBackend:
    return OasisBackend(Settings(**settings), inner_compile)


def _raise_when_called(error: Exception) -> Compiled:
    # An exception raised in a backend reaches the user wrapped in a BackendCompilerFailed of Dynamo's.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def fail(*_: Any) -> Any:
        raise error

    return fail


_default_backend: OasisBackend | None = None
_default_lock = threading.Lock()


def oasis(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
    """Compile one graph with the default settings, for `torch.compile(model, backend="oasis")`.

    `options` of `torch.compile` are Inductor's.
    """
    return default_backend()(gm, example_inputs, **kwargs)


def default_backend() -> OasisBackend:
    """Return the backend that ``torch.compile(model, backend="oasis")`` uses, for its `report()` and `stats()`."""
    global _default_backend
    with _default_lock:
        if _default_backend is None:
            _default_backend = oasis_backend()
    return _default_backend
