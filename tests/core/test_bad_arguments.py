"""Bad arguments of the functions that others import: a ValueError with the value, and what it may be."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import losses, schedules
from jaxtrain.config import MeshConfig, gpt2
from jaxtrain.data.loader import EvalBatches, TrainBatches, prefetched
from jaxtrain.data.order import permute
from jaxtrain.data.store import Split
from jaxtrain.data.tokenizer import ByteTokenizer, parse_spec
from jaxtrain.guard import skip_bad_steps
from jaxtrain.models.decode import Sampling
from jaxtrain.monitoring.plots import plot_schedule
from jaxtrain.optim import clipped_adamw, decay_mask
from jaxtrain.precision import Policy
from jaxtrain.runtime.mesh import check_batch, make_mesh, partition_spec
from jaxtrain.step import TrainState, make_train_step
from jaxtrain.training.evaluation import evaluate
from jaxtrain.training.replay import replay

LOGITS, LABELS = jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32)
HIDDEN, KERNEL = jnp.zeros((2, 3, 4)), jnp.zeros((4, 5))
PARAMS = {"w": jnp.ones((2, 2))}
SPLIT = Split((np.arange(100, dtype=np.uint16),), np.zeros(1, np.int64), 100)
BATCHES = TrainBatches(SPLIT, seed=0, batch_size=4, seq_len=4, vocab_size=100)
NAN, INF = math.nan, math.inf


def dense(logits=LOGITS, labels=LABELS, **options):
    return losses.cross_entropy(logits, labels, **options)


def fused(hidden=HIDDEN, kernel=KERNEL, labels=LABELS, **options):
    return losses.linear_cross_entropy(hidden, kernel, labels, **options)


def adamw(learning_rate=1e-3, **options):
    return clipped_adamw(learning_rate, **options)


def one_update(optimizer, **extra):
    return optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, **extra)


def sums(**changes):
    zero = jnp.float32(0)
    return lambda *_: losses.LossSums(**{"nll": zero, "z_loss": zero, "smoothing": zero, "weight": zero + 1} | changes)


def one_step(loss_fn=lambda params, batch: jnp.sum(params["w"]), accumulate=1, rows=4, x=None):
    step = make_train_step(loss_fn, optax.sgd(0.1), accumulate=accumulate)
    return step(TrainState.create(PARAMS, optax.sgd(0.1)), {"x": jnp.zeros((rows, 1)) if x is None else x})


ROWS = {
    "z_loss NaN": (lambda: dense(z_loss=NAN), "z_loss .*nan"),
    "z_loss negative": (lambda: dense(z_loss=-1.0), r"z_loss .*-1\.0"),
    "label smoothing 1": (lambda: dense(label_smoothing=1.0), r"label_smoothing .*1\.0"),
    "softcap NaN": (lambda: dense(logit_softcap=NAN), "logit_softcap .*nan"),
    "labels of another shape": (lambda: dense(labels=LABELS[:1]), r"\(2, 3, 5\) must be .*\(1, 3\)"),
    "labels that are floats": (
        lambda: dense(labels=LABELS.astype(jnp.float32)),
        "labels must be integers, got float32",
    ),
    "logits that are integers": (lambda: dense(LOGITS.astype(jnp.int32)), "must be floats .*int32"),
    "logits without classes": (
        lambda: dense(jnp.float32(0), jnp.int32(0)),
        r"must be floats \[\.\.\., V\].* got .*\(\)",
    ),
    "where of another shape": (lambda: dense(where=jnp.ones(3)), r"where \(3,\) must have the shape .*\(2, 3\)"),
    "where complex": (lambda: dense(where=jnp.ones((2, 3), jnp.complex64)), "where must be .*complex64"),
    "chunk of 0": (lambda: fused(chunk_size=0), "chunk_size .*0"),
    "kernel turned round": (lambda: fused(kernel=KERNEL.T), r"\(5, 4\)"),
    "more classes than columns": (lambda: fused(num_classes=9), "9"),
    "peak NaN": (lambda: schedules.warmup_cosine(NAN, 10, 1), "peak .*nan"),
    "peak infinite": (lambda: schedules.warmup_linear(INF, 10, 1), "peak .*inf"),
    "no steps": (lambda: schedules.warmup_cosine(1.0, 0, 0), "total_steps .*0"),
    "warm-up longer than all": (lambda: schedules.warmup_cosine(1.0, 10, 11), "warmup_steps .*11"),
    "warm-up negative": (lambda: schedules.warmup_constant(1.0, -1), "warmup_steps .*-1"),
    "floor above the peak": (lambda: schedules.warmup_cosine(1.0, 10, 1, 2.0), r"floor .*2\.0"),
    "decay longer than what is left": (lambda: schedules.warmup_stable_decay(1.0, 10, 5, 6), "decay_steps .*6"),
    "no cycles": (lambda: schedules.sgdr(1.0, 10, 1, 0), "cycles .*0"),
    "learning rate negative": (lambda: adamw(-1.0), r"learning_rate must be 0 or more.*-1\.0"),
    "learning rate a word": (lambda: adamw("fast"), "learning_rate must be 0 or more, or a schedule, got 'fast'"),
    "b2 NaN": (lambda: adamw(b2=NAN), r"b2 must be in \[0, 1\), got nan"),
    "eps 0": (lambda: adamw(eps=0.0), r"eps must be above 0, got 0\.0"),
    "weight decay NaN": (lambda: adamw(weight_decay=NAN), "weight_decay must be 0 or more, got nan"),
    "clip norm 0": (lambda: adamw(clip_norm=0.0), r"clip_norm .*0\.0"),
    "moments in integers": (lambda: adamw(mu_dtype=jnp.int32), "mu_dtype must be a float dtype"),
    "z_loss a NaN array": (lambda: fused(z_loss=jnp.float32(NAN)), "z_loss must be 0 or more, got nan"),
    "z_loss traced": (lambda: jax.jit(lambda z: dense(z_loss=z).nll)(1e-3), "z_loss must be a Python number.*traced"),
    "no classes": (lambda: dense(jnp.zeros((2, 3, 0))), r"V above 0, got float32 \(2, 3, 0\)"),
    "a kernel without columns": (lambda: fused(kernel=KERNEL[:, :0]), r"kernel \[D, V\], got .*\(4, 0\)"),
    "hidden states that are complex": (
        lambda: fused(HIDDEN.astype(jnp.complex64), KERNEL.astype(jnp.complex64)),
        "hidden must be floats .*complex64",
    ),
    "learning rates": (lambda: adamw(jnp.ones(2)), r"learning_rate must be one number, got .*\(2,\)"),
    "a schedule of vectors": (
        lambda: one_update(adamw(lambda step: jnp.ones(1))),
        r"the schedule returns shape \(1,\)",
    ),
    "a mask of words": (lambda: adamw(mask={"w": "no"}).init(PARAMS), "mask has 'no' at w: give one bool"),
    "a mask of masks": (lambda: adamw(mask={"w": np.ones(2, bool)}).init(PARAMS), "at w: give one bool"),
    "an injected mask": (
        lambda: optax.inject_hyperparams(clipped_adamw)(0.1, mask=decay_mask).init(PARAMS),
        r"static_args=\('mask',\)",
    ),
    "a traced window": (
        lambda: jax.eval_shape(
            optax.inject_hyperparams(functools.partial(skip_bad_steps, optax.sgd(0.1)))().init, PARAMS
        ),
        r'window must be a Python integer.*static_args=\("window",\)',
    ),
    "moments in a word": (lambda: adamw(mu_dtype="bf16"), "mu_dtype must be a float dtype, .* got 'bf16'"),
    "a loss for each row": (lambda: one_update(skip_bad_steps(optax.sgd(0.1)), loss=jnp.ones(3)), r"scalar.*\(3,\)"),
    "no micro-batch": (lambda: one_step(accumulate=0), "accumulate must be .* from 1 .* got 0"),
    "half a micro-batch": (lambda: one_step(accumulate=1.5), r"accumulate must be .* got 1\.5"),
    "a constant to split": (lambda: one_step(accumulate=2, x=1.0), r"leaf of shape \(\) cannot be split"),
    "losses that are not summed": (lambda: one_step(sums(nll=jnp.ones(4))), r"nll as .* an array of shape \(4,\)"),
    "a loss without a weight": (lambda: one_step(sums(weight=None)), "weight as NoneType, .* real scalar"),
    "a complex loss": (lambda: one_step(sums(nll=jnp.complex64(1))), "nll as complex64, .* real scalar"),
    "a word for a metric": (lambda: one_step(lambda *_: (sums()(), {"a": "x"})), "a as str, .* real scalar"),
    "rows that do not divide": (lambda: one_step(accumulate=3), "4 rows .* accumulate=3 .* change one of them"),
    "a mean for a loss": (lambda: one_step(), "loss_fn must return LossSums, sums over tokens"),
    "an unknown dtype": (lambda: Policy(compute="float8"), "compute is .*float8.*it can be float32"),
    "a word for a dtype": (lambda: Policy(compute="fast"), "compute is 'fast'; it can be float32"),
    "an order of nothing": (lambda: permute(np.arange(3), 0, (0, 0)), "size must be from 1 to .* got 0"),
    "an index past the end": (lambda: permute(np.array([5]), 3, (0, 0)), r"\[0, 3\), got 5"),
    "half an index": (lambda: permute(np.array([0.5]), 3, (0, 0)), "integers, got float64"),
    "batches of no rows": (lambda: TrainBatches(SPLIT, 0, 0, 4, 100), "1 or more, got 0 and 4"),
    "a window longer than the split": (lambda: TrainBatches(SPLIT, 0, 1, 100, 100), "101: lower seq_len or add text"),
    "rows that are not in the batch": (lambda: BATCHES.rows(0, 3, 9), r"\[3, 9\) are not in a batch of 4"),
    "a step before the first": (lambda: BATCHES.rows(-1, 0, 4), "count from 0, got -1"),
    "a batch past the split": (lambda: EvalBatches(SPLIT, 4, 4, 100).rows(99, 0, 4), "batch 99 is not among"),
    "a number of batches below 0": (
        lambda: evaluate(None, None, EvalBatches(SPLIT, 4, 4, 100), None, num_batches=-1),
        "num_batches must be a whole number from 1 .* got -1",
    ),
    "no prefetch": (lambda: prefetched(int, 0, 3, 0).__enter__(), "1 or more, got 0"),
    "tokens past the split": (lambda: SPLIT.read(90, 20), r"\[90, 110\) are not in a split of 100"),
    "a token that is no byte": (lambda: ByteTokenizer().decode([300]), "300"),
    "an unknown tokenizer": (lambda: parse_spec("words"), "'words': use byte"),
    "temperature NaN": (lambda: Sampling(temperature=NAN), "0 or more and finite, got nan"),
    "top_p NaN": (lambda: Sampling(top_p=NAN), r"\(0, 1\], got nan"),
    "more devices than there are": (lambda: make_mesh(MeshConfig(data=99)), "takes 99 devices, and there are 8"),
    "an axis twice": (lambda: partition_spec(("heads", "hidden")), "one dimension only"),
    "no micro-batches on a mesh": (
        lambda: check_batch(4, 0, make_mesh(MeshConfig(data=1))),
        "accumulate must be .* from 1 .* got 0",
    ),
    "heads that do not divide": (lambda: gpt2(num_heads=7), "num_heads 7: change one of them"),
    "a fraction of heads": (lambda: gpt2(num_heads=1.5), r"num_heads: expected int, got 1\.5"),
    "a schedule of no steps": (lambda: plot_schedule(lambda step: step, 0, "no.png"), "at least 1, got 0"),
    "no run to replay": (lambda: replay("nowhere", 1), "nowhere is no run directory"),
}


def test_wrong_kinds_of_optimizer_and_state_are_type_errors():
    for optimizer in (None, 0.1, optax.adam, {}):
        for use in (functools.partial(make_train_step, sums()), skip_bad_steps, lambda o: adamw(clip=o or {})):
            with pytest.raises(TypeError, match="must be an optax transformation, such as clipped_adamw"):
                use(optimizer)
    for options in ({"policy": "bfloat16"}, {"loss_scaling": True}):
        with pytest.raises(TypeError, match=r"must be a jaxtrain\.precision.* got"):
            make_train_step(sums(), optax.sgd(0.1), **options)
    with pytest.raises(TypeError, match=r"state is a .*, not a GuardState"):
        skip_bad_steps(optax.sgd(0.1)).update(PARAMS, optax.sgd(0.1).init(PARAMS), PARAMS)
    step = make_train_step(lambda params, batch: None, optax.sgd(0.1))
    for state in ({"w": jnp.zeros(2)}, (), None, jnp.zeros(2)):
        with pytest.raises(TypeError, match=r"takes a TrainState, got \w+: .* TrainState\.create\(params, optimizer\)"):
            step(state, {})


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 2)])
def test_an_auxiliary_metric_that_is_no_scalar_is_named(shape):
    def loss_fn(params, batch):
        return sums()(), {"accuracy": jnp.zeros(shape)}

    step = make_train_step(loss_fn, optax.sgd(0.1))
    state = TrainState.create({"w": jnp.zeros(2)}, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"accuracy as float32, an array of shape \(.*\).* a real scalar"):
        jax.eval_shape(step, state, {"x": jnp.zeros((2, 1))})


@pytest.mark.parametrize("name", ROWS)
def test_bad_arguments(name):
    function, message = ROWS[name]
    with pytest.raises(ValueError, match=message):
        function()
