"""Diagnostics of single steps: what is measured inside of the train step, and that measuring changes nothing."""

import pytest
from runs import change, train

from jaxtrain.monitoring.layers import DIAGNOSTICS
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.mesh import make_mesh
from jaxtrain.training import program


def test_sampled_steps_are_logged_and_others_leave_it_out(config, tmp_path):
    config = change(config, train={"log_every": 4, "diagnose_every": 5})
    train(config, tmp_path / "run")
    lines, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["steps"]) for line in lines] == [(4, 4), (5, 1), (8, 3), (10, 2), (11, 1)]
    assert [line["step"] for line in lines if "layer_grad_norm" in line] == [5, 10]
    for line in (lines[1], lines[3]):
        assert len(line["layer_grad_norm"]) == len(line["layer_update_ratio"]) == 2
        assert all(0 < value < 100 for value in (*line["layer_grad_norm"], *line["layer_update_ratio"]))
        assert 0 <= line["adam_frozen_share"] < 0.5


def test_diagnostics_change_no_bit_and_agree_on_all_meshes(config, tmp_path):
    looks, others = {}, {}
    for name, every, mesh in (("blind", None, {}), ("one", 3, {}), ("four", 3, {"data": 2, "fsdp": 2})):
        train(change(config, train={"diagnose_every": every}, mesh=mesh), tmp_path / name)
        lines, _ = read_metrics(tmp_path / name / "metrics.jsonl")
        looks[name] = {key: lines[8].get(key) for key in DIAGNOSTICS}
        clocks = ("tokens_per_second", "step_seconds", *DIAGNOSTICS)
        others[name] = [{k: v for k, v in line.items() if k not in clocks} for line in lines]
    assert others["one"] == others["blind"]
    for key in ("layer_grad_norm", "layer_update_ratio"):
        assert looks["four"][key] == pytest.approx(looks["one"][key], rel=1e-3)
    assert looks["four"]["adam_frozen_share"] == pytest.approx(looks["one"]["adam_frozen_share"], abs=1e-3)


def test_the_program_is_the_same_with_and_without_logged_diagnostics(config):
    """A separate program for logged steps would round differently, and diagnostics would change the run."""
    config = change(config, mesh={"data": 2, "fsdp": 2})
    mesh = make_mesh(config.mesh)
    programs = [program.make_program(change(config, train={"diagnose_every": n}), mesh, 257) for n in (None, 3)]
    texts = [p.train_step.lower(p.abstract_state, p.abstract_batch).as_text() for p in programs]
    assert texts[0] == texts[1]


def test_diagnose_every_may_change_on_resume(config, tmp_path):
    train(change(config, train={"stop_after": 4}), tmp_path / "run")
    train(change(config, train={"diagnose_every": 5}), tmp_path / "run")
    lines, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "layer_grad_norm" in line] == [5, 10]
