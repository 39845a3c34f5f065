"""`chunk_loss` and `oasis_trainer(loss="chunked")`: the loss is the model's own, and what it cannot be is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from oasis_fx import LowRankGrad, OasisSGD, OasisWarning, oasis_backend
from oasis_fx.integrations import chunked_loss
from oasis_fx.integrations.chunked_loss import chunk_loss
from oasis_fx.integrations.huggingface import oasis_trainer

from . import tiny

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(tiny.VOCABULARY, (4, tiny.LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(100)}, {"num_items_in_batch": 100}])
def test_the_loss_is_the_models_own(more) -> None:
    reference, model = tiny.model(), chunk_loss(tiny.model(), num_chunks=3)
    expected = reference(**batch(), **more).loss
    model.compile(backend=oasis_backend(rank=8, inner="aot_eager"), fullgraph=True)
    found = model(**batch(), **more)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None and found.to_tuple()[0] is found.loss
    found.loss.backward(), expected.backward()
    rewritten = 0
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        gradient, dense = one.grad, other.grad
        if isinstance(gradient, LowRankGrad):
            rewritten += 1
            gradient, dense = gradient.factor, dense @ gradient.basis.detach()
        torch.testing.assert_close(gradient, dense, rtol=1e-4, atol=1e-6)
    assert rewritten == 14


def test_a_tied_head_has_both_of_its_gradients() -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    reference = transformers.LlamaForCausalLM(config)
    model = chunk_loss(copy.deepcopy(reference))
    reference(**batch()).loss.backward(), model(**batch()).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, reference.lm_head.weight.grad)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_evaluation_and_generation_have_whole_logits() -> None:
    reference, model = tiny.model().eval(), chunk_loss(tiny.model()).eval()
    expected, found = reference(**batch()), model(**batch())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    ids = batch()["input_ids"][:1, :4]
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_a_copy_calls_itself_and_a_tuple_has_no_logits() -> None:
    model = chunk_loss(tiny.model())
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss, logits, *_ = other(**batch(), return_dict=False)
    torch.testing.assert_close(loss, tiny.model()(**batch()).loss)
    assert logits is None


def test_it_saves_as_the_model_that_it_was(tmp_path) -> None:
    model = chunk_loss(tiny.model())
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert other.config.architectures == ["LlamaForCausalLM"]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 16}),
        ("Granite", {"logits_scaling": 2.0}),
        ("Cohere", {}),
    ],
)
def test_logits_that_are_changed_before_the_loss_are_refused(kind, more) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    before = model(**batch()).loss
    with pytest.raises(ValueError, match=f"the loss of {kind}ForCausalLM cannot be chunked: .* capped or scaled"):
        chunk_loss(model)
    assert torch.equal(model(**batch()).loss, before) and model.training


def test_other_models_and_a_second_time_are_refused() -> None:
    with pytest.raises(ValueError, match="its head is NoneType"):
        chunk_loss(torch.nn.Linear(2, 2))
    model = chunk_loss(tiny.model())
    with pytest.raises(ValueError, match="chunked already"):
        chunk_loss(model)


def test_training_without_labels_is_warned_of() -> None:
    chunked_loss._warned_without_labels.clear()
    with pytest.warns(OasisWarning, match="LlamaForCausalLM trains without labels"):
        chunk_loss(tiny.model())(batch()["input_ids"])


def test_a_compiled_model_is_warned_of_in_whole_graphs_and_without_noise() -> None:
    chunked_loss._warned_without_labels.clear()
    torch._dynamo.reset()
    model = chunk_loss(tiny.model())
    model.compile(backend="eager", fullgraph=True)
    with pytest.warns() as told:
        for _ in range(2):
            model(batch()["input_ids"])
    (message,) = (str(one.message) for one in told)
    assert message.startswith("LlamaForCausalLM trains without labels") and told[0].filename == __file__


def test_adapters_around_the_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = chunk_loss(peft.get_peft_model(tiny.model(), config))
    found = model(**batch())
    assert found.logits is None
    torch.testing.assert_close(found.loss, tiny.model()(**batch()).loss)


def run(folder, *, loss: str | None, **arguments: Any) -> Trainer:
    torch._dynamo.reset()
    args = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.3,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **arguments,
    )  # fmt: skip
    model = tiny.model()
    ours = oasis_trainer(model, args, 10**6, inner="aot_eager", optimizer=OasisSGD, loss=loss)
    trainer = Trainer(
        model=model, args=args, train_dataset=tiny.examples(16), eval_dataset=tiny.examples(8, seed=1), **ours
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trainer_learns_the_same(tmp_path, smoothing) -> None:
    one, other = (run(tmp_path, loss=loss, label_smoothing_factor=smoothing) for loss in ("chunked", None))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4
    assert one.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], rel=1e-4)


def test_a_loss_that_there_is_not_and_trainers_with_their_own(tmp_path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="loss is 'chonked': it must be 'chunked'"):
        oasis_trainer(tiny.model(), args, loss="chonked")

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match="Own computes a loss of its own"):
        oasis_trainer(tiny.model(), args, loss="chunked", trainer=Own)
