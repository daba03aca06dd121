"""Events of metrics.jsonl as text for people."""

from typing import Any

from jaxtrain.monitoring.metrics import EVENT_KEYS
from jaxtrain.monitoring.tables import format_bytes, format_value

Event = dict[str, Any]


def sentence(event: Event) -> str:
    """Describes an event by its text; by its name and fields if it has none, as in runs of older versions."""
    name, step, text = event["event"], event.get("step"), event.get("text")
    if isinstance(text, str):
        return text
    hidden = {*EVENT_KEYS, "step"}
    fields = [f"{key.replace('_', ' ')} {format_value(value)}" for key, value in event.items() if key not in hidden]
    if name in ("start", "resume"):  # the report shows their many fields elsewhere
        fields = []
    elif isinstance(hashed := event.get("bytes_hashed"), list) and all(isinstance(size, int) for size in hashed):
        fields = [format_bytes(sum(hashed))]
    at = f" at step {step:,}" if isinstance(step, int) else ""
    return name.replace("_", " ").capitalize() + at + (": " + ", ".join(fields) if fields else "")
