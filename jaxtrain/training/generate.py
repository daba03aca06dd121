"""Text from the model of a run."""

import chex
import jax
import numpy as np

from jaxtrain.models.decode import Sampling, generate
from jaxtrain.runtime.mesh import replicated
from jaxtrain.runtime.processes import compile_together
from jaxtrain.training.run import Run


def continue_text(
    run: Run,
    params: chex.ArrayTree,
    prompt: str,
    num_tokens: int,
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    stop: bool = True,
) -> str:
    """Continues a text, as the beginning of a document, and returns the new text only.

    Args:
      run: the run whose model and tokenizer are used.
      params: the model's parameters, on any of the run's devices. One device per process computes.
      prompt: the text to continue; may be empty.
      num_tokens, seed, sampling: see `decode.generate`.
      stop: ends at the end-of-text token.
    """
    tokenizer = run.tokenizer
    tokens = np.concatenate([[tokenizer.eot_id], tokenizer.encode(prompt)])
    if jax.process_count() > 1:  # shards of other processes arrive only by replication
        gather = jax.jit(lambda tree: tree, out_shardings=replicated(run.program.mesh))
        compile_together(gather, params)
        params = gather(params)
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    else:
        params = jax.device_put(params, run.program.mesh.devices.flat[0])
    new = generate(
        run.program.model,
        params,
        [tokens],
        num_tokens,
        seed=seed,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        stop_ids=(tokenizer.eot_id,) if stop else (),
    )[0]
    if stop and new[-1] == tokenizer.eot_id:
        new = new[:-1]
    return tokenizer.continuation(tokens[1:], new)
