"""Accelerate, Lightning and TRL: a tiny model learns in subspaces, stops, and goes on as if it had not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend

from . import tiny

STEPS, STOP, RANK = 10, 4, 8


def loader() -> torch.utils.data.DataLoader:
    rows = [{key: torch.tensor(row) for key, row in example.items()} for example in tiny.examples(4 * STEPS)]
    return torch.utils.data.DataLoader(rows, batch_size=4)


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def num_low_rank(optimizer) -> int:
    return sum("features" in state for state in optimizer.state.values())


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_accelerate(tmp_path, precision, accumulate) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(start: int, stop: int, seed: int = 0, resume: bool = False):
        torch._dynamo.reset()
        accelerate.state.AcceleratorState._reset_state(True)  # it is one for a process
        accelerator = accelerate.Accelerator(
            mixed_precision=precision, gradient_accumulation_steps=accumulate, cpu=True
        )
        model = tiny.model(seed)
        model.compile(backend=oasis_backend(RANK, inner="aot_eager"))
        optimizer = OasisAdamW(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, loader(), schedule)
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        losses, norms = [], []
        for index, batch in enumerate(batches):
            if not start <= index < stop:
                continue
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        if not resume and stop < STEPS:
            accelerator.save_state(str(tmp_path / "state"))
        assert num_low_rank(optimizer.optimizer) == 14 and all(norm > 0 for norm in norms)
        return losses, weights(accelerator.unwrap_model(model))

    losses, expected = run(0, STEPS)
    assert losses[-1] < 0.9 * losses[0]
    first, _ = run(0, STOP)
    rest, found = run(STOP, STEPS, seed=3, resume=True)
    assert first + rest == losses
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("32-true", marks=SLOW),
        pytest.param("bf16-mixed", marks=SLOW),
        pytest.param("bf16-true", marks=SLOW),
    ],
)
def test_lightning(tmp_path, precision) -> None:
    lightning = pytest.importorskip("lightning")
    batches = list(loader())

    class Module(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model, self.losses, self.low_rank = tiny.model(seed), [], 0
            self.model.compile(backend=oasis_backend(RANK, inner="aot_eager"))

        def training_step(self, batch, index):
            # By the count of steps: Lightning takes a plain loader up at the wrong place, whatever the optimizer.
            loss = self.model(**batches[self.global_step]).loss
            self.losses.append(loss.item())
            return loss

        def on_before_optimizer_step(self, optimizer):
            self.low_rank = sum(isinstance(p.grad, LowRankGrad) for p in self.parameters())

        def configure_optimizers(self):
            return OasisAdamW(self.parameters(), lr=3e-3)

    def run(steps: int, seed: int, resume=None):
        torch._dynamo.reset()
        lightning.seed_everything(0, verbose=False)
        module = Module(seed)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_steps=steps, precision=precision, gradient_clip_val=1.0, accelerator="cpu",
            default_root_dir=tmp_path, enable_checkpointing=False, **quiet,
        )  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=resume, weights_only=True if resume else None)
        assert module.low_rank == 14
        return trainer, module

    _, whole = run(STEPS, 0)
    assert whole.losses[-1] < 0.95 * whole.losses[0]
    trainer, half = run(STOP, 0)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    names = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("model.") and "_orig_mod" not in name for name in names)
    _, rest = run(STEPS, 3, str(tmp_path / "half.ckpt"))
    assert half.losses + rest.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(rest), weights(whole), strict=True))


@pytest.mark.slow
def test_trl(tmp_path) -> None:
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from oasis_fx.integrations.huggingface import oasis_trainer

    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w1", unk_token="w0")
    texts = [{"text": " ".join(f"w{i}" for i in row["input_ids"])} for row in tiny.examples(64)]

    def run(seed: int = 0, resume=None):
        torch._dynamo.reset()
        args = trl.SFTConfig(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1,
            save_strategy="steps", save_steps=STOP, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, max_length=tiny.LENGTH,
        )  # fmt: skip
        model = tiny.model(seed)
        ours = oasis_trainer(model, args, RANK, inner="aot_eager")
        data = datasets.Dataset.from_list(texts)
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=fast, **ours)
        trainer.train(resume_from_checkpoint=resume)
        assert num_low_rank(trainer.optimizer.optimizer) == 14
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights(trainer.model)

    losses, expected = run()
    assert losses[-1] < 0.9 * losses[0]
    again, found = run(seed=3, resume=str(tmp_path / f"checkpoint-{STOP}"))
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_names_under_accelerate_s_mixed_precision_are_those_of_the_model() -> None:
    """So that globs match, and output heads are left alone."""
    accelerate = pytest.importorskip("accelerate")
    torch._dynamo.reset()
    accelerate.state.AcceleratorState._reset_state(True)
    model = tiny.model()
    backend = oasis_backend({"model.layers.0.*": RANK}, inner="aot_eager")
    model.compile(backend=backend)
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    batch = next(iter(loader()))
    model(**batch).loss.backward()
    names = {row.name for graph in backend.report() for row in (*graph.rows, *graph.skipped)}
    assert names <= {name for name, _ in model.named_parameters()}
    assert isinstance(model.model.layers[0].mlp.up_proj.weight.grad, LowRankGrad)
    accelerate.state.AcceleratorState._reset_state(True)
