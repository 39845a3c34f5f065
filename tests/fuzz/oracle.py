"""What is right: a program under the backend against the same program in eager mode.

Compared are outputs, inputs and buffers after the calls, gradients of inputs, dense gradients, factors of low-rank
gradients (``dW Q`` for the basis at hand; also ``G Q^T = dW`` where the basis is square), gradients of rules that leave
them dense (the sum of ``dW Q Q^T`` over the uses of a weight, each with its own basis) and statistics (the sum of
``X^T X Q``).

For these the reference knows every use of a weight: its X, which the program's text shows, and its own part of dW,
since at each use a zero is added to the weight that has a gradient of its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fuzz.closeness import Wrong
from fuzz.comparing import compare
from fuzz.generate import generate
from fuzz.program import Program
from fuzz.running import Run, our_backend, run_program, stock_backend, tensors
from oasis_fx.errors import OasisWarning


@dataclass(frozen=True)
class Verdict:
    """What came of a program.

    Attributes:
        kind: ``"right"``, ``"wrong"``, ``"crash"``, ``"warning"``; ``"stock is wrong"``, ``"stock crashes"``; or
            ``"not drawn"`` where it does not run eagerly.
        what: of a failure: what is wrong, in a few words that stay the same while the program is shrunk.
        detail: numbers, or the exception.
        counts: comparisons made, by kind.
    """

    kind: str
    what: str = ""
    detail: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "crash", "warning")


def draw(seed: int) -> Program:
    """The program of a seed: the first of its tries that runs eagerly."""
    for attempt in range(20):
        program = generate(seed, attempt)
        if judgeable(program) is not None:
            return program
    raise AssertionError(f"no try of seed {seed} runs eagerly")


def judgeable(program: Program) -> Run | None:
    """The reference, or None where the program does not run eagerly to finite numbers."""
    try:
        with _quiet():
            reference = run_program(program, None, tapped=True)
            if "in place on a weight" in program.features():  # taps are copies: do weights as they are allow it too?
                run_program(program, None)
    except Exception:
        return None
    return reference if all(bool(t.isfinite().all()) for t in tensors(reference)) else None


def judge(program: Program) -> Verdict:
    """Run a program under the backend and compare."""
    reference = judgeable(program)
    if reference is None:
        return Verdict("not drawn")
    counts: dict[str, int] = {}
    try:
        with _quiet() as caught:
            ours = run_program(program, our_backend(program))
            compare(program, reference, ours, counts)
        told = [str(w.message) for w in caught if issubclass(w.category, OasisWarning)]
        # That a step had nothing to do for it; that a rank is over the width of a weight, as is drawn on purpose.
        told = [text for text in told if not text.startswith("OasisAdamW") and "over the width of" not in text]
        return Verdict("warning", "warning", told[0], counts) if told else Verdict("right", counts=counts)
    except Exception as error:
        if isinstance(error, Wrong):
            verdict = Verdict("wrong", f"wrong: {error.args[0]}", f"{error.args[1]}", counts)
        else:
            verdict = Verdict("crash", f"crash: {type(_root(error)).__name__}", _line(_root(error)), counts)
    return _beside_stock(program, reference, verdict)


def _beside_stock(program: Program, reference: Run, verdict: Verdict) -> Verdict:
    """A failure's verdict, once stock torch has tried the same."""
    try:
        with _quiet():
            stock = run_program(program, stock_backend(program))
    except Exception as error:
        if verdict.kind == "wrong":  # in silence, where stock torch refuses
            return verdict
        return Verdict("stock crashes", verdict.what, _line(_root(error)), verdict.counts)
    try:
        compare(program, reference, stock, {})
    except Wrong as wrong:
        return Verdict("stock is wrong", verdict.what, f"{verdict.detail}; stock: {wrong.args}", verdict.counts)
    return verdict


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logging.disable(logging.CRITICAL)  # torch logs what it then raises
        try:
            yield caught
        finally:
            logging.disable(logging.NOTSET)


def _root(error: BaseException) -> BaseException:
    """The exception behind Dynamo's own."""
    inner = getattr(error, "inner_exception", None) or (error.__cause__ if "Backend" in type(error).__name__ else None)
    return error if inner is None else _root(inner)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
