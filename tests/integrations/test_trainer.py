"""`transformers.Trainer`: accumulation, clipping, bfloat16, evaluation, resuming, the best model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from oasis_fx import LowRankGrad, OasisAdamW, OasisLion, OasisSGD, OasisWarning
from oasis_fx.integrations.huggingface import OasisCallback, oasis_trainer

from . import tiny

STEPS = 12


def trainer(
    folder: Path, *, compiled: bool = True, optimizer=OasisAdamW, rank=8, seed: int = 0, **arguments
) -> Trainer:
    torch._dynamo.reset()
    fixed = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    settings = fixed | {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | arguments
    args = TrainingArguments(str(folder), **settings)
    model = tiny.model(seed)
    ours = oasis_trainer(model, args, rank, inner="aot_eager", optimizer=optimizer) if compiled else {}
    data = {"train_dataset": tiny.examples(64), "eval_dataset": tiny.examples(8, seed=1)}
    return Trainer(model=model, args=args, **data, **ours)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_it_learns_in_subspaces(tmp_path) -> None:
    run = trainer(tmp_path)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.append(sum(isinstance(p.grad, LowRankGrad) for p in model.parameters()))

    run.add_callback(Look())
    run.train()
    assert seen == [14] * STEPS
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    low = [state for state in run.optimizer.optimizer.state.values() if "features" in state]
    assert len(low) == 14 and all(state["exp_avg"].shape[1] == 8 for state in low)


def test_at_full_rank_it_is_the_trainer_with_sgd(tmp_path) -> None:
    """SGD does not depend on the basis, as AdamW does: with all columns it is stock SGD, clipping included."""
    arguments = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "learning_rate": 0.3}
    ours = trainer(tmp_path, rank=10**6, optimizer=OasisSGD, **arguments)
    theirs = trainer(tmp_path, compiled=False, optim="sgd", optim_args="momentum=0.9", **arguments)
    ours.train(), theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    norms = [[e["grad_norm"] for e in run.state.log_history if "grad_norm" in e] for run in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and len(norms[0]) == STEPS


def test_grad_norm_is_that_of_the_low_rank_gradients(tmp_path) -> None:
    run, found = trainer(tmp_path, max_grad_norm=0.1), []
    clip = run.accelerator.clip_grad_norm_

    def watched(parameters, *args, **kwargs):
        parameters = list(parameters)
        dense = [p.grad.to_dense() if isinstance(p.grad, LowRankGrad) else p.grad for p in parameters]
        found.append(torch.stack([g.norm() for g in dense]).norm().item())
        return clip(parameters, *args, **kwargs)

    run.accelerator.clip_grad_norm_ = watched
    run.train()
    logged = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("optimizer", [OasisAdamW, pytest.param(OasisLion, marks=pytest.mark.slow)])
def test_resumed_is_the_uninterrupted_run(tmp_path, optimizer) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2, "optimizer": optimizer}
    whole = trainer(tmp_path / "whole", **arguments)
    whole.train()
    again = trainer(tmp_path / "whole", seed=7, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(again)[5:] == losses(whole)[5:]
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_model_is_loaded_and_loads_anywhere(tmp_path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    run = trainer(tmp_path, load_best_model_at_end=True, learning_rate=1e-2, **arguments)
    run.train()
    best = min(e["eval_loss"] for e in run.state.log_history if "eval_loss" in e)
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    run.save_model(str(tmp_path / "saved"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert list(other.state_dict()) == list(tiny.model().state_dict())
    batch = {key: torch.tensor([row]) for key, row in tiny.examples(1, seed=5)[0].items()}
    assert other(**batch).loss.item() == pytest.approx(run.model.forward(**batch).loss.item(), rel=1e-5)


def test_bfloat16_autocast(tmp_path) -> None:
    run = trainer(tmp_path, bf16=True)
    run.train()
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    assert sum("features" in state for state in run.optimizer.optimizer.state.values()) == 14


def test_stats_are_in_the_history(tmp_path) -> None:
    run = trainer(tmp_path)
    run.train()
    entry = next(e for e in reversed(run.state.log_history) if "loss" in e)
    assert 0 < entry["oasis/mean/captured_energy"] <= 1 and "oasis/mean/drift" in entry
    (callback,) = (c for c in run.callback_handler.callbacks if isinstance(c, OasisCallback))
    assert len(callback.backend.report()) >= 1


def test_the_arguments_of_the_trainer_reach_the_optimizer(tmp_path) -> None:
    """Ours go before those of the trainer; of other optimizers it has the learning rate alone."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=3e-4, adam_beta1=0.8, adam_beta2=0.9,
                             adam_epsilon=1e-5)  # fmt: skip
    kind, options = oasis_trainer(tiny.model(), args)["optimizer_cls_and_kwargs"]
    assert kind is OasisAdamW and options == {"lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-5}
    given = {"optimizer_options": {"eps": 1e-3, "rank_scaling": False}}
    _, options = oasis_trainer(tiny.model(), args, **given)["optimizer_cls_and_kwargs"]
    assert options == {"lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-3, "rank_scaling": False}
    _, options = oasis_trainer(tiny.model(), args, optimizer=OasisLion)["optimizer_cls_and_kwargs"]
    assert options == {"lr": 3e-4}


def test_what_does_not_go_together_is_refused(tmp_path) -> None:
    args = TrainingArguments(str(tmp_path), torch_compile=True, use_cpu=True)
    with pytest.raises(ValueError, match="torch_compile is True"):
        oasis_trainer(tiny.model(), args)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args.fsdp = "full_shard"
    with pytest.raises(ValueError, match="fsdp is 'full_shard'"):
        oasis_trainer(tiny.model(), args)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2  # `Trainer` would make an nn.DataParallel
    with pytest.raises(ValueError, match=r"n_gpu is 2: .*torchrun"):
        oasis_trainer(tiny.model(), args)
    with pytest.raises(ValueError, match="rank is 0"):
        oasis_trainer(tiny.model(), TrainingArguments(str(tmp_path), use_cpu=True), rank=0)


def test_callbacks_of_the_user_are_called_beside_ours(tmp_path) -> None:
    steps = []

    class Mine(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1
    )
    model = tiny.model()
    ours = oasis_trainer(model, args, 8, inner="aot_eager", callbacks=[Mine()])
    run = Trainer(model=model, args=args, train_dataset=tiny.examples(16), **ours)
    run.train()
    assert steps == [1, 2]
    assert "oasis/mean/captured_energy" in run.state.log_history[0]


def test_optimizers_that_would_not_be_used(tmp_path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    for wrong in ("adamw", torch.optim.AdamW):
        with pytest.raises(ValueError, match=r"optimizer is .*must be the class of one of our optimizers"):
            oasis_trainer(tiny.model(), args, optimizer=wrong)
    args.optim = "adamw_bnb_8bit"
    with pytest.warns(OasisWarning, match=r"optim is 'adamw_bnb_8bit' and is not used.*'state_bits': 8"):
        oasis_trainer(tiny.model(), args)
