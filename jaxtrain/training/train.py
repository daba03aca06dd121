"""The training loop: config -> data, mesh, state (fresh or restored) -> steps, with records, evaluation and saves.

Nothing here knows how a layer, a schedule or a file format works. How a run starts, in this order:

  1. its folder has a checkpoint: the newest that is whole is restored, and the run goes on as if it had never stopped
  2. otherwise: fresh parameters from the seed, or the weights of the run that `train.init_from` names

Under several processes each runs all of this on its own part of the batch and of the state; process 0 alone prepares
data and writes records, and before each part they agree that they are about to do the same.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtrain import __version__
from jaxtrain.checkpoints import warm_start
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import Config
from jaxtrain.data.loader import Prefetcher
from jaxtrain.data.store import TokenStore
from jaxtrain.models.model import flops_per_token
from jaxtrain.monitoring.metrics import PackedMetrics
from jaxtrain.monitoring.profile import Profiler, named_as_now, parse_profile, steps_left
from jaxtrain.monitoring.recorder import Recorder, open_recorder
from jaxtrain.monitoring.rules import RunFacts
from jaxtrain.optim import decay_mask, decay_report
from jaxtrain.runtime import processes
from jaxtrain.runtime.chips import peak_flops
from jaxtrain.runtime.stop import Stop, Stopped
from jaxtrain.step import TrainState
from jaxtrain.training import components
from jaxtrain.training.double_check import ReplayChecked, ReplayMismatch
from jaxtrain.training.evaluate import compressor_bits_per_byte, evaluate_split, split_text
from jaxtrain.training.folder import claim, has_begun, held, restored_if_refused, write_config
from jaxtrain.training.generate import continue_text
from jaxtrain.training.run import (
    NO_HOOKS,
    Hooks,
    Run,
    assemble,
    batch_source,
    fingerprint,
    start_table,
    tokenizer_hash,
    train_batches,
)
from jaxtrain.training.start import check_past

# Compressing a large split for comparison would take minutes.
_COMPRESS_LIMIT = 16 * 2**20

GAVE_UP = "too many bad steps"  # the guard's limits, see `Config.guard`


def train(
    config: Config,
    run_dir: str | Path,
    *,
    rewind: int | None = None,
    profile: str | None = None,
    hooks: Hooks = NO_HOOKS,
) -> dict[str, Any]:
    """Trains, or goes on training, the run in a folder.

    Args:
      config: the run. Where the folder has one already it must say the same, but for fields such as `log_every` that
        change no number of the run.
      run_dir: holds config.json, metrics.jsonl, checkpoints/, and at the end report.html, report.png and sample.txt.
      rewind: resume from the checkpoint of this step and set aside the later ones; None resumes from the newest.
      profile: `START:STOP`, steps (counted from 1, without STOP) to trace into RUN/profile; None traces none.
      hooks: replaces parts of the run.

    Returns:
      The `stop` event: `step`, `reason` ("finished", "stop_after", a signal's name, or GAVE_UP) and, of a finished run,
      the last evaluation.

    Raises:
      ValueError: a config, store or checkpoint that does not fit, with the remedy, or processes that disagree on them.
    """
    folder, rule = Path(run_dir), config.checkpoint
    traced = parse_profile(profile, config.train)
    with contextlib.ExitStack() as stack:
        with restored_if_refused(folder) if processes.is_lead() else contextlib.nullcontext():
            run = assemble(config, folder, _data(config, folder, stack), hooks)
            train_batches(run)  # which may find the text too short
        stop = stack.enter_context(Stop().listen())
        recorder = stack.enter_context(_open_recorder(run))
        checkpoints = CheckpointFolder(
            folder / "checkpoints",
            keep=rule.keep,
            keep_every=rule.keep_every,
            keep_best=rule.keep_best,
            report=recorder.event,
        )
        saver = stack.enter_context(hooks.make_saver(checkpoints))
        recorder.table(f"jaxtrain: {folder}", start_table(run))
        recorder.say(decay_report(run.program.abstract_state.params, decay_mask))
        try:
            state = _start(run, checkpoints, recorder, stop, rewind)
            if processes.is_lead():
                write_config(folder, config)
            state, outcome = _loop(run, state, checkpoints, saver, recorder, stop, traced)
            if outcome["reason"] == "finished":
                outcome |= _finish(run, state, checkpoints, recorder, stop)
        except Stopped:  # while it made no steps: all there were are saved
            outcome = {"step": checkpoints.latest_step() or 0, "reason": stop.reason}
        recorder.stop(outcome)
        if processes.is_lead():
            try:
                recorder.say(f"report: {hooks.write_report(folder)}")
            except (ImportError, ValueError) as error:  # no matplotlib, or not one step logged: the run is no worse
                recorder.say(f"no report: {error}")
    return outcome


def _open_recorder(run: Run) -> Recorder:
    settings, program = run.config.train, run.program
    peak = peak_flops(program.mesh.devices.flat[0].device_kind, settings.precision)
    flops = flops_per_token(program.model, settings.seq_len)
    return open_recorder(
        run.folder,
        RunFacts(run.config, program.vocab_size, run.store.train.num_tokens),
        flops_per_step=flops and flops * settings.batch_size * settings.seq_len,
        peak_flops=peak and peak * program.mesh.size,
    )


def _data(config: Config, folder: Path, stack: contextlib.ExitStack) -> TokenStore:
    """Opens the run's data, after process 0 has taken its folder (given back by `stack`) and, if need be, made them."""
    processes.agree(
        "the run",
        dataclasses.asdict(config) | {"jax": jax.__version__, "jaxtrain": __version__},
        remedy="start them with the same command and the same versions",
    )

    def begin() -> None:
        if config.train.init_from and not has_begun(folder):
            warm_start.find(config.train.init_from, folder)
        stack.enter_context(held(folder))
        claim(folder, config)
        components.prepare_data(config, folder)

    processes.run_on_lead("prepare the data", begin)
    processes.agree(
        "the run directory",
        {"config.json": "there" if (folder / "config.json").exists() else "not there"},
        remedy="--run-dir must be on a file system that they share",
    )
    store = components.open_data(config, folder)
    processes.agree(
        "the data", {"fingerprint": store.fingerprint}, remedy="give each the same store, or one that they share"
    )
    return store


def _start(run: Run, checkpoints: CheckpointFolder, recorder: Recorder, stop: Stop, rewind: int | None) -> TrainState:
    about = {"skip": list(run.config.data.skip)} if run.config.data.skip else {}
    about |= {
        "jax": jax.__version__,
        "processes": jax.process_count(),
        "devices": run.program.mesh.size,
        "device": run.program.mesh.devices.flat[0].device_kind,
        "vocab_size": run.program.vocab_size,
        "train_tokens": run.store.train.num_tokens,
    }
    processes.agree(
        "the checkpoint to go on from",
        {"newest step": checkpoints.latest_step(), "rewind": rewind},
        remedy="--run-dir must be on a file system that they share, and the command the same",
    )
    processes.run_on_lead("tidy the checkpoints", checkpoints.clean)
    if rewind is not None:
        later = processes.broadcast_from_lead("rewind", lambda: checkpoints.rewind(rewind))
        text = f"rewinding to step {rewind}: set aside the checkpoints of steps {later}"
        recorder.event("rewind", text, step=rewind, set_aside=later)
    # Asked of process 0, which may have set aside what others still see.
    if processes.broadcast_from_lead("look for checkpoints", checkpoints.latest_step) is None:
        state, weights = _fresh(run, stop)
        recorder.event("start", "", step=0, attempt=recorder.attempt, **about)
        if weights:
            text = (
                f"starting from the weights of {weights['source']}, step {weights['source_step']}, with fresh moments"
            )
            recorder.event("init_from", text, **weights)
        return state
    state, saved = stop.run(lambda: restore(checkpoints, run.program.abstract_state, repair=True))
    step = int(state.step)
    for key, now in fingerprint(run).items():
        if key != "config" and saved[key] != now:
            raise ValueError(
                f"the checkpoint of step {step} was made with another {key}: {saved[key]}, and now it is {now}; "
                "go on with what the run was started with"
            )
    check_past(saved["config"]["data"].get("skip", ()), run.config.data.skip, step)
    recorder.event("resume", f"resumed from step {step}", step=step, attempt=recorder.attempt, **about)
    return state


def _fresh(run: Run, stop: Stop) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step: from the seed, or with another run's weights, and then which."""
    source = run.config.train.init_from
    state = stop.run(run.program.init_state)
    if not source:
        return state, {}
    like, tokenizer = run.program.abstract_state.params, tokenizer_hash(run.store)
    params, step = stop.run(lambda: warm_start.read(source, run.folder, like, tokenizer))
    return state.replace(params=params), {"source": source, "source_step": step}


def _loop(
    run: Run,
    state: TrainState,
    checkpoints: CheckpointFolder,
    saver: Saver,
    recorder: Recorder,
    stop: Stop,
    traced: range,
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the steps that are left; returns the last state and what the `stop` event says."""
    config = run.config.train
    first = int(state.step)
    traced = steps_left(traced, first, recorder.say)
    if first >= config.steps:
        return state, {"step": first, "reason": "finished"}
    if config.stop_after and config.stop_after <= first:  # the same command again, which would go on to the end
        return state, {"step": first, "reason": "stop_after"}
    fetch = batch_source(run)
    # Compiled here, once: a call that would need another program is an error rather than a silent recompilation.
    with named_as_now(traced):
        compiled = recorder.compile(
            lambda: stop.run(lambda: run.program.train_step.lower(state, fetch(first)).compile())
        )
    train_step = ReplayChecked(run.config, run.hooks.wrap_step(compiled), run.program.abstract_state)

    def evaluate(state: TrainState) -> None:
        with recorder.pause("evaluating"):
            result = _evaluate(run, state, recorder, stop, config.eval_batches)
        checkpoints.score(int(state.step), result["nll"])

    def last_saved() -> int | None:
        with contextlib.suppress(Exception):  # the step's own trouble is what is told
            saver.wait()
        return checkpoints.latest_step()

    done, reason, vote = first, "", processes.StopVote()
    # Where it is alone, a process that is asked to stop waits for no batch; several stop together, after a step.
    alone = jax.process_count() == 1
    interrupted = config.eval_every and first % config.eval_every == 0 and first not in recorder.evaluated
    if first and interrupted and alone:  # a stop had interrupted it
        evaluate(state)
    with (
        Prefetcher(
            fetch,
            first,
            config.steps,
            run.config.data.prefetch,
            time_limit=processes.time_limit(),
            asked_to_stop=stop.asked if alone else lambda: False,
        ) as feed,
        Profiler(traced, run.folder, compiled, recorder) as profiler,
    ):
        for done, batch in enumerate(feed, start=first + 1):
            with profiler.step(done):
                state, metrics = _step(train_step, done, state, batch, last_saved, recorder)
                recorder.step(done, metrics)
            saver.poll()
            if done == config.steps or recorder.give_up:
                break
            if config.eval_every and done % config.eval_every == 0:
                recorder.flush()
                with contextlib.suppress(Stopped):
                    evaluate(state)
            asked = vote.reason(stop.reason, done)
            if asked or done == config.stop_after:
                reason = asked or "stop_after"
                break
            if done % run.config.checkpoint.every == 0:
                with recorder.pause():
                    saver.begin(state, fingerprint(run))
    recorder.flush()
    saver.finish(state, fingerprint(run))
    reason = GAVE_UP if recorder.give_up else reason
    return state, {"step": done, "reason": reason or ("finished" if done == config.steps else stop.reason)}


def _step(
    train_step: ReplayChecked,
    done: int,
    state: TrainState,
    batch: Any,
    last_saved: Callable[[], int | None],
    recorder: Recorder,
) -> tuple[TrainState, PackedMetrics]:
    """One step; a machine that computes it wrongly is put on record before the run ends."""
    try:
        return train_step(done, state, batch, last_saved)
    except ReplayMismatch as mismatch:
        recorder.flush()
        recorder.event("replay_mismatch", "", step=done, leaves=mismatch.leaves)
        raise


def _evaluate(
    run: Run, state: TrainState, recorder: Recorder, stop: Stop, num_batches: int | None, **more: float
) -> dict[str, float | int]:
    hurry = stop.asked if jax.process_count() == 1 else lambda: False
    split = run.store.validation
    measured = stop.run(lambda: evaluate_split(run, state.params, split, num_batches=num_batches, asked_to_stop=hurry))
    result, step = measured | more, int(state.step)
    text = (
        f"validation at step {step}: nll {result['nll']:.4f}, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )
    recorder.event("eval", text, step=step, **result)
    return result


def _finish(
    run: Run, state: TrainState, checkpoints: CheckpointFolder, recorder: Recorder, stop: Stop
) -> dict[str, Any]:
    """Evaluates on the whole split, sets the result beside plain compressors, and writes a sample."""
    config, split = run.config.train, run.store.validation
    rivals = {}
    if split.num_bytes <= _COMPRESS_LIMIT and processes.is_lead():
        rivals = stop.run(lambda: compressor_bits_per_byte(split_text(split, run.store.tokenizer)))
    more = {f"{name}_bits_per_byte": value for name, value in rivals.items()}
    outcome = {"evaluation": _evaluate(run, state, recorder, stop, None, **more)}
    if config.eval_every and not config.eval_batches:  # comparable with those on the way
        checkpoints.score(int(state.step), outcome["evaluation"]["nll"])
        processes.run_on_lead("delete old checkpoints", checkpoints.prune)
    if rivals:
        recorder.say(f"the same bytes: gzip -9 {rivals['gzip']:.4f}, xz -9 {rivals['xz']:.4f} bits per byte")
    if config.sample_tokens:
        outcome["sample"] = "sample.txt"
        prompt, count = config.sample_prompt, config.sample_tokens
        text = stop.run(lambda: continue_text(run, state.params, prompt, count, seed=run.config.seed))
        if processes.is_lead():
            (run.folder / "sample.txt").write_text(prompt + text, encoding="utf-8")
    return outcome
