"""Text to train on: generated maths, a jsonl of prompts and answers, or plain text; in fixed-size batches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IGNORE = -100  # label of a token that the loss leaves out
GENERATED = "gsm_symbolic"  # grade-school maths with chains of thought, by reasoning-gym
PAIRS = (".jsonl", ".json")  # endings of files with a prompt and an answer in each line


@dataclass(frozen=True)
class Examples:
    """Token ids and labels [number, seq_len]."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, step: int, size: int, seed: int) -> dict[str, torch.Tensor]:
        """The batch of one step: a function of the step and the seed, so that a resumed run goes on the same."""
        epoch, offset = divmod(step * size, max(len(self) - len(self) % size, size))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed + epoch))
        rows = order.repeat(-(-size // len(self)) + 1)[offset : offset + size]
        return {"input_ids": self.input_ids[rows], "labels": self.labels[rows]}

    def batches(self, size: int) -> Iterable[dict[str, torch.Tensor]]:
        for start in range(0, len(self), size):
            yield {
                "input_ids": self.input_ids[start : start + size],
                "labels": self.labels[start : start + size],
            }


def without_padding(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut off the columns behind the last label, which change no loss under causal attention."""
    columns = (batch["labels"] != IGNORE).any(0).nonzero()
    width = int(columns.max()) + 1 if len(columns) else batch["labels"].shape[1]
    return {name: tensor[:, :width] for name, tensor in batch.items()}


def check_data(source: str) -> None:
    """Read a file of data and check each line of it, before a model is loaded for it.

    Raises:
        ValueError: the file does not exist, is no text, or a line of it lacks a field; the message names the line.
    """
    if source == GENERATED:
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"--data is {source!r}: it must be '{GENERATED}' or an existing jsonl or text file")
    if path.suffix not in PAIRS:
        _text(path)
    elif len(list(_read_pairs(path))) < 2:
        raise ValueError(f"--data is {source!r}: it must have two examples at least, one to train on and one held out")


def load_examples(source: str, tokenizer: Any, seq_len: int, num_heldout: int, seed: int) -> tuple[Examples, Examples]:
    """Training and held-out examples.

    Args:
        source: ``gsm_symbolic`` (generated grade-school maths with chains of thought), or a file: jsonl with
            ``prompt`` and ``answer`` (or ``question`` and ``answer``) in each line, or plain text.

    Raises:
        ValueError: the file does not exist, or a line of it has no such fields.
    """
    if source == GENERATED:
        pairs = _gsm_symbolic(2000, seed)
        heldout = _gsm_symbolic(num_heldout, seed + 1_000_000)
        return _encode_pairs(pairs, tokenizer, seq_len), _encode_pairs(heldout, tokenizer, seq_len)
    check_data(source)
    path = Path(source)
    if path.suffix in PAIRS:
        pairs = list(_read_pairs(path))
        count = min(num_heldout, max(1, len(pairs) // 20))
        return _encode_pairs(pairs[count:], tokenizer, seq_len), _encode_pairs(pairs[:count], tokenizer, seq_len)
    ids = torch.tensor(tokenizer(_text(path))["input_ids"])
    chunks = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    if len(chunks) < 2:
        raise ValueError(f"--data is {source!r}: it has {len(ids)} tokens, fewer than two sequences of {seq_len}")
    count = min(num_heldout, max(1, len(chunks) // 20))
    return Examples(chunks[:-count], chunks[:-count]), Examples(chunks[-count:], chunks[-count:])


def _gsm_symbolic(count: int, seed: int) -> list[tuple[str, str]]:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed)
    return [(item["question"], item["metadata"]["answer_cot"]) for item in dataset]


def _read_pairs(path: Path) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            pair = fields["prompt"] if "prompt" in fields else fields["question"], fields["answer"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"--data: line {number} of {path} is no object with prompt and answer, or question and answer"
            ) from None
        if not all(isinstance(part, str) for part in pair):
            raise ValueError(f"--data: line {number} of {path} has a field that is no text")
        yield pair


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data is {str(path)!r}: it is no text in UTF-8 ({error.reason})") from None


def _encode_pairs(pairs: Iterable[tuple[str, str]], tokenizer: Any, seq_len: int) -> Examples:
    rows = [_encode(prompt, answer, tokenizer, seq_len) for prompt, answer in pairs]
    ids, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Examples(ids, labels)


def _encode(prompt: str, answer: str, tokenizer: Any, seq_len: int) -> tuple[list[int], list[int]]:
    """Prompt and answer cut or padded to ``seq_len``; labels on the answer only.

    Padding stands behind everything that the loss reads: with causal attention it changes nothing.
    """
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    else:
        prompt += "\n"
    end = tokenizer.eos_token_id
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"] + ([] if end is None else [end])
    ids = (head + tail)[:seq_len]
    labels = ([IGNORE] * len(head) + tail)[:seq_len]
    missing = seq_len - len(ids)
    return ids + [end or 0] * missing, labels + [IGNORE] * missing
