"""Statements: each function draws one from a drawing and runs it, or returns None where nothing fits."""

from __future__ import annotations

from fuzz import operations, roads
from fuzz.drawing import Drawing
from fuzz.program import Parameter, Read, Statement


def new_input(draw: Drawing) -> None:
    """An activation: a leaf that gets a gradient or not, or no leaf, which may be changed in place."""
    rng, name = draw.rng, draw.fresh("x")
    tokens, n = str(rng.choice([1, 2, 3, 3, 5])), rng.choice(draw.sizes)
    if draw.empty and rng.random() < 0.5:
        tokens = "0"
    elif rng.random() < 0.12:
        tokens = f"{tokens} + number"  # each call has one more
    size = f"{tokens}, {n}" if rng.random() < 0.55 else f"{rng.choice([1, 2, 3])}, {tokens}, {n}"
    forms = ["{}.requires_grad_()", "{}.requires_grad_()", "nonleaf({})", "{}"]
    make = rng.choice(forms).format(f"randn({size})")
    draw.inputs.append(Parameter(name, make))
    draw.env[name] = eval(make, draw.env)
    draw.shown.append(name)


def weights(draw: Drawing) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights so far."""
    return {p.name: tuple(getattr(draw.net, p.name).shape) for p in draw.parameters if p.name[0] == "w"}


Matrix = tuple[str, str, tuple[Read, ...], list[str]]  # a weight as [m, n], as [n, m], what is read, features


def matrix(draw: Drawing, n: int, x: str) -> Matrix:
    """A weight, or what is made of one or two, for an activation ``x`` with ``n`` features."""
    rng, rows, shapes = draw.rng, f"{x}.reshape(-1, {n})", weights(draw)
    plain = [name for name, shape in shapes.items() if len(shape) == 2 and n in shape]
    wide = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] > n]
    stacked = [name for name, shape in shapes.items() if len(shape) == 3 and shape[2] == n]
    if stacked and rng.random() < 0.3:
        name, form = rng.choice(stacked), rng.choice(roads.STACKED)
        w = form.format(e=f"self.{name}", n=n)
        return w, roads.transposed(rng, w), (Read(name, rows, (2,)),), [form]
    if wide and rng.random() < 0.1:
        name, form = rng.choice(wide), rng.choice(roads.COLUMNS)
        w = form.format(e=f"self.{name}", n=n)
        return w, roads.transposed(rng, w), (Read(name, None, (1,)),), [form]
    if plain and rng.random() < 0.6:
        name = rng.choice(plain)
    else:
        m = rng.choice(draw.sizes)
        name = draw.weight(m, n) if rng.random() < 0.6 else draw.weight(n, m)
    first, second = getattr(draw.net, name).shape
    features: list[str] = []
    if second == n and (first != n or rng.random() < 0.6):
        e, reads = _made_of(draw, name, n, [other for other in plain if shapes[other][1] == n], rows, features)
        e = _same(draw, e, x, features)
        flipped = roads.transposed(rng, e)
        w, wt = e, flipped
    else:
        reads = (Read(name, rows, (0,)),)
        e = _same(draw, f"self.{name}", x, features)
        flipped = roads.transposed(rng, e)
        w, wt = flipped, e
    return w, wt, reads, [*features, flipped.replace(e, "{e}")]


def _made_of(
    draw: Drawing, name: str, n: int, others: list[str], rows: str, features: list[str]
) -> tuple[str, tuple[Read, ...]]:
    """A weight [m, n], some of its rows, or those of another one too."""
    rng, e, read = draw.rng, f"self.{name}", Read(name, rows, (1,))
    m = getattr(draw.net, name).shape[0]
    if m > 1 and rng.random() < 0.12:
        form = rng.choice(roads.ROWS)
        features.append(form)
        return form.format(e=e, k=rng.randint(1, m - 1), m=m), (read,)
    if others and rng.random() < 0.06:
        other = rng.choice(others)
        features.append("cat of weights")
        return f"torch.cat([{e}, self.{other}])", (read, Read(other, rows, (1,)))
    return e, (read,)


def _same(draw: Drawing, e: str, x: str, features: list[str]) -> str:
    """Mostly as it is; else through something that keeps its shape."""
    if draw.rng.random() > 0.15:
        return e
    form = draw.rng.choice(roads.SAME)
    features.append(form)
    m, n = eval(e, draw.env).shape
    return f"({form.format(e=e, m=m, n=n, x=x, dtype=draw.dtype)})"


def multiply(draw: Drawing) -> Statement | None:
    rng, x = draw.rng, draw.pick()
    if x is None:
        return None
    n, makes = draw.env[x].shape[-1], draw.fresh("v")
    w, wt, reads, features = matrix(draw, n, x)
    m = eval(w, draw.env).shape[0]
    if m > 1 and rng.random() < 0.06:
        k, parts = rng.randint(1, m - 1), rng.choice(roads.PARTS)
        text = f"{makes} = torch.cat([F.linear({x}, part) for part in {parts.format(e=w, k=k, m=m)}], -1)"
        return draw.run(text, makes, reads, *features, parts)
    road = roads.multiplication(rng, draw.env[x].dim())
    b = draw.vector("b", m) if "{b}" in road else ""
    text = road.format(x=x, w=w, wt=wt, b=b, n=n, m=m)
    return draw.run(f"{makes} = {text}", makes, reads, *features, road)


def experts(draw: Drawing) -> Statement | None:
    """A batch of matrices times another."""
    rng, x = draw.rng, draw.pick(3, 3)
    if x is None:
        return None
    e, _, n = draw.env[x].shape
    m = rng.choice(draw.sizes)
    known = [name for name, s in weights(draw).items() if len(s) == 3 and s[0] == e and n in s[1:]]
    name = rng.choice(known) if known and rng.random() < 0.7 else draw.weight(*rng.choice([(e, m, n), (e, n, m)]))
    _, first, second = getattr(draw.net, name).shape
    as_stored = second == n and (first != n or rng.random() < 0.5)
    stored, flipped = f"self.{name}", f"self.{name}{rng.choice(roads.FLIPS)}"
    w, wt, m = (stored, flipped, first) if as_stored else (flipped, stored, second)
    road, makes = rng.choice(roads.EXPERTS), draw.fresh("v")
    b = draw.vector("b", m) if "{b}" in road else ""
    read = Read(name, f"{x}.reshape(-1, {n})", (2,) if as_stored else (1,))
    return draw.run(f"{makes} = {road.format(x=x, w=w, wt=wt, b=b)}", makes, (read,), "experts", road)


def convolution(draw: Drawing) -> Statement | None:
    """A convolution over the tokens of [.., t, n], as [.., n, t] and further dimensions of size 1."""
    rng, x = draw.rng, draw.pick(3, 3)
    if x is None:
        return None
    t, n = draw.env[x].shape[1:]
    dims, grouped = rng.choice([1, 1, 2, 2, 3]), rng.random() < 0.1
    more = dims - 1
    known = [name for name, s in weights(draw).items() if len(s) == dims + 2 and s[1] == n and s[2] <= t]
    if known and not grouped and rng.random() < 0.5:
        name = rng.choice(known)
    else:
        m, kernel = rng.choice(draw.sizes), rng.randint(1, min(3, t))
        name = draw.weight(*((m * n, 1) if grouped else (m, n)), kernel, *[1] * more)
    kernel, stride, padding = getattr(draw.net, name).shape[2], rng.choice([1, 1, 2]), rng.choice([0, 0, 1])
    geometry = f", stride={(stride, *[1] * more)}, padding={(padding, *[0] * more)}"
    if grouped:
        geometry += f", groups={n}"
    if rng.random() < 0.3:
        geometry = f", bias={draw.vector('b', getattr(draw.net, name).shape[0])}{geometry}"
    image, makes = f"{x}.mT{'.unsqueeze(-1)' * more}", draw.fresh("v")
    patches = f"{x}.mT.unsqueeze(-1), ({kernel}, 1), padding=({padding}, 0), stride=({stride}, 1)"
    rows = None if grouped else f"F.unfold({patches}).mT.reshape(-1, {n * kernel})"
    text = f"{makes} = F.conv{dims}d({image}, self.{name}{geometry}){'.squeeze(-1)' * more}.mT"
    read = Read(name, rows, () if grouped else tuple(range(1, dims + 2)))
    return draw.run(text, makes, (read,), f"conv{dims}d", *["groups"] * grouped)


def loop(draw: Drawing) -> Statement | None:
    """A square weight over and over, as in a recurrent layer."""
    x, makes = draw.pick(), draw.fresh("v")
    if x is None:
        return None
    n = draw.env[x].shape[-1]
    w, wt, reads, features = matrix(draw, n, x)
    form = draw.rng.choice(["F.linear({v}, {w})", "{v} @ {wt}", "{v} + F.linear({v}, {w})"]).format(v=makes, w=w, wt=wt)
    text = f"{makes} = {x}\nfor _ in range(2):\n    {makes} = torch.tanh({form})"
    unknown = tuple(Read(read.weight, None, read.summed) for read in reads)
    return draw.run(text, makes, unknown, "loop", *features)


def submodule(draw: Drawing) -> Statement | None:
    rng, x = draw.rng, draw.pick(2, 3)
    if x is None:
        return None
    n, m, makes, end = draw.env[x].shape[-1], rng.choice(draw.sizes), draw.fresh("v"), f"dtype={draw.dtype}"
    kind = rng.random()
    if kind < 0.08:
        layer = rng.choice(["GRU", "LSTM", "RNN"])
        name = draw.parameter("m", f"torch.nn.{layer}({n}, {m}, batch_first=True, {end})")
        return draw.run(f"{makes} = self.{name}({x})[0]", makes, (), f"nn.{layer}")
    if kind < 0.5:
        name = draw.parameter("m", f"torch.nn.Linear({n}, {m}, bias={rng.random() < 0.6}, {end})")
        read = Read(f"{name}.weight", f"{x}.reshape(-1, {n})")
        text = rng.choice(["self.{0}({1})", "self.{0}({1}) + self.{0}({1}.sin())", "F.linear({1}, self.{0}.weight)"])
        reads = (read, Read(f"{name}.weight", f"{x}.sin().reshape(-1, {n})"))[: 1 + ("sin" in text)]
        return draw.run(f"{makes} = {text.format(name, x)}", makes, reads, "nn.Linear")
    heads = rng.choice([h for h in (1, 2) if n % h == 0])
    others = [y for y in draw.tensors(2, 3) if draw.env[y].dim() == draw.env[x].dim() and draw.env[y].shape[-1] == n]
    y = rng.choice([x, *others])
    name = draw.parameter(
        "m", f"torch.nn.MultiheadAttention({n}, {heads}, bias={rng.random() < 0.6}, batch_first=True, {end})"
    )
    ask = rng.choice([", need_weights=False", "", ", average_attn_weights=False"])
    reads = (Read(f"{name}.in_proj_weight", None), Read(f"{name}.out_proj.weight", None))
    return draw.run(f"{makes} = self.{name}({x}, {y}, {y}{ask})[0]", makes, reads, "nn.MultiheadAttention")


def embedding(draw: Drawing) -> Statement | None:
    rng = draw.rng
    known = [name for name, s in weights(draw).items() if len(s) == 2 and s[0] > 1]
    name = rng.choice(known) if known and rng.random() < 0.6 else draw.weight(6, rng.choice(draw.sizes))
    rows = getattr(draw.net, name).shape[0]
    ids, makes = [rng.randrange(rows) for _ in range(rng.choice([1, 3, 4]))], draw.fresh("v")
    index = draw.fresh("i")
    draw.inputs.append(Parameter(index, f"torch.tensor({ids})"))
    draw.env[index] = eval(draw.inputs[-1].make, draw.env)
    form = rng.choice(
        ["F.embedding({i}, {w})", "{w}[{i}]", "F.embedding({i}, {w}, padding_idx=0)", "{w}.index_select(0, {i})"]
    )
    text = f"{makes} = {form.format(i=index, w=f'self.{name}')}"
    return draw.run(text, makes, (Read(name, None),), "embedding", form)


def pointwise(draw: Drawing) -> Statement | None:
    x = draw.pick()
    if x is None:
        return None
    template, makes = (
        draw.rng.choice(operations.POINTWISE if draw.rng.random() < 0.6 else operations.TOGETHER),
        draw.fresh("v"),
    )
    return draw.run(f"{makes} = {draw.fill(template, x)}", makes, (), template)


def reshape(draw: Drawing) -> Statement | None:
    x, makes, template = draw.pick(2), draw.fresh("v"), draw.rng.choice(operations.RESHAPING)
    return None if x is None else draw.run(f"{makes} = {draw.fill(template, x)}", makes, (), template)


def in_place(draw: Drawing) -> Statement | None:
    template = draw.rng.choice(operations.IN_PLACE)
    x = draw.rng.choice(draw.tensors())
    word = "in place on an input" if x[0] == "x" else "in place on an activation"
    return draw.run(draw.fill(template, x) or "", None, (), template, word)


def weight_in_place(draw: Drawing) -> Statement | None:
    """A weight that the forward pass itself changes, as where it is clipped or normalised."""
    known = list(weights(draw))
    if not known:
        return None
    name, template = draw.rng.choice(known), draw.rng.choice(operations.WRITE_WEIGHT)
    text = f"with torch.no_grad():\n    {template.format(w=f'self.{name}')}"
    return draw.run(text, None, (), template, "in place on a weight")


def buffer(draw: Drawing) -> Statement | None:
    x = draw.pick()
    if x is None:
        return None
    if draw.rng.random() < 0.5:
        makes, template = draw.fresh("v"), draw.rng.choice(operations.READ_BUFFER)
        return draw.run(f"{makes} = {draw.fill(template, x)}", makes, (), "buffer", template)
    template = draw.rng.choice(operations.WRITE_BUFFER)
    return draw.run(draw.fill(template, x) or "", None, (), "in place on a buffer", template)


def graph_break(draw: Drawing) -> Statement | None:
    x, template = draw.pick(), draw.rng.choice(operations.BREAKS)
    return None if x is None else draw.run(draw.fill(template, x) or "", None, (), "graph break")
