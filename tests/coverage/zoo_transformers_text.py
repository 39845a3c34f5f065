"""Language models of transformers."""

from __future__ import annotations

import pytest
import torch
from zoo import Model, causal_lm, entry, tokens


@entry("Llama (MHA)", alike=True)
def llama() -> Model:
    return causal_lm("Llama", num_key_value_heads=4)


@entry("Llama (GQA)")
def llama_gqa() -> Model:
    return causal_lm("Llama", num_key_value_heads=2)


@entry("Mistral", alike=True)
def mistral() -> Model:
    return causal_lm("Mistral", num_key_value_heads=2, sliding_window=4)


@entry("Qwen3")
def qwen3() -> Model:
    return causal_lm("Qwen3", num_key_value_heads=2, head_dim=8)


@entry("Gemma 3", alike=True)
def gemma3() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, use_cache=False, sliding_window=4,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config), {"input_ids": tokens()}


@entry("Phi-3 (fused qkv and gate_up)")
def phi3() -> Model:
    return causal_lm("Phi3", num_key_value_heads=2)


@entry("GPT-2 (Conv1D: n x m)")
def gpt2() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens()}


@entry("GPT-NeoX", alike=True)
def gpt_neox() -> Model:
    return causal_lm("GPTNeoX")


@entry("OPT")
def opt() -> Model:
    return causal_lm("OPT", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32, dropout=0.0)


@entry("BERT")
def bert() -> Model:
    return _masked_lm("Bert")


@entry("RoBERTa", alike=True)
def roberta() -> Model:
    return _masked_lm("Roberta")


def _masked_lm(family: str) -> Model:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    ids = tokens().clamp(min=2)
    return getattr(transformers, f"{family}ForMaskedLM")(config), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip


@entry("T5 (encoder-decoder, tied embedding)")
def t5() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tokens(), "decoder_input_ids": tokens(2, 6)}


@entry("Mixtral (3-D experts, float64)")
def mixtral() -> Model:
    return causal_lm("Mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)


@entry("Mixtral (3-D experts, bfloat16)", dtype=torch.bfloat16, tolerance=2e-2)
def mixtral_bfloat16() -> Model:
    return mixtral()


@entry("Qwen3-MoE", alike=True)
def qwen3_moe() -> Model:
    return causal_lm(
        "Qwen3Moe", num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )


@entry("DeepSeek-V3 (MLA, experts)", tolerance=1e-6)  # its router is float32 in any model
def deepseek_v3() -> Model:
    return causal_lm(
        "DeepseekV3", num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip


@entry("Mamba-2", left=("*.conv1d.weight",))
def mamba2() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1,
        chunk_size=4, pad_token_id=0, use_cache=False, expand=2,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config), {"input_ids": tokens()}
