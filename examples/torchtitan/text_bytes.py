"""Bytes of a text file as tokens, for torchtitan's trainer: a tokenizer and a loader by its own interfaces.

torchtitan's loader of text needs a data set of a hub, and refuses to resume on another number of ranks ("dataloader
resharding is not supported yet"). This one needs a file. What a step reads depends on the number of samples before it
alone, so a run goes on wherever its checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer


class ByteTokenizer(BaseTokenizer):
    """A byte is a token."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str = "") -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return 256


class ByteLoader(BaseDataLoader):
    """Windows of a text at places that the number of a sample draws; the ranks share a step's samples in order."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset_path: str | None = None

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: ByteTokenizer,
        seq_len: int,
        local_batch_size: int,
        **others: Any,
    ) -> None:
        if config.dataset_path is None:
            raise ValueError("dataloader.dataset_path is None: it must be the path of a text file")
        text = tokenizer.encode(Path(config.dataset_path).read_text())
        if len(text) < seq_len + 1:
            raise ValueError(f"{config.dataset_path} has {len(text)} bytes: seq_len {seq_len} needs {seq_len + 1}")
        self._tokens = torch.tensor(text)
        self._ranks, self._rank = dp_world_size, dp_rank
        self._length, self._batch = seq_len, local_batch_size
        self._samples = 0  # of all ranks, so far

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            first = self._samples + self._rank * self._batch
            self._samples += self._ranks * self._batch
            rows = torch.stack([self._window(number) for number in range(first, first + self._batch)])
            yield {"input": rows[:, :-1].contiguous()}, rows[:, 1:].contiguous()

    def _window(self, number: int) -> torch.Tensor:
        places = len(self._tokens) - self._length
        place = int(torch.randint(places, (), generator=torch.Generator().manual_seed(number)))
        return self._tokens[place : place + self._length + 1]

    def state_dict(self) -> dict[str, int]:
        return {"samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._samples = state_dict["samples"]
