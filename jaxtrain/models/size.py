"""Formulas for the transformer's matrices and FLOPs per token."""

from jaxtrain.config import ModelConfig


def matrices_per_layer(c: ModelConfig, *, tensor: int = 1, active: bool = False) -> int:
    """Returns the number of parameters in the matrices of one layer.

    Args:
      tensor: devices that shard heads and hidden channels; the number counts the parameters on one of them.
      active: True counts the experts that one token uses only.
    """
    attention = 2 * c.d_model * (c.num_heads + c.kv_heads) * c.channels_per_head
    blocks = (c.experts_per_token if active else c.num_experts) if c.num_experts else 1
    router = c.d_model * (c.num_experts or 0)
    return (attention + blocks * c.d_model * c.d_ff * (3 if c.gated else 2)) // tensor + router


def active_params(c: ModelConfig, num_params: int) -> int:
    """Returns the number of parameters that one token uses, of all `num_params` of a model."""
    return num_params - c.num_layers * (matrices_per_layer(c) - matrices_per_layer(c, active=True))


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Returns the FLOPs to train on one token: forward, plus backward at twice that. Recomputation does not count.

    Each multiply-add of the matrix products counts as two FLOPs: all matrices, the head, and attention's scores and
    mixture; of experts, those that a token uses. The embedding is a look-up and costs none. Beside LoRA matrices, whose
    products do not count, the other matrices have no gradient.

    Args:
      causal: True counts visible scores only: (seq_len + 1) / 2 keys per query, or in a layer with a window the mean
        of min(t, window) for t from 1 to seq_len. False counts all scores, as PaLM's MFU does (arXiv:2204.02311).
    """
    c = config

    def keys(window: int) -> float:
        return window - window * (window - 1) / (2 * seq_len) if causal else seq_len

    num_local, window = len(c.window_layers), min(c.attention_window or seq_len, seq_len)
    all_keys = num_local * keys(window) + (c.num_layers - num_local) * keys(seq_len)
    matrices = c.num_layers * matrices_per_layer(c, active=True) + c.d_model * c.vocab_size
    scores = 2 * c.num_heads * c.channels_per_head * all_keys
    products = 2 if c.lora_rank else 3
    return 2 * (products * matrices + 3 * scores)
