"""Adapter for lm-evaluation-harness, checked against the harness' own model on the same folder of transformers."""

import json
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, run, user_environment

pytestmark = pytest.mark.filterwarnings("default")

TEXTS = [f"{a} + {b} = {a + b}. The cat sat on mat {a}." for a in range(6) for b in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of transformers with a small random Llama, and its tokenizer."""
    pytest.importorskip("lm_eval")
    from jaxtrain.config import family
    from jaxtrain.data.tokenizer import train_bpe
    from jaxtrain.models.hf.write import write_model
    from jaxtrain.models.model import TransformerModel

    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_bpe(TEXTS * 3, 280)
    config = family(
        "llama", num_layers=2, num_heads=2, d_model=32, d_ff=48, max_seq_len=64, vocab_size=tokenizer.vocab_size
    )
    params = jax.tree.map(lambda leaf: leaf * 4, TransformerModel(config).init(jax.random.key(1)))
    ids = {"eos_token_id": tokenizer.eot_id, "bos_token_id": tokenizer.eot_id}
    write_model(folder, config, params, more=ids)
    tokenizer.save(folder)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"pad_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@pytest.mark.slow
def test_the_harness_gets_the_numbers_of_transformers(folder, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from jaxtrain.inference.lm_eval import harness_model

    ours, theirs = harness_model(folder, batch_size=4), HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    pairs = [(text[:9], text[9:]) for text in TEXTS] + [("", TEXTS[0]), ("The cat sat on mat. " * 30, "sat on mat")]
    for got, expected in zip(
        ours.loglikelihood(requests("loglikelihood", pairs)),
        theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
        strict=True,
    ):
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-4)
        assert got[1] == expected[1]
    whole = [(" ".join(TEXTS[:n]),) for n in (1, 3, 10)]
    rolling = ours.loglikelihood_rolling(requests("loglikelihood_rolling", whole))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", whole), disable_tqdm=True)
    np.testing.assert_allclose(rolling, expected, rtol=1e-4)
    until = [(text[:12], {"until": [".", "cat"], "max_gen_toks": 12, "do_sample": False}) for text in TEXTS[:7]]
    until += [("The", {"until": ["\n\n"], "max_gen_toks": 5})]
    assert ours.generate_until(requests("generate_until", until)) == theirs.generate_until(
        requests("generate_until", until), disable_tqdm=True
    )
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"q": text[:9], "a": [text[9:20], " no", " cats"], "gold": 0}) + "\n" for text in TEXTS)
    )
    (tmp_path / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{a}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = [
        lm_eval.simple_evaluate(model, tasks=["sums"], task_manager=tasks, bootstrap_iters=0)["results"]["sums"]
        for model in (ours, theirs)
    ]
    assert found[0]["acc,none"] == found[1]["acc,none"]
    assert found[0]["acc_norm,none"] == found[1]["acc_norm,none"]
    for model in (["jaxtrain", "--model_args", f"pretrained={folder}"], ["hf", "--model_args", f"pretrained={folder}"]):
        where = tmp_path / model[0]
        options = ["--tasks", "sums", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "4"]
        command = [sys.executable, "-m", "jaxtrain.inference.lm_eval", "run", "--model", *model, *options]
        run([*command, "--output_path", str(where)], environment=user_environment(PYTHONPATH=str(ROOT)), timeout=600)
        (results,) = where.rglob("results_*.json")
        assert json.loads(results.read_text())["results"]["sums"]["acc,none"] == found[0]["acc,none"]


def test_a_score_does_not_depend_on_its_batch_and_follows_the_logits(run_dir):
    pytest.importorskip("lm_eval")
    import jaxtrain
    from jaxtrain.inference.lm_eval import harness_model

    model = jaxtrain.load(run_dir)
    harness = harness_model(model, batch_size=3)
    pairs = [("1 + 2", " = 3"), ("", "3"), ("2 + 2 = 4 and more", " x"), ("a", "b")]
    found = harness.loglikelihood(requests("loglikelihood", pairs))
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = [256, *model.tokenizer.encode(context + continuation).tolist()][-17:]
        logits = np.asarray(jax.nn.log_softmax(model.logits([np.pad(ids[:-1], (0, 17 - len(ids)))])))[0]
        scores = [logits[i, token] for i, token in enumerate(ids[1:])][-len(continuation) :]
        np.testing.assert_allclose(score, sum(scores), rtol=1e-4)
        assert greedy == all(logits[i].argmax() == t for i, t in list(enumerate(ids[1:]))[-len(continuation) :])
    rolling = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [("1 + 2 = 3\n" * 4,)]))
    assert rolling[0] < 0
    until = [("1 + 2", {"until": ["\n"], "max_gen_toks": 4})]
    (text,) = harness.generate_until(requests("generate_until", until))
    assert text == model.generate("1 + 2", 4, temperature=0, stop=["\n"])
    arguments = f"pretrained={run_dir},step={model.step},max_gen_toks=4"
    for batch_size in ("auto", "2", 1):  # as the command line passes it
        other = type(harness).create_from_arg_string(arguments, {"batch_size": batch_size, "device": "cpu"})
        assert other.loglikelihood(requests("loglikelihood", pairs[:1]))[0][0] == pytest.approx(found[0][0], rel=1e-4)
