"""TRL's trainers, of which some take no `optimizer_cls_and_kwargs`: each learns in subspaces by one helper."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from oasis_fx.integrations.huggingface import OasisCallback, oasis_trainer

from . import tiny

STEPS, RANK = 2, 8
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w0")
    fast.chat_template = TEMPLATE
    return fast


PAIR = {"prompt": "w2 w3", "chosen": " w4 w5", "rejected": " w9 w7"}
ONE = {"prompt": "w2 w3", "completion": " w4 w5"}
ROWS = {
    "DPO": [PAIR] * 8,
    "KTO": [{**ONE, "label": bool(i % 2)} for i in range(8)],
    "GRPO": [{"prompt": "w2 w3"}] * 8,
    "Reward": [{"chosen": "w2 w3 w4 w5", "rejected": "w2 w3 w9 w7"}] * 8,
}
MORE = {"GRPO": {"num_generations": 2, "max_completion_length": 4}}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "DPO" else [pytest.mark.slow]) for kind in ROWS]
)
def test_trainers_of_preferences_and_rewards(tmp_path, kind) -> None:
    torch._dynamo.reset()
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    args = config(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        weight_decay=0.5, **MORE.get(kind, {}),
    )  # fmt: skip
    model = tiny.model()
    if kind == "Reward":
        model.config.num_labels = 1
        model = LlamaForSequenceClassification(model.config)
    ours = oasis_trainer(model, args, RANK, inner="aot_eager", trainer=trainer)
    given = ours | ({"ref_model": tiny.model()} if kind in ("DPO", "KTO") else {})
    if kind == "GRPO":
        given["reward_funcs"] = lambda completions, **_: [float(i) for i in range(len(completions))]
    before = [p.detach().clone() for p in model.parameters()]
    data = datasets.Dataset.from_list(ROWS[kind])
    run = trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **given)
    run.train()
    optimizer = run.optimizer.optimizer
    assert sum("features" in state for state in optimizer.state.values()) == 14
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert len(optimizer.param_groups[1]["params"]) == 5  # norms
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "oasis/mean/captured_energy" in next(e for e in run.state.log_history if "loss" in e)


def test_parameters_that_the_optimizer_lacks_are_refused() -> None:
    """`DPOTrainer(peft_config=...)` adds adapters when its optimizer is made already: they would not be trained."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"2 parameters require gradients and are not in the optimizer.* 1\.weight"):
        OasisCallback(None).on_train_begin(None, None, None, model=model, optimizer=optimizer)
    model[1].requires_grad_(False)
    OasisCallback(None).on_train_begin(None, None, None, model=model, optimizer=optimizer)
