"""Each contender in a process of its own, with a compile cache of its own; they step in turns.

Seconds are medians over turns that follow one another in time, contender after contender, so that a slow minute of the
machine meets all of them. A turn is one step on the CPU. On a GPU it is `IN_A_ROW` steps between which the host waits
for nothing, as in training; events on the GPU tell forward, backward and optimizer apart. After the timed turns memory
is measured, one contender after the other:

- on the CPU it is a second process, on the compile cache of the first, whose large blocks come from the kernel and go
  back to it (`MALLOC_MMAP_THRESHOLD_`): the allocator's leftovers, as large as what is saved, would drown the
  difference, and such blocks cost time. Peak is the highest resident size of a step (VmHWM) less the resident size at
  rest, with weights and optimizer state, which are there at rest, added: so without interpreter and compiled code.
- on a GPU it is `torch.cuda.max_memory_allocated`. There all contenders of a group compile at the same time.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.process_peak import peak_bytes, reset_peak

LARGE_BLOCKS_COME_AND_GO = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
PARTS = ("step", "forward", "backward", "optimizer")
IN_A_ROW = 3


class HostClock:
    """Marks in time, in seconds, of a device that the host waits for anyway."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between each mark and the next one."""
        return [b - a for a, b in pairwise(self.marks)]


class GpuClock:
    """The same on a GPU's own clock; only `seconds` waits for it."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.marks: list[Any] = []

    def mark(self) -> None:
        self.marks.append(self.torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def seconds(self) -> list[float]:
        self.torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(self.marks)]


class Contender:
    """A model in training by one method, in this process."""

    def __init__(self, name: str, args: Namespace) -> None:
        import torch

        from benchmarks import contenders, models

        torch.set_float32_matmul_precision(args.matmul_precision)
        self.torch, self.args, self.name = torch, args, name
        self.model, self.batch = models.build(args)
        self.weights = contenders.block_weights(self.model)
        self.model, self.optimizer = contenders.prepare(name, self.model, args.rank)

    def first_step(self) -> dict[str, float]:
        """Take one step, in which the model is compiled; the seconds are those of the host."""
        start = time.perf_counter()
        measured = self.turn(1)
        if self.args.device == "cuda":
            self.torch.cuda.empty_cache()  # others have to fit beside it
        return measured | {"step": time.perf_counter() - start}

    def turn(self, steps: int | None = None) -> dict[str, float]:
        """Take steps in a row, and return the mean seconds of one and of its parts, and the loss of the last."""
        on_gpu = self.args.device == "cuda"
        steps = steps or (IN_A_ROW if on_gpu else 1)
        clock = GpuClock() if on_gpu else HostClock()
        clock.mark()
        for _ in range(steps):
            loss = self.model(**self.batch).loss
            clock.mark()
            loss.backward()
            clock.mark()
            self.optimizer.step()
            self.optimizer.zero_grad()
            clock.mark()
        between = clock.seconds()
        parts = [sum(between[part::3]) / steps for part in range(3)]
        return dict(zip(PARTS, [sum(parts), *parts], strict=True)) | {"loss": loss.item()}

    def sizes(self) -> dict[str, int]:
        """Bytes, measured on real tensors; see the head of this file for the peak."""
        from benchmarks import contenders
        from oasis_fx import LowRankGrad
        from oasis_fx.inspect.measure import gradient_bytes, saved_for_backward_bytes

        peak = self.peak()
        loss = self.model(**self.batch).loss
        parameters = list(self.model.parameters())
        bases = [state["basis"] for state in self.optimizer.state.values() if "basis" in state]
        known = [*parameters, *self.model.buffers(), *bases, *self.batch.values()]
        saved = saved_for_backward_bytes(loss, known)
        loss.backward()
        block = [*self.weights, *(p for n, p in self.model.named_parameters() if "lora_" in n)]
        return {
            "peak": peak,
            "saved": saved,
            "gradient_bytes": gradient_bytes(parameters),
            "optimizer_bytes": contenders.state_bytes(self.optimizer, parameters),
            "block_gradients_and_optimizer": gradient_bytes(block) + contenders.state_bytes(self.optimizer, block),
            "rewritten": sum(isinstance(p.grad, LowRankGrad) for p in parameters),
        }

    def peak(self) -> int:
        if self.args.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
            self.turn(1)
            return int(self.torch.cuda.max_memory_allocated())
        from benchmarks import contenders

        self.turn()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        rest = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        reset_peak()
        self.turn()
        parameters = list(self.model.parameters())
        there = sum(p.nbytes for p in parameters) + contenders.state_bytes(self.optimizer, parameters)
        return peak_bytes() - rest + there


def measure(args: Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Results by contender: ``first_step`` (with compiling), ``warm_first_step``, ``steps``, ``sizes``; or ``error``.

    Groups of ``args.together`` stay in memory at once, the first contender, the reference, in each of them; a group's
    ``steps`` stand beside those of ``reference_steps``. ``save`` is called after each group.
    """
    reference, *others = args.contenders
    size = max(1, args.together - 1)
    results: dict[str, Any] = {}
    groups = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            found = _measure_group([reference, *group], args, folder)
        for name, result in found.items():
            result["reference_steps"] = found[reference].get("steps", [])
            results.setdefault(name, result)
        save(results)
    return results


def _measure_group(names: list[str], args: Namespace, folder: str) -> dict[str, Any]:
    at_once = args.device == "cuda"
    results: dict[str, Any] = {}
    workers = {name: Worker(name, args, f"{folder}/{name}") for name in names}
    for worker in workers.values() if at_once else ():
        worker.launch()
    for name, worker in list(workers.items()):
        results[name] = worker.start()
        if "error" in results[name]:
            print(f"{name}: failed: {results[name]['error'].splitlines()[-1]}", flush=True)
            del workers[name]
            continue
        print(f"{name}: first step {results[name]['first_step']['step']:.1f} s", flush=True)
    for number in range(args.steps + 1):
        for name, worker in workers.items():
            done = worker.ask("turn")
            if number >= 1:  # the first one warms up
                results[name].setdefault("steps", []).append(done)
    for name, worker in workers.items():
        if not at_once:
            worker.stop()
            worker = Worker(name, args, f"{folder}/{name}", LARGE_BLOCKS_COME_AND_GO)
            started = worker.start()
            if "error" in started:
                results[name]["error"] = started["error"]
                continue
            results[name]["warm_first_step"] = started["first_step"]["step"]
        results[name]["sizes"] = worker.ask("sizes")
        worker.stop()
    return results


class Worker:
    """A contender in a process of its own, with a folder for its compile cache and variables for its environment."""

    def __init__(self, name: str, args: Namespace, cache: str, environment: dict[str, str] | None = None) -> None:
        self.environment = environment or {}
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(name, args, cache, theirs), daemon=True)

    def launch(self) -> None:
        """Begin to build the model and to compile it."""
        kept = dict(os.environ)
        os.environ.update(self.environment)
        self.process.start()
        os.environ.clear()
        os.environ.update(kept)
        self.pipe.send("first_step")

    def start(self) -> dict[str, Any]:
        """Build the model and step once, unless it is under way, and wait for it: ``first_step``, or ``error``."""
        if self.process.pid is None:
            self.launch()
        try:
            self.ask()
            return {"first_step": self.ask()}
        except RuntimeError as error:
            return {"error": str(error)}

    def ask(self, request: str | None = None) -> Any:
        if request is not None:
            self.pipe.send(request)
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError("the process died") from None
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


def _work(name: str, args: Namespace, cache: str, pipe: Any) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    try:
        contender = Contender(name, args)
        pipe.send("ready")
        while (request := pipe.recv()) is not None:
            pipe.send(getattr(contender, request)())
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def medians(result: dict[str, Any], svd_every: int | None = None) -> dict[str, float]:
    """Median seconds by part, as ratios to the reference's in the same turns.

    ``spread`` is half the distance of the quartiles of ``step``, ``seconds`` the median itself.
    """
    found = {}
    for part in PARTS:
        own = statistics.median(s[part] for s in result["steps"])
        if svd_every and part in ("step", "optimizer"):
            own += result["first_step"]["optimizer"] / svd_every
        found[part] = own / statistics.median(s[part] for s in result["reference_steps"])
    pairs = zip(result["steps"], result["reference_steps"], strict=True)
    ratios = sorted(one["step"] / other["step"] for one, other in pairs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return found | {"spread": (high - low) / 2, "seconds": statistics.median(s["step"] for s in result["steps"])}
