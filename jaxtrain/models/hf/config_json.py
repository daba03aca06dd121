"""config.json of a transformers model and the `ModelConfig` of the same function."""

import dataclasses
from typing import Any

from jaxtrain.config import FAMILIES, ModelConfig
from jaxtrain.models.hf.families import FIXED, HF_FAMILIES, Family, find_family

_MOST_LAYERS = 10_000  # no model has as many; each takes memory before the files can tell that it is missing


def from_hf_config(config: dict[str, Any]) -> tuple[Family, ModelConfig]:
    """Returns the family and the model of a config.json.

    Raises:
      ValueError: an unknown architecture, a missing size, or a value that the decoder does not compute; names the key.
    """
    family = find_family(config)
    for key, allowed in (FIXED | family.fixed).items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} is {config[key]!r}, and the decoder computes {allowed[0]!r} only")
    fields = dict(FAMILIES[family.style])
    for key, field in family.keys.items():
        if key not in config and key not in family.defaults:
            raise ValueError(f"{key} is missing")
        fields[field] = config.get(key, family.defaults.get(key))
        if field == "num_experts":  # transformers 5 writes the other name; None is a dense model that is written
            fields[field] = config.get("num_local_experts", fields[field]) or FAMILIES[family.style][field]
        if field == "num_layers" and fields[field] > _MOST_LAYERS:
            raise ValueError(f"{key} is {fields[field]}, and at most {_MOST_LAYERS} are read")
    if family.style == "gpt2":
        fields["d_ff"] = fields["d_ff"] or 4 * fields["d_model"]
    else:
        fields |= _read_windows(family, config, fields) | _read_rope(family, config)
        if fields["local_rope_theta"] and not fields["global_every"]:
            if fields["attention_window"]:
                fields |= {"rope_theta": fields["local_rope_theta"], "rope_scaling": None}
            fields["local_rope_theta"] = None
    return family, canonical(ModelConfig(**fields))


def _read_windows(family: Family, config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Returns `attention_window` and `global_every`."""
    none = {"attention_window": None, "global_every": None}
    window, num_layers = fields.get("attention_window"), fields["num_layers"]
    if window is None or not config.get("use_sliding_window", family.defaults.get("use_sliding_window", True)):
        return none
    period = {"gemma2": 2, "gemma3": config.get("sliding_window_pattern", 6)}.get(family.style)
    first = config.get("max_window_layers", 28) if family.style in ("qwen2", "qwen3") else 0
    kinds = config.get("layer_types") or [
        "full_attention" if i < first or (period and (i + 1) % period == 0) else "sliding_attention"
        for i in range(num_layers)
    ]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {min(unknown)}, and the decoder has full and sliding attention only")
    whole = [kind == "full_attention" for kind in kinds]
    if all(whole):
        return none
    every = whole.index(True) + 1 if any(whole) else None
    if whole != [bool(every) and (i + 1) % every == 0 for i in range(num_layers)]:
        raise ValueError("the layers with full attention are not every nth one, as model.global_every has them")
    return {"attention_window": window, "global_every": every}


def _read_rope(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Returns `rope_theta`, `rope_scaling` and `local_rope_theta`, from the keys of any release of transformers."""
    style = FAMILIES[family.style]
    given = config.get("rope_parameters") or {}
    local = given.get("sliding_attention", {})
    local = {"rope_theta": config.get("rope_local_base_freq", style.get("local_rope_theta"))} | local
    default = {"rope_theta": config.get("rope_theta", 1e6 if family.style in ("gemma3", "mixtral") else 1e4)}
    whole = default | (config.get("rope_scaling") or {}) | given.get("full_attention", given)
    for rope in (whole, local):
        if (share := rope.get("partial_rotary_factor", 1)) != 1:
            raise ValueError(f"partial_rotary_factor is {share}, and the decoder rotates all channels")
    kind = whole.get("rope_type", whole.get("type", "default"))
    keys = {"default": (), "linear": ("factor",)}
    keys["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind not in keys or local.get("rope_type", "default") != "default":
        raise ValueError(f"the rotary positions are of type {kind!r}, and the decoder has default, linear and llama3")
    if missing := [key for key in keys[kind] if key not in whole]:
        raise ValueError(f"the rotary positions of type {kind} have no {missing[0]}")
    numbers = [float(whole[key]) for key in keys[kind]]
    scaling = ":".join([kind, *(str(int(x) if x.is_integer() else x) for x in numbers)]) if numbers else None
    return {"rope_theta": whole["rope_theta"], "rope_scaling": scaling, "local_rope_theta": local["rope_theta"]}


def canonical(config: ModelConfig) -> ModelConfig:
    """Returns the config of the same function with defaults filled in and without settings of speed and memory."""
    c = config
    fields: dict[str, Any] = {"num_kv_heads": c.kv_heads, "head_dim": c.channels_per_head}
    fields |= {"vocab_multiple": 1, "scan_unroll": "auto", "remat": "none", "attention": "auto"}
    fields |= {"lora_rank": None, "lora_alpha": 16.0, "lora_targets": ("query", "value")}  # an export merges them
    fields["qkv_bias"] = c.qkv_bias and not c.use_bias
    if not c.num_experts:
        fields |= {"experts_per_token": 2, "norm_router": True}
    if c.query_scalar == c.channels_per_head:
        fields["query_scalar"] = None
    if c.positions == "learned":
        fields |= {"rope_theta": 1e4, "rope_scaling": None, "local_rope_theta": None}
    if not c.window_layers:
        fields |= {"attention_window": None, "global_every": None, "local_rope_theta": None}
    elif len(c.window_layers) == c.num_layers:
        fields["global_every"] = None
        if c.local_rope_theta:
            fields |= {"rope_theta": c.local_rope_theta, "rope_scaling": None, "local_rope_theta": None}
    elif c.local_rope_theta == c.rope_theta and c.rope_scaling is None:
        fields["local_rope_theta"] = None
    return dataclasses.replace(c, **fields)


def to_hf_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that computes the same as a model, and the model's config.json.

    Raises:
      ValueError: there is none; names the fields that differ from the nearest.
    """
    wanted = canonical(config)
    nearest: tuple[list[str], str] | None = None
    for family in HF_FAMILIES:
        values = _write(family, wanted)
        found = from_hf_config(values)[1]
        differ = [
            f"model.{item.name} {getattr(wanted, item.name)!r} (it has {getattr(found, item.name)!r})"
            for item in dataclasses.fields(ModelConfig)
            if getattr(wanted, item.name) != getattr(found, item.name)
        ]
        if not differ:
            return family, values
        if nearest is None or len(differ) < len(nearest[0]):
            nearest = differ, family.architecture
    assert nearest is not None
    differ, name = nearest
    raise ValueError(f"no architecture of transformers computes this model; {name} differs by {', '.join(differ)}")


def _write(family: Family, c: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= {key: allowed[0] for key, allowed in family.fixed.items()}
    values |= {key: getattr(c, field) for key, field in family.keys.items()}
    if family.style == "gpt2":
        return values
    values |= {"rope_theta": c.rope_theta, "rope_scaling": None}
    if stretch := c.rope_stretch:
        values["rope_scaling"] = {"rope_type": stretch.kind, "factor": stretch.factor}
        if stretch.kind == "llama3":
            values["rope_scaling"] |= {"low_freq_factor": stretch.low, "high_freq_factor": stretch.high}
            values["rope_scaling"]["original_max_position_embeddings"] = int(stretch.length)
    if "query_scalar" in family.keys.values():
        scalar = c.query_scalar or c.channels_per_head
        values["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar  # transformers wants an int
        local = set(c.window_layers)
        values["layer_types"] = [("sliding" if i in local else "full") + "_attention" for i in range(c.num_layers)]
    if family.style == "gemma3":
        values["rope_local_base_freq"] = c.local_rope_theta or c.rope_theta
        values["sliding_window_pattern"] = c.global_every or c.num_layers + 1
    if family.style.startswith("qwen"):
        values |= {"use_sliding_window": c.attention_window is not None, "max_window_layers": 0}
    return values
