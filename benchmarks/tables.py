"""Results as Markdown: all contenders of a run, and how far each aim was met."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from benchmarks.contenders import SVD_EVERY, parse
from benchmarks.harness import medians

Results = dict[str, Any]


def ratios(results: Results) -> dict[str, dict[str, float]]:
    """By contender that ran: seconds of each part, bytes of each kind and compile time, as ratios to the first."""
    reference = next(iter(results.values()))
    found = {}
    for name, result in results.items():
        if "sizes" not in result:
            continue
        times = medians(result, SVD_EVERY.get(parse(name)[0]))
        sizes = {kind: size / max(1, reference["sizes"][kind]) for kind, size in result["sizes"].items()}
        compiling = {"compile": result["first_step"]["step"] / reference["first_step"]["step"]}
        if result.get("warm_first_step"):
            compiling["warm"] = result["warm_first_step"] / reference["first_step"]["step"]
        found[name] = times | sizes | compiling
    return found


def table(results: Results) -> str:
    """One row a contender; a contender that failed says why."""
    found = ratios(results)
    rows = []
    for name, result in results.items():
        if name not in found:
            rows.append([name, f"failed: {result['error'].strip().splitlines()[-1][:100]}"])
            continue
        own, sizes = found[name], result["sizes"]
        mib = [
            f"{sizes[kind] / 2**20:.0f} ({own[kind]:.2f})"
            for kind in ("saved", "block_gradients_and_optimizer", "peak")
        ]
        times = [
            f"{own['step']:.2f} ± {own['spread']:.2f}",
            *(f"{own[p]:.2f}" for p in ("forward", "backward", "optimizer")),
        ]
        warm = f"{own['warm']:.2f}" if "warm" in own else "-"
        rows.append(
            [name, f"{own['seconds']:.3f}", *times, *mib, f"{own['compile']:.2f}", warm, str(sizes["rewritten"])]
        )
    headers = ["", "s/step", "step", "forward", "backward", "optimizer", "saved MiB", "block grad+opt MiB", "peak MiB"]
    return tabulate(rows, [*headers, "compile", "warm", "rewritten"], tablefmt="github", disable_numparse=True)


def aims(results: Results) -> str:
    """The figures to reach, each with what was found; ratios to the first contender unless said."""
    found = ratios(results)
    rows: list[list[str]] = []

    def row(what: str, aim: float, got: float | None, by: str = "") -> None:
        if got is not None:
            verdict = "reached" if got <= aim else f"missed by {got - aim:.2f}"
            rows.append([what, f"{aim:.2f}", f"{got:.2f}", verdict, by])

    ours = {name: own for name, own in found.items() if name.startswith("oasis")}
    stock = {name: own for name, own in found.items() if name.startswith(("stock", "checkpoint"))}
    if "oasis" in ours:
        row("seconds a step, no budget", 0.70, ours["oasis"]["step"], "oasis")
        row(
            "gradient + optimizer + basis bytes of rewritten weights",
            0.06,
            ours["oasis"]["block_gradients_and_optimizer"],
        )
        row("compile time", 1.25, ours["oasis"]["compile"], "oasis")
        row("optimizer's share of a step", 0.05, _share(results["oasis"]), "oasis")
    one_liner = found.get("stock-recompute")
    if one_liner is not None:
        within = {n: o["step"] / one_liner["step"] for n, o in ours.items() if o["saved"] <= one_liner["saved"]}
        name = min(within, key=within.__getitem__, default="")
        row("seconds against stock's one-liner, at its saved bytes or fewer", 0.75, within.get(name), name)
    as_fast = {name: own for name, own in ours.items() if own["step"] <= 1.0}
    for kind, aim, what in (("saved", 0.05, "saved bytes"), ("peak", 0.35, "peak memory")):
        name = min(as_fast, key=lambda n: as_fast[n][kind], default="")
        row(f"{what} at a step time no longer than stock's", aim, as_fast[name][kind] if name else None, name)
    for kind, what in (("saved", "saved bytes"), ("peak", "peak memory")):
        for other in sorted((n for n in stock), key=lambda n: -stock[n][kind]):
            best = min(o["step"] for o in stock.values() if o[kind] <= stock[other][kind] * 1.001)
            fitting = {n: o["step"] / best for n, o in ours.items() if o[kind] <= stock[other][kind] * 1.001}
            name = min(fitting, key=fitting.__getitem__, default="")
            row(f"seconds at the {what} of {other}, against stock's best there", 0.75, fitting.get(name), name)
    table_ = tabulate(rows, ["", "aim", "found", "", "by"], tablefmt="github", disable_numparse=True)
    return f"{table_}\n\n{_against(found, ours)}".strip()


def _share(result: dict[str, Any]) -> float:
    return sum(s["optimizer"] for s in result["steps"]) / sum(s["step"] for s in result["steps"])


def _against(found: dict[str, dict[str, float]], ours: dict[str, dict[str, float]]) -> str:
    rows = []
    for name, own in found.items():
        if not name.startswith(("lora", "galore", "apollo", "adam8bit")):
            continue
        both = [n for n, o in ours.items() if o["step"] <= own["step"] and o["peak"] <= own["peak"]]
        best = min(both, key=lambda n: ours[n]["peak"], default=None)
        verdict = f"{best} is faster and smaller" if best else "no setting of ours is both faster and smaller"
        rows.append([name, f"{own['step']:.2f}", f"{own['peak']:.2f}", verdict])
    headers = ["against", "seconds", "peak", ""]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""
