"""Fine-tuning: a warm start on completions, with frozen parameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same_bits, change, numbers, state_of, train

import jaxtrain
from jaxtrain.data.prepare.completions import prepare_completions
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.optim import clipped_adamw, decay_mask
from jaxtrain.training.batches import train_batches
from jaxtrain.training.exchange import export_model
from jaxtrain.training.frozen import freeze_updates, frozen_mask
from jaxtrain.training.run import open_run
from jaxtrain.trees import Absent

FROZEN = ("embedding", "layers/attention/*", "*norm/scale")


@pytest.fixture(scope="module")
def tuned(tiny_config, tmp_path_factory):
    """A base run, and the config of a run that tunes it on completions."""
    folder = tmp_path_factory.mktemp("tuning")
    tiny_config = change(tiny_config, model={"num_kv_heads": 2, "vocab_multiple": 2})
    train(change(tiny_config, train={"steps": 4}), folder / "base")
    records = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}"} for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    store = prepare_completions([str(folder / "a.jsonl")], folder / "store", validation_fraction=0.2)
    data = {"store": str(store.path), "mask_documents": True, "packing": "best_fit"}
    more = {"train": {"steps": 6, "init_from": str(folder / "base")}, "optim": {"frozen": FROZEN}}
    return folder / "base", change(tiny_config, data=data, **more)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def is_frozen(path):
    return path == "embedding" or path.startswith("layers/attention/") or path.endswith("norm/scale")


SHARDED = {"mesh": {"data": 1, "fsdp": 2}, "train": {"precision": "bfloat16"}}  # casts its masters in each layer


@pytest.mark.parametrize("more", [{}, pytest.param(SHARDED, marks=pytest.mark.slow)])
def test_frozen_parameters_keep_their_bits_and_have_no_state(tuned, more, tmp_path):
    base, config = tuned
    config = change(config, **more)
    train(config, tmp_path / "run")
    before, state = by_path(state_of(base).params), state_of(tmp_path / "run")
    for path, after in by_path(state.params).items():
        assert (before[path].tobytes() == after.tobytes()) == is_frozen(path), path
    held = [path for path in by_path(state.opt_state) if "/mu/" in path or "/nu/" in path]
    assert len(held) == 2 * sum(not is_frozen(path) for path in before)
    assert not any(is_frozen(path.partition("/mu/")[2] or path.partition("/nu/")[2]) for path in held)
    run = open_run(tmp_path / "run")
    batches = train_batches(run)
    for line in numbers(tmp_path / "run"):
        batch = batches.batch(line["step"] - 1)
        assert line["tokens"] == batch["where"].sum() < (batch["segment_ids"] > 0).sum()
    evaluation = [event for event in read_metrics(tmp_path / "run" / "metrics.jsonl")[1] if event["event"] == "eval"][
        -1
    ]
    assert evaluation["tokens"] == run.store.validation.num_labels
    assert "bits_per_byte" not in evaluation


def test_a_tuned_run_resumes_with_its_choice_only(tuned, tmp_path):
    _, config = tuned
    train(config, tmp_path / "whole")
    train(change(config, train={"stop_after": 3}), tmp_path / "parts")
    with pytest.raises(ValueError, match=r"optim\.frozen: .*'embedding'.* -> \[\]"):
        train(change(config, optim={"frozen": ()}), tmp_path / "parts", allow_change=True)
    train(config, tmp_path / "parts")
    assert_same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_lora_trains_its_matrices_and_loads_as_a_plain_model(tuned, tmp_path):
    """On one device and on four. A loaded and an exported model is merged."""
    base, config = tuned
    config = change(config, model={"lora_rank": 2, "lora_targets": ("query", "out", "up", "down")})
    config = change(config, optim={"frozen": (), "peak_lr": 0.02, "warmup_steps": 1})
    train(config, tmp_path / "whole")
    before, state = by_path(state_of(base).params), state_of(tmp_path / "whole")
    after = by_path(state.params)
    assert {path for path in after if "_lora/" not in path} == set(before)
    assert all(before[path].tobytes() == after[path].tobytes() for path in before)
    moments = [path for path in by_path(state.opt_state) if "/mu/" in path or "/nu/" in path]
    assert len(moments) == 2 * (len(after) - len(before)) == 16
    train(change(config, mesh={"data": 1, "fsdp": 2, "tensor": 2}), tmp_path / "sharded")
    for one, four in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "sharded"), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3)

    model = jaxtrain.load(tmp_path / "whole")
    assert set(by_path(model.params)) == set(before)
    run, tokens = open_run(tmp_path / "whole"), np.arange(12)[None]
    np.testing.assert_allclose(model.logits(tokens), run.program.model.logits(state.params, tokens), atol=1e-5)
    assert not np.allclose(model.logits(tokens), jaxtrain.load(base).logits(tokens), atol=1e-3)
    export_model(run, tmp_path / "hf")
    np.testing.assert_array_equal(jaxtrain.load(tmp_path / "hf").logits(tokens), model.logits(tokens))
    for init_from, message in (
        (None, "model.lora_rank trains additions to given weights: give them with train.init_from"),
        (str(tmp_path / "whole"), "that run has LoRA matrices: `jaxtrain export` merges them"),
    ):
        with pytest.raises(ValueError, match=message):
            train(change(config, train={"init_from": init_from}), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("embeding",), "optim.frozen: 'embeding' matches no parameter: did you mean embedding?"),
        (("head", "layer/*"), "'layer/*' matches no parameter"),
        (("*",), "optim.frozen * matches every parameter: leave one to train"),
        (("!head", "head"), "optim.frozen !head head matches every parameter"),
    ],
)
def test_patterns_that_do_not_fit(tuned, patterns, message, tmp_path):
    _, config = tuned
    with pytest.raises(ValueError) as error:  # noqa: PT011
        train(change(config, optim={"frozen": patterns}), tmp_path / "run")
    assert message in str(error.value)


PARAMS = {
    "embedding": jnp.arange(6.0).reshape(3, 2),
    "layers": {"norm": {"scale": jnp.ones((2, 3))}, "up": jnp.full((2, 3, 4), 0.5)},
}


def test_a_frozen_optimizer_equals_one_of_the_other_parameters():
    """The clipped norm, the moments and the decay are those of the trained leaves; the layers stay a stack."""
    grads = jax.tree.map(lambda p: 3 * p + 1, PARAMS)
    whole = freeze_updates(clipped_adamw(0.1), ("embedding", "layers/norm/*"))
    alone = clipped_adamw(0.1, mask={"up": True})
    state, expected = whole.init(PARAMS), alone.init({"up": PARAMS["layers"]["up"]})
    for _ in range(2):
        updates, state = whole.update(grads, state, PARAMS)
        other, expected = alone.update({"up": grads["layers"]["up"]}, expected, {"up": PARAMS["layers"]["up"]})
    np.testing.assert_array_equal(updates["layers"]["up"], other["up"])
    assert not updates["embedding"].any()
    assert not updates["layers"]["norm"]["scale"].any()
    assert frozen_mask(PARAMS, ("!layers/up",)) == {"embedding": True, "layers": {"norm": {"scale": True}, "up": False}}


def test_the_decay_mask_knows_absent_parameters():
    """Without the norm, the biases of a stack would look like matrices."""
    params = {"layers": {"norm": {"scale": jnp.ones((2, 3))}, "gate": jnp.ones((2, 3)), "up": jnp.ones((2, 3, 4))}}
    mask = decay_mask(params)
    assert mask["layers"] == {"norm": {"scale": False}, "gate": False, "up": True}
    del params["layers"]["norm"]
    with pytest.raises(ValueError, match="may be a matrix, or a vector"):
        decay_mask(params)
    params["layers"]["norm"] = {"scale": Absent((2, 3))}
    assert jax.tree.leaves(decay_mask(params)) == [False, True]
