"""Adapter for lm-evaluation-harness: a run, or a folder of transformers, as its model."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data.chat import read_template
from jaxtrain.inference.generate import complete
from jaxtrain.inference.load import TrainedModel, load
from jaxtrain.models.decode import Sampling, bucket
from jaxtrain.runtime.extras import import_extra


def harness_model(pretrained: str | Path | TrainedModel, step: Any = None, **options: Any) -> Any:
    """Returns a model for `lm_eval.simple_evaluate`; see `Harness` for the arguments.

    Raises:
      ValueError: no such run or folder.
      ImportError: no lm-eval.
    """
    return _harness_class()(pretrained, step, **options)


def main() -> None:
    """Runs the command line of the harness, which then has `--model jaxtrain`; `Harness` has its `--model_args`."""
    model = _harness_class()
    import lm_eval.models  # noqa: F401 - fills the registry with its own ones
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("jaxtrain")(model)
    cli_evaluate()


def _harness_class() -> type:
    base = import_extra("lm_eval.api.model", "lm-eval", "the harness needs the lm-eval package").TemplateLM
    return type("HarnessLM", (Harness, base), {})


class Harness:
    """Methods of the harness' `TemplateLM`, which `harness_model` mixes in.

    Requests run in batches of similar length. Lengths are padded to powers of two, so that few programs are compiled.

    Args:
      pretrained: a run directory or its URL, a folder of transformers, or a loaded model.
      step: checkpoint of a run, see `jaxtrain.load`.
      batch_size: requests per batch; "auto" takes 8.
      max_gen_toks: tokens to generate for a request that does not say.
      add_bos_token: puts the end-of-text token before every context. None does so for a run, whose documents begin
        with it, and not for a folder of transformers, as the harness' own "hf".
      device, max_batch_size: passed by the harness, and unused: JAX chooses the device.
    """

    def __init__(
        self,
        pretrained: str | Path | TrainedModel,
        step: Any = None,
        *,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        del device, max_batch_size
        self._model = pretrained if isinstance(pretrained, TrainedModel) else load(pretrained, step)
        self._batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self._max_gen_toks = max_gen_toks
        self._begins = not self._model.pretrained if add_bos_token is None else add_bos_token
        self._score = jax.jit(self._score_tokens)

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eot_id

    @property
    def max_length(self) -> int:
        return self._model.model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness caches requests."""
        return self._model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the token ids of a text; unless `add_special_tokens` is False, as the beginning of a document."""
        ids = self._model.tokenizer.encode(string).tolist()
        return [self.eot_token_id, *ids] if self._begins and add_special_tokens is not False else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation by the chat template of the run directory."""
        return read_template(self._model.folder).render(chat_history, add_generation_prompt=add_generation_prompt)

    def _score_tokens(self, params: Any, inputs_BT: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the log-probability of each label, and True where it is the likeliest token."""
        logits_BTV = self._model.logits_fn(params, inputs_BT)[..., : self._model.tokenizer.vocab_size]
        chosen_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
        return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1), logits_BTV.argmax(-1) == labels_BT

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        results: dict[int, tuple[float, bool]] = {}
        rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            longest = max(len(rows[index]) for index in batch) - 1
            length = min(bucket(max(longest, 1)), self.max_length)
            tokens = np.zeros((self._batch_size, length + 1), np.int32)
            for row, index in enumerate(batch):
                tokens[row, : len(rows[index])] = rows[index]
            scores, greedy = map(np.asarray, self._score(self._model.params, tokens[:, :-1], tokens[:, 1:]))
            for row, index in enumerate(batch):
                stop = len(rows[index]) - 1
                part = slice(max(stop - len(requests[index][2]), 0), stop)
                results[index] = float(scores[row, part].astype(np.float64).sum()), bool(greedy[row, part].all())
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return [results[index] for index in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text; long ones are cut into windows of the longest context."""
        del disable_tqdm
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that continues each context, up to the first of its stop strings."""
        del disable_tqdm
        texts: dict[int, str] = {}
        order = sorted(
            range(len(requests)), key=lambda index: (str(requests[index].args[1]), len(requests[index].args[0]))
        )
        for _, group in itertools.groupby(order, key=lambda index: str(requests[index].args[1])):
            indices = list(group)
            options = dict(requests[indices[0]].args[1])
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            number = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self._max_gen_toks)
            room = max(self.max_length - number, 1)
            made = complete(
                self._model.model,
                self._model.params,
                self._model.tokenizer,
                [(self.tok_encode(requests[index].args[0]) or [self.eot_token_id])[-room:] for index in indices],
                number,
                batch_size=self._batch_size,
                sampling=_sampling(options),
                stop=until,
                stop_ids=self._model.stop_ids,
            )
            for index, completion in zip(indices, made, strict=True):
                texts[index] = completion.text
                self.cache_hook.add_partial("generate_until", requests[index].args, completion.text)
        return [texts[index] for index in range(len(requests))]


def _sampling(options: dict[str, Any]) -> Sampling:
    """Reads the arguments of a request; without `do_sample` or a temperature it is greedy."""
    temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    return Sampling(temperature, options.get("top_k") or None, options.get("top_p") or 1.0, options.get("min_p") or 0.0)


if __name__ == "__main__":
    main()
