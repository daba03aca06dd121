"""Findings: each is provoked by a real short run, and healthy runs stay silent."""

import dataclasses
import functools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from runs import QUICK, Faults, change, train

from jaxtrain.cli import main
from jaxtrain.config import DataConfig, MeshConfig
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.monitoring.health import Health, diagnose
from jaxtrain.monitoring.metrics import EVENT_KEYS, read_metrics
from jaxtrain.monitoring.rules import RULES, RunFacts
from jaxtrain.optim import clipped_adamw
from jaxtrain.runtime.config_files import load_config
from jaxtrain.training import program
from jaxtrain.training.train import GAVE_UP

ROOT = Path(__file__).parents[2]


def findings(folder):
    """Returns the finding events of a run by name; each was reported once."""
    events = [event for event in read_metrics(folder / "metrics.jsonl")[1] if event["event"] == "finding"]
    by_name = {event["name"]: event for event in events}
    assert len(by_name) == len(events), events
    return by_name


@pytest.fixture
def run():
    """Trains; returns the findings."""

    def start(config, folder, **options):
        train(config, folder, **options)
        return findings(folder)

    return start


def with_init(function):
    """Hooks of a run with other first parameters."""

    def make_program(*arguments, **options):
        program = QUICK.make_program(*arguments, **options)

        def init_state():
            state = program.init_state()
            return state.replace(params=function(state.params))

        return program._replace(init_state=init_state)

    return QUICK._replace(make_program=make_program)


@dataclasses.dataclass(frozen=True)
class Altered:
    """Batches with other contents."""

    batches: Any
    function: Callable

    @property
    def batch_size(self):
        return self.batches.batch_size

    def rows(self, index, start, stop):
        batch = self.batches.rows(index, start, stop)
        return batch | self.function(batch)


def with_batches(function):
    """Hooks of a run with other batches: `function(batch)` returns the arrays that differ."""
    return QUICK._replace(wrap_batches=lambda batches: Altered(batches, function))


# Healthy runs.


def test_a_healthy_tiny_run_is_silent(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    train(change(tiny_config, train={"steps": 150, "diagnose_every": 10}), folder, report=True)
    assert findings(folder) == {}
    printed = capsys.readouterr().out
    assert "warning:" not in printed
    lines, events = read_metrics(folder / "metrics.jsonl")
    assert diagnose(lines, events, load_config(folder / "config.json")) == []
    assert "No findings." in (folder / "report.html").read_text()


@pytest.mark.slow  # quick sibling: tests/test_quickstart.py
def test_the_quickstart_is_silent(run, tmp_path):
    """The model, optimizer and schedule of the quickstart, on source code."""
    prepare([str(ROOT / "jaxtrain" / "**" / "*.py")], tmp_path / "store", validation_fraction=0.1, progress=False)
    config = load_config(ROOT / "configs" / "quickstart.py")
    config = dataclasses.replace(config, data=DataConfig(store=str(tmp_path / "store")), mesh=MeshConfig(data=1))
    settings = {"steps": 160, "batch_size": 2, "log_every": 1, "diagnose_every": 10, "eval_every": None}
    config = change(config, train=settings | {"sample_tokens": None})
    assert run(config, tmp_path / "run") == {}


def test_a_healthy_float16_run_is_silent(run, config, tmp_path):
    """The first overflows of loss scaling are no fault."""
    config = change(config, train={"precision": "float16", "stop_after": 60}, loss_scale={"initial": 2.0**24})
    assert run(config, tmp_path / "run") == {}
    skipped = [line["skipped"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]]
    assert sum(skipped) > 0


# Runs with something wrong.


@pytest.mark.parametrize(("clip_norm", "evidence"), [(0.1, "100 of the last 100"), (0.003, "51 steps in a row")])
def test_clipping_saturated(run, config, tmp_path, clip_norm, evidence):
    """Thresholds far below the norms; the second brings gradients near Adam's eps."""
    config = change(config, train={"stop_after": 105}, optim={"clip_norm": clip_norm})
    found = run(config, tmp_path / "run")
    assert found.keys() == {"clipping_saturated"}
    assert found["clipping_saturated"]["evidence"].startswith(evidence)
    assert "optim.peak_lr" in found["clipping_saturated"]["remedy"]


def test_adaptive_clipping_is_no_saturation(run, config, tmp_path):
    config = change(config, optim={"clipping": "adaptive", "clip_norm": 0.01}, train={"stop_after": 105})
    assert run(config, tmp_path / "run") == {}
    assert all(line["clip_factor"] < 1 for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[0])


def test_adam_frozen(run, config, tmp_path):
    found = run(change(config, optim={"eps": 0.1}), tmp_path / "run")
    assert found.keys() == {"adam_frozen"}
    assert found["adam_frozen"]["step"] == 10
    assert found["adam_frozen"]["evidence"].endswith("for 100% of the parameters")


def test_exploding_layer_by_its_updates(run, config, tmp_path):
    found = run(change(config, optim={"peak_lr": 1.0, "weight_decay": 0.5}), tmp_path / "run")
    assert "exploding_layer" in found
    assert "of its norm" in found["exploding_layer"]["evidence"]


def test_exploding_layer_by_its_gradient(run, config, tmp_path):
    """Scales the weights of a layer down and its norms up: the same function, another gradient."""

    def shift(params):
        layers = params["layers"]
        for block, names in (("attention", ("query", "key", "value")), ("feed_forward", ("gate", "up"))):
            layers[f"{block}_norm"]["scale"] = layers[f"{block}_norm"]["scale"].at[1].multiply(1e4)
            for name in names:
                layers[block][name]["kernel"] = layers[block][name]["kernel"].at[1].multiply(1e-4)
        return params

    config = change(
        config, model={"num_layers": 3}, optim={"peak_lr": 1e-9}, train={"diagnose_every": 1, "stop_after": 5}
    )
    found = run(config, tmp_path / "run", hooks=with_init(shift))
    assert found["exploding_layer"]["evidence"].startswith("layer 1: grad_norm ")


def test_dead_layer(run, config, tmp_path):
    hooks = with_init(lambda params: params | {"layers": jax.tree.map(lambda x: x.at[1].set(0), params["layers"])})
    found = run(config, tmp_path / "run", hooks=hooks)
    assert found.keys() == {"dead_layer"}
    assert found["dead_layer"]["evidence"].startswith("layer 1: grad_norm 0,")


def test_initial_loss(run, config, tmp_path):
    hooks = with_init(lambda params: params | {"head": 30 * params["head"]})
    found = run(config, tmp_path / "run", hooks=hooks)
    assert found["initial_loss"]["step"] == 1
    assert "ln 257 = 5.549" in found["initial_loss"]["evidence"]


def test_label_leak(run, config, tmp_path):
    """A model predicts random letters only if its labels leak."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(random.Random(i).choices("abcdefgh", k=4000)))
    prepare([str(folder)], tmp_path / "store", validation_fraction=0.2, progress=False)
    config = change(config, data={"store": str(tmp_path / "store")}, train={"stop_after": 200})
    found = run(config, tmp_path / "run", hooks=with_batches(lambda batch: {"labels": batch["inputs"]}))
    assert "tokens not seen before" in found["label_leak"]["evidence"]


@pytest.mark.parametrize(("bits", "expected"), [(0.19, ["label_leak"]), (0.21, [])])
def test_held_out_text_has_an_entropy_floor(tiny_config, bits, expected):
    found = Health(RunFacts(tiny_config)).observe_evaluation({"step": 7, "bits_per_byte": bits})
    assert [finding.name for finding in found] == expected


def test_learning_rate_zero(run, config, tmp_path):
    """A rate below the smallest float32."""
    found = run(change(config, optim={"peak_lr": 1e-46}), tmp_path / "run")
    assert found.keys() == {"learning_rate_zero"}
    assert found["learning_rate_zero"]["evidence"] == "0 in 3 steps, with 297 to go"


def test_a_schedule_may_end_at_zero(run, config, tmp_path):
    config = change(
        config,
        optim={"schedule": "sgdr", "cycles": 5, "floor": 0.0, "warmup_steps": 0},
        train={"steps": 10, "stop_after": None},
    )
    assert run(config, tmp_path / "run") == {}
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0][-1]["learning_rate"] == 0


def test_no_progress_without_tokens(run, config, tmp_path):
    hooks = with_batches(lambda batch: {"where": batch["where"] & False})
    found = run(change(config, train={"stop_after": 5}), tmp_path / "run", hooks=hooks)
    assert found.keys() == {"no_progress"}
    assert found["no_progress"]["step"] == 3
    assert found["no_progress"]["evidence"] == "3 batches in a row have no token that counts"


def test_no_progress_when_nothing_changes(run, config, tmp_path):
    """Identical windows, and a learning rate too small to move any parameter."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("1", "2", "3", "4"):
        (folder / f"{name}.txt").write_text("a" * 50_000)
    prepare([str(folder)], tmp_path / "store", validation_fraction=0.4, progress=False)
    config = change(config, data={"store": str(tmp_path / "store")}, optim={"peak_lr": 1e-20})
    found = run(config, tmp_path / "run")
    assert found["no_progress"]["evidence"].endswith("bit for bit, in 10 steps")


def test_throughput_dropping(tiny_config):
    """A logged step takes 15 s, and from step 31 on 30 s."""
    health, found = Health(RunFacts(tiny_config)), {}
    for step in range(1, 61):
        seconds = 15.0 if step <= 30 else 30.0
        line = {"step": step, "attempt": 1, "tokens_per_second": 128 / seconds, "step_seconds": seconds}
        found |= {finding.name: finding for finding in health.observe(line)}
    assert found.keys() == {"throughput_dropping"}
    assert "50% of 9 before" in found["throughput_dropping"].evidence


def test_update_norm_rising(run, config, tmp_path):
    """One unclipped gradient, 10,000 times as large, inflates many updates before the loss rises."""
    config = change(config, optim={"b2": 0.999, "clip_norm": 1e9}, guard={"sigmas": None}, train={"stop_after": 130})
    found = run(config, tmp_path / "run", faults=Faults(gradient_step=120))
    assert found["update_norm_rising"]["step"] == 122
    assert "has not risen yet" in found["update_norm_rising"]["evidence"]


def test_spikes_clipped_are_fine(run, config, tmp_path):
    config = change(config, optim={"b2": 0.999}, guard={"sigmas": None}, train={"stop_after": 110})
    found = run(config, tmp_path / "run", faults=Faults(gradient_step=105))
    assert found.keys() == {"spikes_caught"}
    assert found["spikes_caught"]["severity"] == "info"
    assert "was clipped by a factor" in found["spikes_caught"]["evidence"]


def test_spikes_skipped_are_fine(run, config, tmp_path):
    config = change(config, guard={"window": 8})
    found = run(config, tmp_path / "run", faults=Faults(gradient_step=9))
    assert found.keys() == {"spikes_caught"}
    assert "a step was skipped because its gradient norm stood out" in found["spikes_caught"]["evidence"]


def test_a_skipped_nan_is_a_warning(run, config, tmp_path):
    found = run(change(config, guard={"window": 8}), tmp_path / "run", faults=Faults(nan_loss_step=6))
    assert found.keys() == {"skipped_steps"}
    assert found["skipped_steps"]["severity"] == "warning"
    assert found["skipped_steps"]["evidence"] == (
        "1 of the last 6 steps skipped, this one because its loss or gradient was not finite"
    )


def test_too_many_bad_steps(config, tmp_path):
    """A spike that does not end."""
    config = change(config, train={"stop_after": 40}, guard={"window": 8})
    faults = Faults(spike_step=9, spike_factor=100.0)
    assert train(config, tmp_path / "run", faults=faults)["reason"] == GAVE_UP
    found = findings(tmp_path / "run")
    assert found.keys() == {"spikes_caught", "skipped_steps", "too_many_bad_steps"}
    assert found["skipped_steps"]["step"] == 11
    assert (found["too_many_bad_steps"]["severity"], found["too_many_bad_steps"]["step"]) == ("error", 19)


def test_non_finite_loss_that_was_applied(run, config, tmp_path):
    """An optimizer that skips nothing."""
    unguarded = functools.partial(program.make_program, optimizer=clipped_adamw(1e-2))
    with pytest.raises(ValueError, match="the state of step 11 is not finite and is not saved"):
        run(config, tmp_path / "run", faults=Faults(nan_loss_step=6), hooks=QUICK._replace(make_program=unguarded))
    _, events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = {event["name"]: event for event in events if event["event"] == "finding"}
    assert (found["non_finite"]["severity"], found["non_finite"]["step"]) == ("error", 6)
    assert found["non_finite"]["evidence"] == "loss is nan and grad_norm is nan, and the step was applied"


def test_float16_overflow(run, config, tmp_path):
    hooks = with_init(lambda params: params | {"embedding": 1e8 * params["embedding"]})
    config = change(config, train={"precision": "float16"}, loss_scale={"initial": 2.0**24})
    found = run(config, tmp_path / "run", hooks=hooks)
    assert (found["float16_overflow"]["severity"], found["float16_overflow"]["step"]) == ("error", 1)
    assert "bfloat16" in found["float16_overflow"]["remedy"]


@pytest.mark.parametrize(
    "line",
    [
        {"loss": 2.0, "grad_norm": 2e6, "loss_scale": 1.0},
        {"loss": math.inf, "grad_norm": 1.0, "loss_scale": 1.0},
        {"loss": 2.0, "grad_norm": math.inf},
    ],
)
def test_float16_overflow_has_several_faces(tiny_config, line):
    facts = RunFacts(change(tiny_config, train={"precision": "float16"}))
    assert [finding.name for finding in Health(facts).observe({"step": 5} | line)] == ["float16_overflow"]
    line["grad_norm"], line["loss"], line["loss_scale"] = 9e5, 2.0, 1.0
    assert Health(facts).observe({"step": 5} | line) == []


def test_float16_overflow_by_its_skips(tiny_config):
    """Loss scaling that finds no scale."""
    health = Health(RunFacts(change(tiny_config, train={"precision": "float16"})))
    line = {"loss": 2.0, "grad_norm": math.inf, "loss_scale": 1.0, "skipped": 1.0, "skip_reason": 1.0}
    found = [finding for step in range(1, 40) for finding in health.observe({"step": step} | line)]
    assert [(finding.name, finding.step) for finding in found] == [("float16_overflow", 20)]


def test_remedies_name_existing_fields_and_flags(tiny_config):
    """Fields of the config, and flags of `jaxtrain train`."""
    text = " ".join(rule.remedy for rule in RULES)
    named = re.findall(r"\b([a-z_]+)\.([a-z][a-z_0-9-]*)", text)
    assert len(named) >= 20
    for section, field in named:
        assert hasattr(getattr(tiny_config, section), field.replace("-", "_")), f"{section}.{field}"
    assert set(re.findall(r"--([a-z-]+)(?!\S*\.)", text)) == {"rewind"}


def test_every_rule_has_a_run_that_provokes_it():
    """Each rule has its run here or in the table of test_rules.py."""
    text = Path(__file__).read_text() + Path(__file__).with_name("test_rules.py").read_text()
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names) >= 20
    for name in names:
        assert f'found["{name}"]' in text or f'{{"{name}"}}' in text or f'@sick("{name}"' in text, name


# Reports of findings.


def test_a_finding_is_printed_written_and_reported(config, tmp_path, capsys):
    folder = tmp_path / "run"
    config = change(config, optim={"eps": 0.1})
    train(config, folder, report=True)
    (event,) = findings(folder).values()
    printed = capsys.readouterr().out
    text = f"warning: adam_frozen at step 10: {event['evidence']}\n  {event['remedy']}\n"
    assert text in printed
    lines, events = read_metrics(folder / "metrics.jsonl")
    (finding,) = diagnose(lines, events, config)
    assert dataclasses.asdict(finding) == {k: v for k, v in event.items() if k not in EVENT_KEYS}
    without = [e for e in events if e["event"] != "finding"]  # the lines alone say the same
    assert diagnose(lines, without, config) == [finding]
    page = (folder / "report.html").read_text()
    assert page.index("<h2>Findings</h2>") < page.index("adam frozen") < page.index("<h2>Curves</h2>")
    assert event["remedy"] in page


def test_a_resumed_run_does_not_repeat_findings(run, config, tmp_path):
    config = change(config, optim={"clip_norm": 0.003})
    for stop_after in (55, 110):
        assert len(run(change(config, train={"stop_after": stop_after}), tmp_path / "run")) == 1
    assert findings(tmp_path / "run")["clipping_saturated"]["step"] == 51


def test_a_step_that_ran_twice_has_one_finding(config):
    event = {"event": "finding", "name": "no_progress", "severity": "warning", "step": 3, "evidence": "", "remedy": ""}
    assert len(diagnose([], [event, {**event}, event | {"step": 4}], config)) == 2


def test_command_line_reports_a_run_that_is_still_going(run, config, tmp_path, capsys):
    folder = tmp_path / "run"
    run(change(config, optim={"eps": 0.1}), folder)
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"{folder}: step 11 of 300, stopped\nwarning: adam_frozen at step 10: " in printed
    assert printed.endswith(f"report: {folder / 'report.html'}\n")
    assert (folder / "report.html").is_file()
    (folder / "report.html.tmp").mkdir()  # the page cannot be written: the findings are printed all the same
    assert main(["report", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == printed.rpartition("report: ")[0]
    assert "report.html.tmp" in err
    assert main(["report", str(folder / "checkpoints")]) == 2
    assert "config.json" in capsys.readouterr().err
