"""A program of the fuzzer: what it is made of, and its text.

A program is a torch module in the form of statements, with the options under which it is compiled and the way in which
it is called. Its text is plain Python and is what runs, so what is printed for a failure is what failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from oasis_fx import AutoRank


@dataclass(frozen=True)
class Parameter:
    """An attribute of the module.

    Attributes:
        name: ``w`` for weights of two dimensions and more, ``b`` for other parameters, ``s`` for buffers, ``m`` for
            submodules, with a number.
        make: Python that makes it; ``randn(...)`` draws from the program's generator.
    """

    name: str
    make: str


@dataclass(frozen=True)
class Read:
    """A weight whose gradient is a matmul with an activation.

    Attributes:
        weight: its name.
        rows: Python for the activation X [N, n], before the statement runs; None where the fuzzer does not know it.
        summed: the dimensions of the weight that the matmul sums over; none for other reads.
    """

    weight: str
    rows: str | None
    summed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Statement:
    """One statement of the forward pass, or a region of several.

    Attributes:
        text: its lines; of a region, its kind (a key of `REGIONS`).
        makes: the variable that it assigns, if any; of a region, the one that is read behind it.
        reads: of weights.
        body: of a region.
        features: words for what is drawn in it.
    """

    text: str
    makes: str | None = None
    reads: tuple[Read, ...] = ()
    body: tuple[Statement, ...] = ()
    features: frozenset[str] = frozenset()

    def walk(self) -> Iterator[Statement]:
        yield self
        for inner in self.body:
            yield from inner.walk()

    def variables(self) -> set[str]:
        """Variables that it names."""
        named: set[str] = set().union(*(inner.variables() for inner in self.body))
        return named if self.body else set(_VARIABLE.findall(self.text))

    def made(self) -> set[str]:
        """Variables that it assigns, within a region too."""
        return {inner.makes for inner in self.walk() if inner.makes and not inner.body}


# A function of the variables that it reads, or a context manager around the statements.
REGIONS = {
    "checkpoint": "{out} = checkpoint({name}, {arguments}, use_reentrant=False)",
    "nested compile region": "{out} = torch.compiler.nested_compile_region({name})({arguments})",
    "no_grad": "with torch.no_grad():",
    "enable_grad": "with torch.enable_grad():",
    "autocast": 'with torch.autocast("cpu", dtype=torch.bfloat16):',
}
_VARIABLE = re.compile(r"(?<![\w.])[vxi]\d+\b")
_WEIGHT = re.compile(r"self\.(w\d+)\b")


@dataclass(frozen=True)
class Options:
    """How a program is compiled and called.

    Attributes:
        rule: the name of a rule, or Python over the names of `oasis_fx.runtime.subspaces.rules`.
        rank: of all weights; a float is a share of in_features. 99 is full.
        inner: an inner compiler of the backend, or ``"no code"``: Inductor without its code generation.
        calls: a key of `fuzz.calling.CALLS`.
        dtype: of everything.
        dynamic: of `torch.compile`.
        exclude: of the backend.
    """

    rule: str = "oja"
    rank: int | float | AutoRank = 99
    budget: float = 1.0
    inner: str = "aot_eager"
    calls: str = "once"
    dtype: str = "float64"
    dynamic: bool | None = None
    exclude: tuple[str, ...] | None = ()


@dataclass(frozen=True)
class Program:
    """A module, how it is compiled and how it is called.

    Attributes:
        inputs: by name, Python for each; ``randn(...)`` draws from a generator that is another for each call.
        returns: variables that the forward pass returns, some twice.
        in_loss: positions among them that the loss reads.
    """

    seed: int
    parameters: tuple[Parameter, ...]
    inputs: tuple[Parameter, ...]
    body: tuple[Statement, ...]
    returns: tuple[str, ...]
    in_loss: tuple[int, ...]
    options: Options

    def statements(self) -> Iterator[Statement]:
        for statement in self.body:
            yield from statement.walk()

    def features(self) -> frozenset[str]:
        """Words for all that is drawn in it."""
        options = self.options
        words = {f"rule {options.rule}", f"inner {options.inner}", f"calls {options.calls}"}
        words |= {"budget"} if options.budget < 1 else set()
        words |= {"dynamic"} if options.dynamic else set()
        words |= {options.dtype}
        words |= {"low rank"} if options.rank != 99 else {"full rank"}
        kinds = {statement.text for statement in self.statements() if statement.body}
        drawn = frozenset(words | kinds).union(*(s.features for s in self.statements()))
        reads = [read for statement in self.statements() for read in statement.reads]
        first = {p.name: p.make.removeprefix("self.") for p in self.parameters if p.make.startswith("self.")}
        ways = {(first.get(read.weight, read.weight), read.summed) for read in reads if read.summed}
        texts = [statement.text for statement in self.statements()]
        more: set[str] = set()
        if len(ways) > len({weight for weight, _ in ways}):
            more.add("both ways round")
        if len(reads) > len({read.weight for read in reads}) or any("part)" in text for text in texts):
            more.add("several uses")
        if any(word in text for word in ("dim0=", "permute(dims") for text in texts):
            more.add("transpose by keyword")
        if any(" + number" in given.make for given in self.inputs):
            more.add("varying rows")
        if first:
            more.add("tied weights")
        if any(word.startswith("in place") for word in drawn):
            more.add("in place")
        return drawn | more

    def trimmed(self) -> Program:
        """Without parameters and inputs that nothing reads."""
        text = "\n".join([*forward_lines(self.body), *(p.make for p in self.parameters if "self." in p.make)])
        named = set(re.findall(r"self\.(\w+)", text)) | set(_VARIABLE.findall(text)) | set(self.returns)
        kept = tuple(p for p in self.parameters if p.name in named)
        return replace(self, parameters=kept, inputs=tuple(p for p in self.inputs if p.name in named))


def forward_lines(body: Iterable[Statement], *, tapped: bool = False) -> list[str]:
    """The lines of a forward pass.

    Args:
        tapped: for the reference: each read of a weight goes through ``self.tap``, the activations of known reads are
            shown to ``self.saw``, and regions that change no value are left out.
    """
    lines: list[str] = []
    for statement in body:
        if not statement.body:
            lines += _tapped(statement) if tapped else statement.text.split("\n")
            continue
        inner = forward_lines(statement.body, tapped=tapped)
        kind = REGIONS[statement.text]
        if kind.startswith("with"):
            lines += [kind, *(f"    {line}" for line in inner)]
            continue
        reads = statement.variables() - statement.made()
        assert statement.makes is not None
        name, arguments = f"region_{statement.makes}", ", ".join(sorted(reads))
        lines += [f"def {name}({arguments}):", *(f"    {line}" for line in [*inner, f"return {statement.makes}"])]
        call = "{out} = {name}({arguments})" if tapped else kind
        lines.append(call.format(out=statement.makes, name=name, arguments=arguments).replace("(, ", "("))
    return lines


def _tapped(statement: Statement) -> list[str]:
    saw = [f"self.saw({read.weight!r}, {read.rows}, {read.summed})" for read in statement.reads]
    return [*saw, *_WEIGHT.sub(r'self.tap("\1")', statement.text).split("\n")]


def module_text(program: Program, *, tapped: bool = False) -> str:
    """The class ``Net`` of a program."""
    made = [f"        self.{p.name} = {p.make}" for p in program.parameters]
    names = ", ".join(p.name for p in program.inputs)
    forward = forward_lines(program.body, tapped=tapped)
    lines = [
        f"class Net({'Tapped' if tapped else 'torch.nn.Module'}):",
        "    def __init__(self, randn):",
        "        super().__init__()",
        *made,
        "",
        f"    def forward(self, {names}):",
        *(f"        {line}" for line in forward),
        f"        return {', '.join(program.returns)},",
    ]
    return "\n".join(lines) + "\n"
