"""Formulas for the transformer's number of parameters and FLOPs per token."""

from jaxtrain.config import ModelConfig


def num_params(config: ModelConfig) -> int:
    """Returns the number of parameters. A tied head counts once."""
    c = config
    heads, width = c.num_heads, c.channels_per_head
    norm = c.d_model * (2 if c.use_bias and c.norm == "layernorm" else 1)
    layer = 2 * norm + (2 * width if c.qk_norm else 0) + matrices_per_layer(c)
    if c.use_bias:
        num_up = 2 if c.feed_forward == "swiglu" else 1
        layer += (heads + 2 * c.kv_heads) * width + c.d_model + num_up * c.d_ff + c.d_model
    tables = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    positions = c.max_seq_len * c.d_model if c.positions == "learned" else 0
    return tables + positions + c.num_layers * layer + norm


def matrices_per_layer(c: ModelConfig) -> int:
    """Returns the number of parameters in the matrices of one layer."""
    attention = 2 * c.d_model * (c.num_heads + c.kv_heads) * c.channels_per_head
    return attention + c.d_model * c.d_ff * (3 if c.feed_forward == "swiglu" else 2)


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Returns the FLOPs to train on one token: forward, plus backward at twice that. Recomputation does not count.

    Each multiply-add of the matrix products counts as two FLOPs: all matrices, the head, and attention's scores and
    mixture. The embedding is a look-up and costs none.

    Args:
      config: the model.
      seq_len: tokens per sequence.
      causal: True counts visible scores only: (seq_len + 1) / 2 keys per query, or with a window the mean of
        min(t, window) for t from 1 to seq_len. False counts all scores, as PaLM's MFU does (arXiv:2204.02311).
    """
    c = config
    window = min(c.attention_window or seq_len, seq_len)
    keys = window - window * (window - 1) / (2 * seq_len) if causal else seq_len
    matrices = c.num_layers * matrices_per_layer(c) + c.d_model * c.vocab_size
    scores = c.num_layers * 2 * c.num_heads * c.channels_per_head * keys
    return 3 * 2 * (matrices + scores)
