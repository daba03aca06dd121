"""Text from the model of a run that trains."""

import chex
import jax

from jaxtrain.inference.generate import complete
from jaxtrain.runtime.mesh import replicated
from jaxtrain.runtime.processes import compile_together
from jaxtrain.training.run import Run


def continue_text(run: Run, params: chex.ArrayTree, prompt: str, num_tokens: int, *, seed: int = 0) -> str:
    """Continues a text, as the beginning of a document, and returns the new text only.

    The parameters may be on any of the run's devices; one device per process computes.
    """
    if jax.process_count() > 1:  # shards of other processes arrive only by replication
        gather = jax.jit(lambda tree: tree, out_shardings=replicated(run.program.mesh))
        compile_together(gather, params)
        params = gather(params)
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    else:
        params = jax.device_put(params, run.program.mesh.devices.flat[0])
    (completion,) = complete(run.program.model, params, run.tokenizer, [prompt], num_tokens, seed=seed)
    return completion.text
