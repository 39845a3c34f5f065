"""Models that can be planned for: a list of our own, a folder, or what transformers has in its cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

# Public configuration values: width, inner width, blocks, heads, key-value heads, vocabulary, head size, tied head.
_LLAMA = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, 64, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, 64, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, 128, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, 128, False),
}
_QWEN3 = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 151936, 128, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 151936, 128, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, 128, False),
}
BUILT_IN = (*_LLAMA, *_QWEN3)


def load_config(name: str, blocks: int | None = None, vocabulary: int | None = None) -> Any:
    """Return a configuration of transformers for a causal language model.

    Args:
        name: of the built-in list, in any case; a folder with a ``config.json``; or a repository in the local cache.
        blocks, vocabulary: other sizes than the model's own.

    Raises:
        ValueError: it is none of them, or no causal language model.
    """
    config = _find_config(name)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    sizes = ("num_hidden_layers", "vocab_size", "hidden_size")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not all(hasattr(config, size) for size in sizes):
        raise ValueError(
            f"model is {name!r}, of the kind {config.model_type!r}: that is no causal language model of transformers; "
            f"give one, such as {', '.join(BUILT_IN[:3])}"
        )
    config = config if blocks is None else with_blocks(config, blocks)
    return config if vocabulary is None else with_vocabulary(config, vocabulary)


def _find_config(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("a model by its name needs transformers: pip install transformers") from error
    for table, kind in ((_LLAMA, transformers.LlamaConfig), (_QWEN3, transformers.Qwen3Config)):
        for known, sizes in table.items():
            if name.lower() in (known.lower(), f"meta-llama/{known}".lower(), f"qwen/{known}".lower()):
                return kind(**_settings(*sizes))
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        where = "a folder without a config.json that transformers reads" if Path(name).is_dir() else "not known here"
        allowed = ", ".join(BUILT_IN)
        raise ValueError(
            f"model is {name!r}, {where}: give one of {allowed}, a folder, or a repository in the local cache"
        ) from error


def _settings(
    width: int, inner: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, head: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "head_dim": head,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


def blocks_of(config: Any) -> int:
    """Return how many blocks a configuration has."""
    return int(config.num_hidden_layers)


def with_blocks(config: Any, blocks: int) -> Any:
    """Return a configuration with another number of blocks."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = blocks
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:blocks]
    changed.use_cache = False
    return changed


def with_vocabulary(config: Any, size: int) -> Any:
    """Return a configuration with a vocabulary of another size."""
    changed = copy.deepcopy(config)
    changed.vocab_size = size
    return changed
