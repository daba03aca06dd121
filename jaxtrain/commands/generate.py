"""The command `jaxtrain generate`."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from jaxtrain.commands.model import Checkpoint, RunOptions, model_of, on_devices
from jaxtrain.fields import LocalPath, NotNegative, Positive, PositiveShare, Share
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.terminal import echo


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """Options of `jaxtrain generate`."""

    prompt: str = ""  # text to continue
    # file with a prompt, or a JSON object with "prompt" or "messages", on each line; - reads standard input
    prompts: Annotated[str, LocalPath("FILE")] | None = None
    num_tokens: Positive[int] = 256  # tokens to add
    batch_size: Positive[int] = 8  # prompts per batch
    temperature: NotNegative[float] = 0.8  # divides the logits; 0 takes the likeliest token
    top_k: Positive[int] | None = None  # draws among the k likeliest tokens; none draws among all
    # draws among the likeliest tokens that hold this share of the probability
    top_p: PositiveShare[float] = 1.0
    # draws among the tokens with at least this share of the probability of the likeliest
    min_p: Share[float] = 0.0
    repetition_penalty: Positive[float] = 1.0  # makes tokens of the context less likely; 1 changes nothing
    seed: NotNegative[int] = 0  # of the random numbers
    stop: tuple[str, ...] = ()  # strings that end the text, and are left out of it
    past_end: bool = False  # continues after the end-of-text token
    chat: bool = False  # applies the tokenizer's chat template; a prompt is the user's message
    stream: bool = False  # prints the text while it is generated, one prompt at a time
    step: Checkpoint | None = None  # checkpoint; best has the lowest validation loss; none takes the newest
    average: Positive[int] = 1  # newest checkpoints whose parameters are averaged
    json: bool = False  # print a JSON object for each prompt


def run_generate(options: GenerateOptions) -> int:
    """Continues a text, or each prompt of a file, with a trained model."""
    from jaxtrain.inference.generate import complete
    from jaxtrain.inference.load import load
    from jaxtrain.models.decode import Sampling, Timing
    from jaxtrain.runtime.processes import agree, is_lead

    if options.stream and options.json:
        raise ValueError("--stream prints text and --json objects: leave out one of them")
    records = _read_records(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    timing = Timing()
    with on_devices(options):
        source = {"model": model_of(options), "average": options.average, "store": options.data_store}
        model = load(options.run, options.step, **source)
        agree("the checkpoint", {"step": model.step}, remedy="the run must be on a file system that they share")
        completions = complete(
            model.model,
            model.params,
            model.tokenizer,
            _prompts(model, records, options.chat),
            options.num_tokens,
            batch_size=1 if options.stream else options.batch_size,
            seed=options.seed,
            sampling=sampling,
            stop=options.stop,
            stop_ids=() if options.past_end else model.stop_ids,
            on_text=(lambda _, text: _write(text)) if options.stream and is_lead() else None,
            timing=timing,
        )
        for record in records:
            if options.stream and is_lead():
                _write(record.get("prompt", "") if not options.chat else "")
            completion = next(completions)
            if is_lead():
                _show(options, record, completion)
    if is_lead():
        echo(timing, file=sys.stderr)
    return 0


def _read_records(options: GenerateOptions) -> list[dict[str, Any]]:
    from jaxtrain.inference.generate import read_prompts

    if options.prompts is None:
        return [{"prompt": options.prompt}]
    if options.prompt:
        raise ValueError("--prompt and --prompts are both given: leave out one of them")
    return read_prompts(options.prompts)


def _prompts(model: Any, records: list[dict[str, Any]], chat: bool) -> list[list[int]]:
    """Returns the token ids of each record, with or without the chat template."""
    if not chat:
        if any("prompt" not in record for record in records):
            raise ValueError("a prompt holds messages: give --chat, which applies the chat template")
        return [model.encode_prompt(record["prompt"]) for record in records]
    from jaxtrain.data.chat import read_template

    template = read_template(model.folder)
    chats = [record.get("messages") or [{"role": "user", "content": record["prompt"]}] for record in records]
    texts = [template.render(messages, add_generation_prompt=True) for messages in chats]
    return [model.tokenizer.encode_special(text).tolist() for text in texts]


def _show(options: GenerateOptions, record: dict[str, Any], completion: Any) -> None:
    if options.json:
        result = {"text": completion.text, "tokens": completion.num_tokens, "finish": completion.finish}
        echo(json.dumps(record | result, ensure_ascii=False), verbatim=True)
    elif options.stream:
        echo()
    else:
        text = completion.text if options.chat else record["prompt"] + completion.text
        echo(text, verbatim=True)


def _write(text: str) -> None:
    echo(text, end="", flush=True, verbatim=True)


COMMANDS = [
    Command("generate", GenerateOptions, run_generate, 'generate runs/first --prompt "def " --temperature 0.5'),
]
