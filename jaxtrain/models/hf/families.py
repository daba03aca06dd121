"""Architectures of transformers that the decoder can compute: what their config.json says, and their tensors.

A family is a table entry: the keys of its config.json beside the fields of `ModelConfig`, and the names of its tensors
beside the paths of our parameters.
"""

import itertools
from typing import Any, NamedTuple

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_seq_len",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_WINDOW = {"sliding_window": "attention_window"}
_ROUTER = {"num_experts_per_tok": "experts_per_token", "norm_topk_prob": "norm_router"}
_OLMOE_KEYS = _SIZES | _ROUTER | {"num_experts": "num_experts"}
_QWEN_MOE_KEYS = {key: field for key, field in (_OLMOE_KEYS | _WINDOW).items() if key != "intermediate_size"}
_QWEN_MOE_KEYS |= {"moe_intermediate_size": "d_ff"}
_MIXTRAL_KEYS = _SIZES | _WINDOW | {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
_GEMMA_KEYS = _SIZES | _WINDOW | {"query_pre_attn_scalar": "query_scalar"}
_GEMMA_KEYS |= {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"}

_ATTENTION = {
    f"layers/attention/{ours}/{leaf}": f"model.layers.{{}}.self_attn.{theirs}.{suffix}"
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}.items()
    for leaf, suffix in {"kernel": "weight", "bias": "bias"}.items()
}
_ATTENTION |= {
    f"layers/attention/{k}/scale": f"model.layers.{{}}.self_attn.{k[0]}_norm.weight" for k in ("query_norm", "key_norm")
}
_BASE = _ATTENTION | {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}
_GATED = {"gate": "w1", "up": "w3", "down": "w2"}  # and their names in Mixtral
_BASE |= {f"layers/feed_forward/{k}/kernel": f"model.layers.{{}}.mlp.{k}_proj.weight" for k in _GATED}


def _norms(**names: str) -> dict[str, str]:
    return {f"layers/{ours}/scale": f"model.layers.{{}}.{theirs}.weight" for ours, theirs in names.items()}


def _experts(part: str, names: dict[str, str]) -> dict[str, str]:
    paths = {f"layers/feed_forward/experts/{k}": f"{part}.experts.{{}}.{name}.weight" for k, name in names.items()}
    return paths | {"layers/feed_forward/router/kernel": f"{part}.gate.weight"}


_POST = _norms(attention_post_norm="post_attention_layernorm", feed_forward_post_norm="post_feedforward_layernorm")
_LLAMA = _BASE | _norms(attention_norm="input_layernorm", feed_forward_norm="post_attention_layernorm")
_GEMMA = _BASE | _POST | _norms(attention_norm="input_layernorm", feed_forward_norm="pre_feedforward_layernorm")
_EXPERTS = _LLAMA | _experts("model.layers.{}.mlp", {k: f"{k}_proj" for k in _GATED})
_MIXTRAL = _LLAMA | _experts("model.layers.{}.block_sparse_moe", _GATED)
_GPT2 = {"embedding": "transformer.wte.weight", "positions": "transformer.wpe.weight", "head": "lm_head.weight"}
for _leaf, _suffix in {"kernel": "weight", "scale": "weight", "bias": "bias"}.items():
    _GPT2[f"final_norm/{_leaf}"] = f"transformer.ln_f.{_suffix}"
    _GPT2 |= {
        f"layers/{ours}/{_leaf}": f"transformer.h.{{}}.{theirs}.{_suffix}"
        for ours, theirs in {
            "attention_norm": "ln_1",
            "attention/query": "attn.c_attn",
            "attention/key": "attn.c_attn",
            "attention/value": "attn.c_attn",
            "attention/out": "attn.c_proj",
            "feed_forward_norm": "ln_2",
            "feed_forward/up": "mlp.c_fc",
            "feed_forward/down": "mlp.c_proj",
        }.items()
    }


class Family(NamedTuple):
    """An architecture of transformers."""

    # architecture, model_type: its names in config.json
    architecture: str
    model_type: str
    style: str  # entry of `FAMILIES`
    keys: dict[str, str]  # keys of config.json with the fields of `ModelConfig` that they set
    # paths of our parameters with the names of its tensors; `{}` is the number of the layer, then that of the expert.
    # Parameters with the same name are parts of one tensor, in this order.
    names: dict[str, str]
    defaults: dict[str, Any]  # values of keys that config.json may omit
    fixed: dict[str, tuple[Any, ...]]  # keys with the values that the decoder computes; the first is written
    transposed: bool = True  # True if kernels are stored as `[outputs, inputs]`


_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_bias": (False,)}
_EVERY_LAYER = _SILU | {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}
_TANH: dict[str, tuple[Any, ...]] = {"hidden_activation": ("gelu_pytorch_tanh", None), "attention_bias": (False,)}
_TANH |= {"use_bidirectional_attention": (False, None)}
_GPT2_FIXED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,)}
_GPT2_FIXED |= {"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
# Keys of any architecture that change what a model computes.
FIXED: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "partial_rotary_factor": (None, 1)}

_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}
_DEFAULTS |= {"num_key_value_heads": None, "head_dim": None}
_QWEN = _DEFAULTS | {"max_position_embeddings": 32_768, "use_sliding_window": False, "sliding_window": 4096}
_MISTRAL = _DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
_MIXTRAL_DEFAULTS = _MISTRAL | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8}
_OLMOE_DEFAULTS = _DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64}
_QWEN_MOE_DEFAULTS = _QWEN | {"num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768}
_MIXTRAL_DEFAULTS |= {"num_experts_per_tok": 2}
for _defaults in (_OLMOE_DEFAULTS, _QWEN_MOE_DEFAULTS):
    _defaults |= {"num_experts_per_tok": 8, "norm_topk_prob": False}
_GEMMA_DEFAULTS = _DEFAULTS | {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256}
_GEMMA_DEFAULTS |= {"sliding_window": 4096, "query_pre_attn_scalar": 256}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {"max_position_embeddings": 8192}
_GEMMA2_DEFAULTS |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3_DEFAULTS = _GEMMA_DEFAULTS | {"max_position_embeddings": 131_072}
_GEMMA3_DEFAULTS |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_GPT2_DEFAULTS = {"n_inner": None, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

# An export takes the first that computes the same.
HF_FAMILIES = [
    Family("LlamaForCausalLM", "llama", "llama", _SIZES, _LLAMA, _DEFAULTS, _SILU | {"mlp_bias": (False,)}),
    Family("MistralForCausalLM", "mistral", "mistral", _SIZES | _WINDOW, _LLAMA, _MISTRAL, _SILU),
    Family("Qwen2ForCausalLM", "qwen2", "qwen2", _SIZES | _WINDOW, _LLAMA, _QWEN, _SILU),
    Family("Qwen3ForCausalLM", "qwen3", "qwen3", _SIZES | _WINDOW, _LLAMA, _QWEN | {"head_dim": 128}, _SILU),
    Family("MixtralForCausalLM", "mixtral", "mixtral", _MIXTRAL_KEYS, _MIXTRAL, _MIXTRAL_DEFAULTS, _SILU),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", "qwen3_moe", _QWEN_MOE_KEYS, _EXPERTS, _QWEN_MOE_DEFAULTS, _EVERY_LAYER),
    Family("OlmoeForCausalLM", "olmoe", "olmoe", _OLMOE_KEYS, _EXPERTS, _OLMOE_DEFAULTS, _SILU | {"clip_qkv": (None,)}),
    Family("Olmo2ForCausalLM", "olmo2", "olmo2", _SIZES, _BASE | _POST, _DEFAULTS | {"rms_norm_eps": 1e-5}, _SILU),
    Family("Gemma2ForCausalLM", "gemma2", "gemma2", _GEMMA_KEYS, _GEMMA, _GEMMA2_DEFAULTS, _TANH),
    Family("Gemma3ForCausalLM", "gemma3_text", "gemma3", _GEMMA_KEYS, _GEMMA, _GEMMA3_DEFAULTS, _TANH),
    Family("GPT2LMHeadModel", "gpt2", "gpt2", _GPT2_SIZES, _GPT2, _GPT2_DEFAULTS, _GPT2_FIXED, transposed=False),
]

# Features of well-known architectures that this decoder lacks.
_LACKING = {
    "GptOssForCausalLM": "attention sinks",
    "Qwen2MoeForCausalLM": "shared experts",
    "DeepseekV2ForCausalLM": "latent attention and shared experts",
    "DeepseekV3ForCausalLM": "latent attention, shared experts and a router of sigmoids",
    "Glm4MoeForCausalLM": "shared experts and a router of sigmoids",
    "Ernie4_5_MoeForCausalLM": "shared experts",
    "PhimoeForCausalLM": "a router without softmax over all experts",
    "GraniteMoeForCausalLM": "experts in one matrix and multipliers of the residual stream",
    "DbrxForCausalLM": "experts in one matrix",
    "Phi3ForCausalLM": "projections in one matrix and rotary positions of type longrope",
    "Olmo3ForCausalLM": "rotary positions of type yarn",
    "SmolLM3ForCausalLM": "layers without positions",
    "Qwen3NextForCausalLM": "linear attention",
    "MambaForCausalLM": "state-space layers",
}


def find_family(config: dict[str, Any]) -> Family:
    """Returns the family of a config.json. Raises a ValueError that names an unknown architecture."""
    names = config.get("architectures") or [config.get("model_type")]
    name = names[0] if isinstance(names, list) and names else names
    for family in HF_FAMILIES:
        if name in (family.architecture, family.model_type):
            return family
    known = ", ".join(family.architecture for family in HF_FAMILIES)
    lacking = _LACKING.get(str(name)) or ("a tower for images" if "ConditionalGeneration" in str(name) else None)
    what = f"needs {lacking}, which the decoder lacks" if lacking else "is not known"
    raise ValueError(f"architecture {name!r} {what}: known are {known}")


class Tensor(NamedTuple):
    """A tensor of a family: its shape, and the parameters whose concatenation along their last axis it holds."""

    shape: tuple[int, ...]  # as the file has it
    leaves: tuple[str, ...]  # paths of the parameters
    # place of the tensor in the leading axes of the parameters: `()`, `(layer,)` or `(layer, expert)`
    index: tuple[int, ...]
    transposed: bool  # True if the file holds the transposed matrix


def tensors_of(family: Family, shapes: dict[str, tuple[int, ...]], vocab_size: int) -> dict[str, Tensor]:
    """Returns the tensors of a model by name.

    Args:
      shapes: shapes of the parameters by path, such as "layers/attention/query/kernel".
      vocab_size: rows of the embedding and columns of the head without padding.
    """
    tensors: dict[str, Tensor] = {}
    by_name: dict[str, list[str]] = {}
    for path in family.names:
        if path in shapes:
            by_name.setdefault(family.names[path], []).append(path)
    for name, paths in by_name.items():
        leading = shapes[paths[0]][: name.count("{}")]
        shape = list(shapes[paths[0]][len(leading) :])
        shape[-1] = sum(shapes[path][-1] for path in paths)
        if paths[0] == "embedding":
            shape[0] = vocab_size
        if paths[0] == "head":
            shape[-1] = vocab_size
        in_layer = paths[0].startswith("layers/")
        transposed = len(shape) == 2 and (paths[0] == "head" or (family.transposed and in_layer))
        there = tuple(shape[::-1] if transposed else shape)
        for index in itertools.product(*map(range, leading)):
            tensors[name.format(*index)] = Tensor(there, tuple(paths), index, transposed)
    return tensors
