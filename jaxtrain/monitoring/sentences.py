"""Events of metrics.jsonl as sentences."""

from collections.abc import Callable
from typing import Any

from jaxtrain.monitoring.tables import format_bytes, format_seconds, format_value

Event = dict[str, Any]


def sentence(event: Event) -> str:
    """Describes an event, of this version or another, in one sentence."""
    write = _SENTENCES.get(event["event"])
    if write is not None:
        try:
            return write(event)
        except (KeyError, TypeError, ValueError, AttributeError):  # fields of another version
            pass
    fields = [
        f"{k.replace('_', ' ')} {format_value(v)}" for k, v in event.items() if k not in ("event", "time", "step")
    ]
    at = f" at step {event['step']:,}" if isinstance(event.get("step"), int) else ""
    return event["event"].replace("_", " ").capitalize() + at + (": " + ", ".join(fields) if fields else "")


def _start(event: Event) -> str:
    if event.get("source"):
        return f"Started from the weights of {event['source']}, step {event['source_step']:,}."
    return "Started from random weights."


def _evaluation(event: Event) -> str:
    text = f"Validation at step {event['step']:,}: nll {event['nll']:.4f}, perplexity {event['perplexity']:.2f}"
    return text + (f", {event['bits_per_byte']:.4f} bits per byte." if "bits_per_byte" in event else ".")


def _stop(event: Event) -> str:
    reason = str(event["reason"]).replace("stop_after", "as train.stop_after asked")
    skipped = f", {event['skipped_steps']:,} steps skipped" if event.get("skipped_steps") else ""
    return f"Stopped at step {event['step']:,}: {reason}{skipped}."


def _changes(event: Event) -> str:
    values = {name: (format_value(one["old"]), format_value(one["new"])) for name, one in event["changes"].items()}
    return ", ".join(f"{name}: {old} \N{RIGHTWARDS ARROW} {new}" for name, (old, new) in values.items())


def _size(event: Event) -> str:
    hashed = event.get("bytes_hashed", 0)
    return format_bytes(sum(hashed) if isinstance(hashed, list) else hashed)


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "start": _start,
    "resume": lambda e: f"Resumed from step {e['step']:,}.",
    "rewind": lambda e: f"Went back to step {e['step']:,}; later checkpoints were renamed.",
    "compile": lambda e: f"Compiled the train step in {format_seconds(e['seconds'])}.",
    "eval": _evaluation,
    "save": lambda e: f"Began to save step {e['step']:,}.",
    "saved": lambda e: f"Saved step {e['step']:,} ({_size(e)}).",
    "save_slow": lambda e: f"The save of step {e['step']:,} has taken {format_seconds(e['seconds'])} so far.",
    "save_failed": lambda e: f"The save of step {e['step']:,} failed: {e['problem']}.",
    "verified": lambda e: f"Verified the checkpoint of step {e['step']:,} ({_size(e)}).",
    "checkpoint_damaged": lambda e: f"The checkpoint of step {e['step']:,} is damaged: {e['problem']}.",
    "checkpoint_warning": lambda e: f"{e['path']}: {e['problem']}.",
    "log_lost": lambda e: f"The lines of steps {e['last_line'] + 1:,} to {e['step']:,} are lost.",
    "config_change": lambda e: f"The config changed after step {e['step']:,}: {_changes(e)}.",
    "environment_change": lambda e: f"Another environment after step {e['step']:,}: {_changes(e)}.",
    "replay_mismatch": lambda e: f"Step {e['step']:,} computed other bits the second time: {', '.join(e['leaves'])}.",
    "stalled": lambda e: f"The run stalled: {e['problem']}.",
    "profile": lambda e: f"Traced steps {e['first']:,} to {e['last']:,}.",
    "sink_failed": lambda e: f"The sink {e['sink']} failed; training continued without it.",
    "finding": lambda e: f"{e['severity'].capitalize()}: {e['name'].replace('_', ' ')}: {e['evidence']}.",
    "stop": _stop,
}
