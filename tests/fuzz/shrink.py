"""Make a failing program smaller while it fails in the same way.

Programs are lists of statements, so a shrinker of our own is short, and the seed stays the name of a program: a run of
ten thousand stops and goes on at any seed. Hypothesis would keep its examples in a database of its own and shrink the
choices of the generator, where most of what it tries is another program that does not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from fuzz.program import Options, Program, Statement

Fails = Callable[[Program], bool]


def shrink(program: Program, fails: Fails, most: int = 150) -> Program:
    """Return the smallest program found that still fails, after ``most`` tries at most."""
    tries, changed = 0, True
    while changed:
        changed = False
        for smaller in _smaller(program):
            tries += 1
            if tries > most:
                return program
            if fails(smaller):
                program, changed = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less; large cuts first."""
    half = len(program.body) // 2
    if half > 1:
        yield _with_body(program, program.body[half:])
        yield _with_body(program, program.body[:half])
    for body in _without_one(program.body):
        yield _with_body(program, body)
    for i in range(len(program.returns)):
        if len(program.returns) > 1:
            in_loss = tuple(j - (j > i) for j in program.in_loss if j != i)
            yield replace(
                program, returns=program.returns[:i] + program.returns[i + 1 :], in_loss=in_loss or (0,)
            ).trimmed()
    plain = Options(dtype=program.options.dtype)
    for name in ("rule", "budget", "calls", "inner", "rank", "exclude", "dynamic"):
        if getattr(program.options, name) != getattr(plain, name):
            yield replace(program, options=replace(program.options, **{name: getattr(plain, name)}))


def _with_body(program: Program, body: tuple[Statement, ...]) -> Program:
    """The program with another body; it returns the last variable where what it returned is gone."""
    made = {s.makes for s in body if s.makes} | {p.name for p in program.inputs}
    kept = [i for i, name in enumerate(program.returns) if name in made]
    in_loss = tuple(kept.index(i) for i in program.in_loss if i in kept)
    returns = tuple(program.returns[i] for i in kept)
    last = next((s.makes for s in reversed(body) if s.makes), None)
    if not in_loss and last is not None:
        returns, in_loss = (*returns, last), (len(returns),)
    return replace(program, body=body, returns=returns, in_loss=in_loss or (0,)).trimmed()


def _without_one(body: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    """Bodies with one statement less, from the end, or one region less around its statements."""
    for i in reversed(range(len(body))):
        statement = body[i]
        yield body[:i] + body[i + 1 :]
        if statement.makes:  # what read it reads a variable that went into it
            for source in sorted(statement.variables() - {statement.makes}):
                yield body[:i] + tuple(_renamed(s, statement.makes, source) for s in body[i + 1 :])
        if statement.body:
            yield body[:i] + statement.body + body[i + 1 :]
            for inner in _without_one(statement.body):
                if inner and any(s.makes for s in inner):
                    makes = statement.makes if any(s.makes == statement.makes for s in inner) else None
                    if makes is not None:
                        yield (*body[:i], replace(statement, body=inner), *body[i + 1 :])


def _renamed(statement: Statement, old: str, new: str) -> Statement:
    def rename(text: str) -> str:
        return re.sub(rf"(?<![\w.]){old}\b", new, text)

    reads = tuple(replace(read, rows=None if read.rows is None else rename(read.rows)) for read in statement.reads)
    text = statement.text if statement.body else rename(statement.text)
    makes = new if statement.makes == old else statement.makes
    return replace(
        statement, text=text, makes=makes, reads=reads, body=tuple(_renamed(s, old, new) for s in statement.body)
    )
