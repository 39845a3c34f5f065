"""Draw programs from seeds.

Statements are drawn one by one and run on the spot, so a template says nothing about shapes: what raises is not taken.
The same seed gives the same program for as long as the files that draw stay as they are.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import torch

from fuzz import statements
from fuzz.calling import CALLS
from fuzz.drawing import Drawing
from fuzz.program import REGIONS, Options, Program, Statement
from oasis_fx import AutoRank
from oasis_fx.runtime.subspaces.rules import RULES

SHARES: tuple[tuple[float, Callable[[Drawing], Statement | None]], ...] = (
    (0.42, statements.multiply),
    (0.05, statements.experts),
    (0.06, statements.convolution),
    (0.04, statements.submodule),
    (0.02, statements.loop),
    (0.03, statements.embedding),
    (0.20, statements.pointwise),
    (0.07, statements.reshape),
    (0.06, statements.in_place),
    (0.05, statements.buffer),
    (0.02, statements.weight_in_place),
    (0.02, statements.graph_break),
)

# Statements of a program; seeds of `make test` have fewer, for its time.
NUM_SHORT, SHORT, LONG = 300, (1, 2, 2, 3, 3, 4), (1, 2, 2, 3, 3, 4, 4, 5, 7)

OTHER_RULES = ("DCT('gradient')", "PrincipalRandom(principal=0.3)", "GradientPower(rho=0.5)")


def generate(seed: int, attempt: int = 0) -> Program:
    """A program. Whether it runs eagerly, backward pass and all, is for the caller to see: else the next attempt."""
    rng = random.Random(f"program {seed} {attempt}")
    draw = Drawing(rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(rng.choice([1, 1, 1, 2])):
            statements.new_input(draw)
        body = _block(draw, rng.choice(SHORT if seed < NUM_SHORT else LONG), depth=0)
        returns = _returns(draw, body)
    in_loss = tuple(i for i in range(len(returns)) if rng.random() < 0.8) or (0,)
    parameters, inputs = tuple(draw.parameters), tuple(draw.inputs)
    return Program(seed, parameters, inputs, tuple(body), returns, in_loss, _options(draw)).trimmed()


def _options(draw: Drawing) -> Options:
    rng = draw.rng
    kind = rng.random()
    rule = "oja" if rng.random() < 0.45 else rng.choice([*RULES, *OTHER_RULES])
    rank = rng.choice([99, 99, 99, 99, 1, 1, 2, 2, 0.5, 0.3, AutoRank(0.5)])
    return Options(
        rule=rule,
        rank=0.5 if isinstance(rank, AutoRank) and not rule.endswith("oja") else rank,
        budget=rng.choice([1.0, 1.0, 1.0, 0.5, 0.1, 0.0]),
        inner="aot_eager" if kind < 0.7 else "no code" if kind < 0.99 else "inductor",
        dynamic=True if rng.random() < 0.08 else None,
        calls="once" if rng.random() < 0.55 else rng.choice(list(CALLS)),
        dtype=str(draw.dtype).removeprefix("torch."),
        exclude=None if rng.random() < 0.5 else (),
    )


def _block(draw: Drawing, length: int, depth: int) -> list[Statement]:
    body: list[Statement] = []
    for _ in range(length * 6):
        if len(body) >= length:
            break
        statement = _region(draw, depth) if depth < 2 and draw.rng.random() < 0.13 else _simple(draw, depth)
        if statement is not None:
            body.append(statement)
    return body


def _simple(draw: Drawing, depth: int) -> Statement | None:
    (make,) = draw.rng.choices([make for _, make in SHARES], [share for share, _ in SHARES])
    if make is statements.graph_break and depth > 0:
        return None
    try:
        return make(draw)
    except (IndexError, RuntimeError, TypeError, ValueError):  # a template for other sizes
        return None


def _region(draw: Drawing, depth: int) -> Statement | None:
    kinds = ["checkpoint", "checkpoint", "no_grad", "nested compile region", *["autocast"] * (8 * draw.half)]
    kind, known, values = draw.rng.choice(kinds), list(draw.shown), dict(draw.env)
    is_function = not REGIONS[kind].startswith("with")
    around = {"no_grad": torch.no_grad(), "autocast": torch.autocast("cpu", torch.bfloat16)}
    with around.get(kind, contextlib.nullcontext()):
        body = _block(draw, draw.rng.randint(1, 3), 2 if is_function else depth + 1)
    made = [s.makes for s in body if s.makes is not None and s.makes not in known]
    if not made:
        draw.shown, draw.env = known, values
        return None
    if is_function:  # what else it makes is not seen outside
        draw.shown = [*known, made[-1]]
    return Statement(kind, made[-1], body=tuple(body))


def _returns(draw: Drawing, body: list[Statement]) -> tuple[str, ...]:
    """Mostly what no statement reads; sometimes more, twice, or an input."""
    rng = draw.rng
    read: set[str] = set().union(*(s.variables() - ({s.makes} if not s.body else set()) for s in body))
    made = [name for name in draw.shown if name[0] == "v"] or draw.shown
    chosen = [name for name in made if name not in read][-4:] or [made[-1]]
    chosen += [name for name in made if name in read and rng.random() < 0.1][:1]
    if rng.random() < 0.1:
        chosen.append(rng.choice(chosen))
    if rng.random() < 0.04:
        chosen.append(rng.choice(draw.shown))
    rng.shuffle(chosen)
    return tuple(chosen)
