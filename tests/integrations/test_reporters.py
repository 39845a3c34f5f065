"""What `report_to` is sent: the means of our subspaces are in it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from oasis_fx.integrations.huggingface import oasis_trainer

from . import tiny

NAMES = {"oasis/mean/captured_energy", "oasis/mean/drift"}


def train(folder, **arguments) -> Trainer:
    torch._dynamo.reset()
    fixed = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(str(folder), **(fixed | {"report_to": []} | arguments))
    model = tiny.model()
    ours = oasis_trainer(model, args, 8, inner="aot_eager")
    run = Trainer(model=model, args=args, train_dataset=tiny.examples(16), **ours)
    run.train()
    return run


def test_reporters_read_the_means(tmp_path, monkeypatch) -> None:
    """A stand-in where `Trainer` puts wandb, TensorBoard and trackio: among its default callbacks."""
    sent = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            sent.append(dict(logs))

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda _: [Reporter])
    run = train(tmp_path)
    assert [set(logs) & NAMES for logs in sent if "loss" in logs] == [NAMES] * 2
    assert all("oasis/mean/drift" in entry for entry in run.state.log_history if "loss" in entry)


def test_tensorboard(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(tmp_path, report_to=["tensorboard"])
    (events,) = (EventAccumulator(str(path.parent)) for path in (tmp_path / "logs").rglob("events*"))
    events.Reload()
    assert len(events.Scalars("train/oasis/mean/captured_energy")) == 2
