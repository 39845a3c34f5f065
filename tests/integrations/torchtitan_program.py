"""Runs of torchtitan's own trainer on one rank or several, under torchrun; rank 0 writes what it found as JSON.

torchrun --nproc-per-node 2 torchtitan_program.py FOLDER RUN...

A run is one of `RUNS`, or "refused". All of them begin with the weights of the checkpoint that the run "seed" makes,
since a shard that is drawn on its own is not the part of a weight that is drawn as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "torchtitan"))

import train_on_cpu

train_on_cpu.use_cpu()

import torch
import torch.distributed as dist
import torchtitan.trainer
from llama_oasis import stock_on_cpu
from torchtitan.tools.logging import init_logger

from oasis_fx.errors import OasisWarning
from oasis_fx.integrations.torchtitan import with_oasis

STEPS, BATCH = 4, 4
RUNS = {
    "seed": {},
    "whole": {},
    "accumulated": {"parts": 2},
    "loosely clipped": {"max_norm": 1e9},
    "whole resumed": {"after": "whole"},
    "joint": {},
    "joint resumed": {"after": "joint"},
    "joint after whole": {"after": "whole"},
}


def configuration(folder: Path, name: str, *, parts: int = 1, max_norm: float = 0.5, after: str | None = None):
    ranks = int(os.environ["WORLD_SIZE"])
    config = stock_on_cpu()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config = with_oasis(config, rank=16, inner="aot_eager")
    config.dump_folder = str(folder / name)
    config.training.steps, config.training.seq_len, config.training.max_norm = STEPS, 32, max_norm
    config.training.local_batch_size, config.training.global_batch_size = BATCH // ranks // parts, BATCH
    config.optimizer.param_groups[0].optimizer_kwargs["lr"] = 5e-3
    config.metrics.log_freq = 1
    config.debug.seed = 1
    checkpoint = config.checkpoint
    checkpoint.enable, checkpoint.interval, checkpoint.last_save_model_only = True, STEPS // 2, False
    if name == "seed":
        checkpoint.create_seed_checkpoint = True
    elif after is None:
        checkpoint.initial_load_path = str(folder / "seed" / "checkpoint" / "step-0")
    elif dist.get_rank() == 0:
        place = Path("checkpoint") / f"step-{STEPS // 2}"
        shutil.copytree(folder / after / place, folder / name / place)
    return config


class Recorder:
    """Stands where TensorBoard and Weights & Biases do."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def log(self, metrics, step) -> None:
        self.seen[step] = metrics

    def close(self) -> None:
        pass


def run(folder: Path, name: str) -> dict:
    torch._dynamo.reset()
    if name == "refused":
        return refused(folder)
    config = configuration(folder, name, **RUNS[name])
    if dist.is_initialized():
        dist.barrier()
    trainer = config.build()
    if name == "seed":
        trainer.checkpointer.save(curr_step=0, last_step=True)
        return {}
    recorder = trainer.metrics_processor.logger = Recorder()
    trainer.train()
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    trainer.close()
    columns = {
        "losses": "loss_metrics/global_avg_loss",
        "norms": "grad_norm",
        "energy": "oasis/mean/captured_energy",
        "drift": "oasis/mean/drift",
    }
    found = {key: [metrics[value] for metrics in recorder.seen.values()] for key, value in columns.items()}
    weights = [parameter.detach().full_tensor() for parameter in trainer.model_parts[0].parameters()]
    sync = trainer.optimizers.syncs[0]
    return {
        **found,
        "steps": list(recorder.seen),
        "weights": [float(weight.double().abs().sum()) for weight in weights],
        "moments": sorted({tuple(state["exp_avg"].shape) for state in states if "features" in state}),
        "sent": sync.sent,
        "dense": sync.dense,
    }


def refused(folder: Path) -> dict[str, str]:
    """What is said to configurations and checkpoints that do not go together with us."""

    def changed(section: str, **values):
        config = configuration(folder, "refused")
        for key, value in values.items():
            setattr(getattr(config, section), key, value)
        return config

    def tensor_parallel():
        config = stock_on_cpu()
        config.parallelism.tensor_parallel_degree = 2
        return with_oasis(config)

    def no_model():
        config = stock_on_cpu()
        config.model_spec = None
        return with_oasis(config)

    def another_model():
        trainer = configuration(folder, "refused").build()
        flat = trainer.optimizers.state_dict()
        trainer.optimizers.load_state_dict({f"other {key}": value for key, value in flat.items()})

    cases = {
        "optimizer": lambda: with_oasis(stock_on_cpu(), optimizer="AdamW"),
        "model": no_model,
        "tensor parallel": tensor_parallel,
        "mesh": lambda: changed("parallelism", spmd_backend="full_dtensor").build(),
        "eager": lambda: changed("compile", enable=False).build(),
        "twice": lambda: with_oasis(with_oasis(stock_on_cpu())),
        "another model": another_model,
    }
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = "nothing was refused"
        except ValueError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    warnings.simplefilter("error", OasisWarning)
    init_logger()
    torchtitan.trainer.time.sleep = lambda seconds: None  # two seconds at the end of each run, for ranks to complete
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan's own initialisation does
    found = {name: run(folder, name) for name in names}
    if dist.get_rank() == 0:
        (folder / f"of{dist.get_world_size()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)
