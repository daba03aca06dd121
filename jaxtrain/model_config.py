"""Sizes and style of the decoder-only transformer, and the styles of the known families."""

import contextlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from jaxtrain.fields import Positive, Section, check_choice, check_divisible

Remat = Literal["none", "minimal", "full", "offload"]


class RopeScaling(NamedTuple):
    """Stretch of the rotary wavelengths, for contexts longer than those of the pretraining."""

    # `linear` stretches all wavelengths by `factor` (arXiv:2306.15595). `llama3` leaves those below length / high,
    # stretches those above length / low, and interpolates between them (arXiv:2407.21783).
    kind: str
    # factor, low, high: see `kind`
    factor: float
    low: float = 0.0
    high: float = 0.0
    length: float = 0.0  # tokens of the pretraining's context


@dataclass(frozen=True)
class ModelConfig(Section, section="model"):
    """Decoder-only transformer; `gpt2`, `llama` and `family` below fill in the usual styles."""

    vocab_size: Positive[int] | None = None  # tokens; None takes the size of the data's tokenizer
    num_layers: Positive[int] = 4  # transformer blocks
    num_heads: Positive[int] = 4  # query heads
    num_kv_heads: Positive[int] | None = None  # key and value heads; None takes num_heads
    head_dim: Positive[int] | None = None  # channels per head; None takes d_model / num_heads
    d_model: Positive[int] = 128  # channels of the residual stream
    d_ff: Positive[int] = 512  # hidden channels of the feed-forward block, or of each expert
    # feed-forward blocks of a layer, of which a router chooses some for each token; None: one block without a router
    num_experts: Positive[int] | None = None
    experts_per_token: Positive[int] = 2  # experts that the router chooses for a token
    norm_router: bool = True  # divides the probabilities of the chosen experts by their sum
    max_seq_len: Positive[int] = 256  # tokens of the longest context: position table and KV cache
    positions: Literal["learned", "rope"] = "rope"  # position encoding
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"  # normalization before each block
    # norms before each block, after it (on its output, before the residual sum), or both
    norm_order: Literal["pre", "post", "both"] = "pre"
    norm_offset: bool = False  # norms multiply by 1 + scale, and the scales start at 0
    # activation of the feed-forward block; swiglu and geglu multiply by a gate; gelu has the tanh form
    feed_forward: Literal["gelu", "swiglu", "geglu"] = "swiglu"
    use_bias: bool = False  # adds biases to all projections and norms
    qkv_bias: bool = False  # adds biases to the projections of queries, keys and values
    tie_embeddings: bool = False  # uses the transposed token embedding as the output head
    scale_embeddings: bool = False  # multiplies the token embeddings by the square root of d_model
    # applies RMSNorm to queries and keys: true per head, projection over the channels of all heads
    qk_norm: bool | Literal["projection"] = False
    logit_softcap: Positive[float] | None = None  # logits become cap * tanh(logits / cap); None disables the cap
    rope_theta: Positive[float] = 10_000.0  # base of the rotary wavelengths
    # stretches the rotary wavelengths; see RopeScaling
    rope_scaling: Annotated[str, "linear:FACTOR|llama3:FACTOR:LOW:HIGH:LENGTH"] | None = None
    # rope_theta, without rope_scaling, of the layers with a window if others have none; None takes that of all
    local_rope_theta: Positive[float] | None = None
    norm_eps: Positive[float] = 1e-5  # added to the variance in norms
    # layers per iteration of the loop over layers; "all" removes the loop, "auto" chooses by backend and depth
    scan_unroll: Positive[int] | Literal["auto", "all"] = "auto"
    vocab_multiple: Positive[int] = 1  # pads the rows of the embedding to a multiple of this; padding is masked
    remat: Remat = "none"  # activations that the backward pass recomputes; see models/remat.py
    attention_window: Positive[int] | None = None  # newest keys that a query attends to, itself included; None: all
    # layers n, 2 n, 3 n ... attend to all keys despite attention_window; None: no layer does
    global_every: Positive[int] | None = None
    query_scalar: Positive[float] | None = None  # scores are divided by its root; None takes the head dimension
    attention_softcap: Positive[float] | None = None  # scores become cap * tanh(scores / cap); None disables the cap
    # attention kernel; auto: splash on TPUs, cudnn on NVIDIA GPUs in 16 bits, xla elsewhere and where those cannot run
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    # rank of LoRA matrices, which then are the only parameters that are trained (models/lora.py); None: no LoRA
    lora_rank: Positive[int] | None = None
    lora_alpha: Positive[float] = 16.0  # their product counts lora_alpha / lora_rank times
    lora_targets: tuple[str, ...] = ("query", "value")  # projections that have them: query key value out up gate down

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim is None:
            remedy = "change one of them or set model.head_dim"
            check_divisible("model.d_model", self.d_model, "model.num_heads", self.num_heads, remedy)
        check_divisible("model.num_heads", self.num_heads, "model.num_kv_heads", self.kv_heads)
        if self.positions == "rope" and self.channels_per_head % 2:
            remedy = "set model.head_dim, or model.positions learned"
            raise ValueError(f"rotary positions need an even head dimension, got {self.channels_per_head}: {remedy}")
        if self.global_every and self.attention_window is None:
            raise ValueError("model.global_every excepts layers from model.attention_window: set that too")
        if self.local_rope_theta and not self.global_every:
            raise ValueError("model.local_rope_theta needs model.global_every: set model.rope_theta for all layers")
        _ = self.rope_stretch
        if self.num_experts and self.num_experts < self.experts_per_token:
            most = f"model.num_experts {self.num_experts}"
            raise ValueError(f"model.experts_per_token {self.experts_per_token} exceeds {most}: change one of them")
        if self.num_experts and self.use_bias:
            raise ValueError("model.num_experts has no biases: set model.use_bias false; model.qkv_bias is possible")
        blocks = () if self.num_experts else ("up", *(["gate"] if self.gated else []), "down")  # no LoRA of experts
        projections = ("query", "key", "value", "out", *blocks)
        what = "model.lora_targets" + (" of a mixture of experts" if self.num_experts else "")
        for name in self.lora_targets or ("",):
            check_choice(name, projections, what)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default filled in."""
        return self.num_kv_heads or self.num_heads

    @property
    def gated(self) -> bool:
        """True if the feed-forward block has a gate, and thus three matrices."""
        return self.feed_forward != "gelu"

    @property
    def rope_stretch(self) -> RopeScaling | None:
        """The parts of `rope_scaling`. Raises a ValueError if it is in no known form."""
        if self.rope_scaling is None:
            return None
        kind, *texts = self.rope_scaling.split(":")
        with contextlib.suppress(ValueError):
            values = [float(text) for text in texts]
            if len(values) == {"linear": 1, "llama3": 4}.get(kind) and all(0 < value < 1e9 for value in values):
                stretch = RopeScaling(kind, *values)
                if kind == "linear" or stretch.low < stretch.high:
                    return stretch
        raise ValueError(
            f"model.rope_scaling {self.rope_scaling!r} is none of linear:FACTOR and llama3:FACTOR:LOW:HIGH:LENGTH "
            "with numbers above 0 and LOW below HIGH, such as linear:8 or llama3:8:1:4:8192"
        )

    @property
    def window_layers(self) -> list[int]:
        """Numbers of the layers, counted from 0, that attend within `attention_window`."""
        if self.attention_window is None:
            return []
        return [i for i in range(self.num_layers) if not self.global_every or (i + 1) % self.global_every]

    @property
    def channels_per_head(self) -> int:
        """Head dimension, with the default filled in."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and columns of the head: the vocabulary and its padding."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is None: set it to the size of the tokenizer's vocabulary")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def gpt2(
    num_layers: int = 12, num_heads: int = 12, d_model: int = 768, max_seq_len: int = 1024, **fields
) -> ModelConfig:
    """Returns a GPT-2: learned positions, LayerNorm, GELU, biases, tied head (Radford et al., 2019)."""
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "d_model": d_model, "max_seq_len": max_seq_len}
    return family("gpt2", **{"d_ff": 4 * d_model} | sizes | fields)


def llama(num_layers: int, num_heads: int, d_model: int, d_ff: int, max_seq_len: int, **fields) -> ModelConfig:
    """Returns a Llama: RoPE, RMSNorm, SwiGLU, no biases, untied head (arXiv:2302.13971)."""
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "d_model": d_model, "d_ff": d_ff}
    return family("llama", **sizes | {"max_seq_len": max_seq_len} | fields)


_GEMMA: dict[str, Any] = {"feed_forward": "geglu", "norm_order": "both", "norm_offset": True, "scale_embeddings": True}
_GEMMA |= {"tie_embeddings": True, "norm_eps": 1e-6}

# The style of each family: the fields that all its sizes share.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"positions": "learned", "norm": "layernorm", "feed_forward": "gelu", "use_bias": True}
    | {"tie_embeddings": True},  # Radford et al., 2019
    "llama": {},  # arXiv:2302.13971, arXiv:2407.21783
    "mistral": {},  # arXiv:2310.06825
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1e6},  # arXiv:2412.15115
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6},  # arXiv:2505.09388
    "gemma2": _GEMMA  # arXiv:2408.00118
    | {"attention_window": 4096, "global_every": 2, "attention_softcap": 50.0, "logit_softcap": 30.0},
    "gemma3": _GEMMA  # arXiv:2503.19786
    | {"attention_window": 512, "global_every": 6, "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 1e4},
    "mixtral": {"num_experts": 8, "rope_theta": 1e6},  # arXiv:2401.04088
    "qwen3_moe": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6}  # arXiv:2505.09388
    | {"num_experts": 128, "experts_per_token": 8},
    "olmoe": {"qk_norm": "projection", "num_experts": 64, "experts_per_token": 8, "norm_router": False},  # 2409.02060
    "olmo2": {"norm_order": "post", "qk_norm": "projection", "norm_eps": 1e-6, "rope_theta": 5e5},  # arXiv:2501.00656
}


def family(name: str, **fields: Any) -> ModelConfig:
    """Returns a model in the style of one of FAMILIES; `fields` give its sizes and may replace parts of the style."""
    check_choice(name, FAMILIES, "family")
    return ModelConfig(**FAMILIES[name] | fields)
