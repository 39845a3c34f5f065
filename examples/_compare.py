"""Run several methods side by side: a process each, stepping in turns, so that times and peaks compare."""

from __future__ import annotations

import multiprocessing
import traceback
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from _models import unpacked
from _noise import silence
from _progress import Progress


def compare(args: Namespace, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Train with each of ``methods`` on the same batches; return what each one measured."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    progress = Progress(args.steps)
    try:
        progress.doing("loading")
        with unpacked(args) as given:
            for method in methods:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(given, method, theirs), daemon=True)
                process.start()
                theirs.close()
                workers[method] = process, ours
            calls = {method: _caller(method, *worker) for method, worker in workers.items()}
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda call: call("loaded"), calls.values()))
        return _drive(args, calls, progress)
    finally:
        progress.close()
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def _drive(args: Namespace, calls: dict[str, Callable[[str], Any]], progress: Progress) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {method: {"losses": [], "seconds": [], "heldout": []} for method in calls}
    progress.doing("evaluating")
    before = next(iter(calls.values()))("heldout_loss")  # of all: they start as one model, LoRA's adapters at 0
    for result in results.values():
        result["heldout"].append([0, before])
    for step in range(1, args.steps + 1):
        for method, call in calls.items():
            progress.doing(f"{method}: compiling" if step == 1 else "training")
            done = call("step")
            results[method]["losses"].append(done["loss"])
            results[method]["seconds"].append(done["seconds"])
            if step in args.evaluated and step < args.steps:
                progress.doing(f"{method}: evaluating")
                results[method]["heldout"].append([step, call("heldout_loss")])
        progress.stepped(**{method: result["losses"][-1] for method, result in results.items()})
    for method, call in calls.items():
        progress.doing(f"{method}: measuring")
        results[method]["peak_bytes"] = call("peak_bytes")  # of training alone: before the rest
        results[method]["sizes"] = call("sizes")
        progress.doing(f"{method}: evaluating")
        results[method]["heldout"].append([args.steps, call("heldout_loss")])
    for result in results.values():
        result["heldout_before"], result["heldout_after"] = result["heldout"][0][1], result["heldout"][-1][1]
    return results


def _caller(method: str, process: Any, connection: Connection) -> Callable[[str], Any]:
    """Ask a worker for something and wait; its failure is raised here."""

    def call(name: str) -> Any:
        try:
            connection.send(name)
            kind, answer = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join(timeout=10)
            raise RuntimeError(f"the process of {method} ended with exit code {process.exitcode}") from None
        if kind == "refused":
            raise ValueError(answer)
        if kind == "error":
            raise RuntimeError(f"{method} failed:\n{answer}")
        return answer

    return call


def _work(args: Namespace, method: str, connection: Connection) -> None:
    """What a worker process does: build the run at the first request, then answer requests until the pipe closes."""
    silence()
    run = None
    while True:
        try:
            name = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if run is None:
                from _training import Run

                run = Run(args, method)
            connection.send(("ok", getattr(run, name)()))
        except ValueError as error:  # of an argument: its message says all
            connection.send(("refused", str(error)))
            return
        except BaseException:
            connection.send(("error", traceback.format_exc()))
            return
