"""Run several methods side by side: a process each, stepping in turns, so that times and peaks compare."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm


def compare(args: Namespace, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Train with each of ``methods`` on the same batches; return what each one measured."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    try:
        for method in methods:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(args, method, theirs), daemon=True)
            process.start()
            theirs.close()
            workers[method] = process, ours
        return _drive(args, {method: _caller(method, *worker) for method, worker in workers.items()})
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def _drive(args: Namespace, calls: dict[str, Callable[[str], Any]]) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {method: {"losses": [], "seconds": []} for method in calls}
    bar = tqdm(total=args.steps, desc="loading", unit="step")
    for method, call in calls.items():
        results[method]["heldout_before"] = call("heldout_loss")
    for step in range(args.steps):
        for method, call in calls.items():
            bar.set_description(f"{method}: compiling" if step == 0 else "training")
            done = call("step")
            results[method]["losses"].append(done["loss"])
            results[method]["seconds"].append(done["seconds"])
        bar.set_postfix({method: f"{result['losses'][-1]:.3f}" for method, result in results.items()})
        bar.update()
    bar.set_description("measuring")
    for method, call in calls.items():
        results[method]["peak_bytes"] = call("peak_bytes")  # of training alone: before the rest
        results[method]["sizes"] = call("sizes")
        results[method]["heldout_after"] = call("heldout_loss")
    bar.set_description("done")
    bar.close()
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
        if kind == "error":
            raise RuntimeError(f"{method} failed:\n{answer}")
        return answer

    return call


def _work(args: Namespace, method: str, connection: Connection) -> None:
    """What a worker process does: build the run at the first request, then answer requests until the pipe closes."""
    os.environ["TQDM_DISABLE"] = "1"  # the parent has the only progress bar
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
        except BaseException:
            connection.send(("error", traceback.format_exc()))
            return
