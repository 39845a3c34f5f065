"""Speech and multimodal models of transformers."""

from __future__ import annotations

import pytest
import torch
from zoo import Model, entry, noise, tokens


@entry("Whisper", left=("*.embed_positions.weight",))
def whisper() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=8,
        max_target_positions=16, dropout=0.0, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    features = noise(2, 8, 16)
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": features, "decoder_input_ids": tokens(2, 6),
    }  # fmt: skip


@entry("CLIP", alike=True)
def clip() -> Model:
    transformers = pytest.importorskip("transformers")
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1},
        vision_config=vision,
        projection_dim=24,
    )
    ids = tokens()
    return transformers.CLIPModel(config), {
        "input_ids": ids, "pixel_values": noise(2, 3, 16, 16), "attention_mask": torch.ones_like(ids),
    }  # fmt: skip


@entry(
    "ViT of transformers (patch convolution)", left=("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")
)
def vit() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), {"pixel_values": noise(2, 3, 16, 16)}
