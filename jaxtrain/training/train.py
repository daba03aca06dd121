"""The training loop: from a config to a trained model in a run directory.

Nothing here knows how a layer, a schedule or a file format works; start.py says how a run starts. Under several
processes each process runs all of this on its shards of the batch and the state. The lead process alone prepares the
data and writes records, and the processes agree on each part before they start it.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.manifest import Damaged, verify
from jaxtrain.checkpoints.mirror import working_folder
from jaxtrain.config import Config
from jaxtrain.data.compressors import compressor_bits_per_byte
from jaxtrain.data.loader import prefetched
from jaxtrain.inference.generate import complete
from jaxtrain.monitoring.metrics import EVENT_KEYS, PackedMetrics
from jaxtrain.monitoring.profile import Profiler, named_as_now, parse_profile, steps_left
from jaxtrain.monitoring.recorder import Recorder, open_recorder
from jaxtrain.monitoring.rules import RunFacts
from jaxtrain.monitoring.trackers import check_trackers
from jaxtrain.optim import decay_mask, decay_report
from jaxtrain.runtime import processes
from jaxtrain.runtime.chips import peak_flops
from jaxtrain.runtime.config_files import load_run_config
from jaxtrain.runtime.files import write_text
from jaxtrain.runtime.mesh import make_mesh, replicated
from jaxtrain.runtime.stop import Stop, Stopped
from jaxtrain.step import TrainState
from jaxtrain.training.batches import batch_source, train_batches
from jaxtrain.training.components import check_optimizer
from jaxtrain.training.double_check import ReplayChecked
from jaxtrain.training.evaluation import evaluate_sources, split_text
from jaxtrain.training.frozen import describe_frozen, frozen_mask
from jaxtrain.training.run import NO_HOOKS, Hooks, Run, assemble, fingerprint, save_tokenizer
from jaxtrain.training.run_folder import absolute_paths, rollback_refused, write_config
from jaxtrain.training.start import Session, check_resume, prepare_data, start, start_table

_COMPRESS_LIMIT = 16 * 2**20  # bytes of a split that are compressed for comparison; more would take minutes

GAVE_UP = "too many bad steps"  # limits of the guard, see `Config.guard`


def train(
    config: Config,
    run_dir: str | Path,
    *,
    rewind: int | None = None,
    profile: str | None = None,
    allow_change: bool = False,
    lock: bool = True,
    track: Sequence[str] = (),
    hooks: Hooks = NO_HOOKS,
) -> dict[str, Any]:
    """Trains a run, or resumes the run that the directory holds.

    Args:
      config: the run. To resume, it must equal that of the run, but for fields that change no number, as `log_every`.
      run_dir: path or URL (see `working_folder`) of the config, tokenizer, metrics, checkpoints, report and sample.
      rewind: resume from the checkpoint of this step and rename later ones; None resumes from the newest.
      profile: `START:STOP`, steps (counted from 1, without STOP) to trace into RUN/profile; None traces none.
      allow_change: resume with another learning rate, batch size and the like, from the next step on.
      lock: False takes no locks, for a file system that has none.
      track: experiment trackers that receive the run: tensorboard, wandb, mlflow, trackio.
      hooks: replaces parts of the run.

    Returns:
      The `stop` event: `step`, `reason` ("finished", "stop_after", the name of a signal, or GAVE_UP), `skipped_steps`
      and, for a finished run, the last evaluation.

    Raises:
      ValueError: a config, store or checkpoint that does not fit, with the remedy, or processes that disagree on them.
    """
    traced = parse_profile(profile, config.train)
    processes.run_on_lead("find the trackers", lambda: check_trackers(track))
    with contextlib.ExitStack() as stack:
        folder, mirror = stack.enter_context(working_folder(run_dir, lock=lock))
        config = absolute_paths(config, folder)
        options = {"rewind": rewind, "allow_change": allow_change, "lock": lock}
        try:
            with rollback_refused(folder) if processes.is_lead() else contextlib.nullcontext():
                session = _open_session(config, folder, stack, hooks, track, **options)._replace(mirror=mirror)
                if rewind is None and (outcome := _settled_outcome(session)):
                    return outcome
                state = start(session, rewind)
            if processes.is_lead():
                write_config(folder, config)
                save_tokenizer(session.run)
            state, reason = _train(session, state, traced)
            outcome = {"step": int(state.step), "reason": reason}
            if reason == "finished":
                outcome |= _finish(session, state)
        except Stopped:  # outside the steps: every step made so far is saved
            outcome = {"step": session.checkpoints.latest_step() or 0, "reason": session.stop.reason}
        recorder = session.recorder
        recorder.stop(outcome)
        if processes.is_lead():
            try:
                recorder.say(f"report: {hooks.write_report(folder)}")
            except Exception as error:  # such as no logged step, or a full disk: the run itself is complete
                recorder.say(f"no report: {error}")
    return outcome | {"skipped_steps": recorder.skipped_steps}


def _describe(session: Session) -> None:
    """Shows the run, and which parameters decay or are frozen."""
    run, recorder = session.run, session.recorder
    params = run.program.abstract_state.params
    recorder.table(f"jaxtrain: {run.folder}", start_table(run))
    if run.config.optim.name == "adamw":
        recorder.say(decay_report(params, decay_mask, frozen_mask(params, run.config.frozen)))
    if run.config.frozen:
        recorder.say(describe_frozen(params, run.config.frozen))


def _settled_outcome(session: Session) -> dict[str, Any] | None:
    """Returns and shows the recorded outcome of a run that has finished or given up; None if it can train further."""

    def find() -> dict[str, Any] | None:
        run, last = session.run, session.recorder.last_stop
        steps = run.config.train.steps
        end = {"finished": steps, GAVE_UP: last.get("step")}.get(str(last.get("reason")))
        settled = end is not None and last.get("step") == end == session.checkpoints.latest_step()
        if not settled or load_run_config(run.folder) != run.config:
            return None
        try:
            verify(session.checkpoints.checkpoint(end))
        except Damaged:
            return None
        return {name: value for name, value in last.items() if name not in EVENT_KEYS}

    outcome = processes.broadcast_from_lead("find the end of the run", find)
    if outcome:
        gave_up = "change the config with --allow-change, or return to a checkpoint with --rewind STEP"
        remedy = "nothing to do" if outcome["reason"] == "finished" else gave_up
        report = session.run.folder / "report.html"
        session.recorder.say(f"{outcome['reason']} at step {outcome['step']} before: {remedy}; {report}")
    return outcome


def _open_session(
    config: Config, folder: Path, stack: contextlib.ExitStack, hooks: Hooks, track: Sequence[str], **options: Any
) -> Session:
    """Opens the data, with the options of `prepare_data`, and the records of a run; `stack` closes them."""
    check_optimizer(config)
    make_mesh(config.mesh)  # raises before the data is prepared, which may take long
    store, changes = prepare_data(config, folder, stack, hooks, **options)
    if config.train.sample_tokens and store.tokenizer_file is None:
        remedy = f"put its tokenizer.json beside {store.path}, or set train.sample_tokens to none"
        raise ValueError(f"train.sample_tokens {config.train.sample_tokens} needs a tokenizer: {remedy}")
    run = assemble(config, folder, store, hooks)
    train_batches(run)  # raises if the text is too short
    check_resume(run, options["rewind"])
    stop = stack.enter_context(Stop().listen())
    recorder = stack.enter_context(_open_recorder(run, track))
    retention = {name: value for name, value in vars(config.checkpoint).items() if name != "every"}
    checkpoints = CheckpointFolder(folder / "checkpoints", report=recorder.event, **retention)
    saver = stack.enter_context(hooks.make_saver(checkpoints, log=folder / "metrics.jsonl"))
    stalled = lambda problem: recorder.event("stalled", "", problem=problem)  # noqa: E731
    watchdog = stack.enter_context(hooks.make_watchdog(config.train.stall_minutes, report=stalled))
    session = Session(run, recorder, stop, checkpoints, saver, watchdog, changes)
    _describe(session)
    return session


def _open_recorder(run: Run, track: Sequence[str]) -> Recorder:
    settings, program, batches = run.config.train, run.program, train_batches(run)

    def more(first: int, last: int) -> dict[str, Any]:
        seen = {f"tokens_seen/{name}": count for name, count in batches.tokens_seen(last).items()}
        return seen | ({"padding_share": batches.padding_share(first - 1, last)} if batches.is_packed else {})

    seconds, model = None, program.model
    peak = peak_flops(program.mesh.devices.flat[0].device_kind, settings.precision)
    if peak and hasattr(model, "flops_per_token"):
        flops = settings.batch_size * settings.seq_len * model.flops_per_token(settings.seq_len)
        seconds = flops / (peak * program.mesh.size)
    facts = RunFacts(run.config, program.vocab_size, run.store.train.num_tokens)
    return open_recorder(run.folder, facts, seconds_at_peak=seconds, sinks=run.hooks.sinks, more=more, track=track)


def _train(session: Session, state: TrainState, traced: range) -> tuple[TrainState, str]:
    """Runs the steps that are left; returns the last state and why it stopped."""
    run, recorder, stop, saver = session.run, session.recorder, session.stop, session.saver
    first = int(state.step)
    stopping, due = _stop_rule(session), _due_actions(session)
    if reason := stopping(first):  # a finished run, or the same command with train.stop_after again
        return state, reason
    traced = steps_left(traced, first, recorder.say)
    fetch = batch_source(run)
    # Compiled once, ahead of time: a call that would need another program is an error, not a silent recompilation.
    with named_as_now(traced):
        make = functools.partial(run.program.compile, traced=bool(traced))
        compiled = recorder.compile(lambda: stop.run(lambda: make(state, fetch(first), recorder.say)))
    # The first step's collectives would fail for a process that compiles 30 s longer than another one (gloo).
    processes.agree("the end of compilation", {}, timeout=processes.LONG_SECONDS)
    train_step = _checked_step(session, compiled)
    asked_to_stop = stop.asked if processes.is_alone() else lambda: False  # several processes stop after the same step
    eval_every = run.config.train.eval_every
    if processes.is_alone() and first and eval_every and first % eval_every == 0 and first not in recorder.evaluated:
        _evaluate_between_steps(session, state)  # a stop had interrupted it
    limits = {"time_limit": processes.time_limit(), "asked_to_stop": asked_to_stop}
    with (
        prefetched(fetch, first, run.config.train.steps, run.config.data.prefetch, **limits) as feed,
        Profiler(traced, run.folder, compiled.executable, recorder) as profiler,
    ):
        for step, batch in enumerate(feed, start=first + 1):
            session.watchdog.step(step)
            with profiler.step(step):
                state, metrics = train_step(step, state, batch)
                recorder.step(step, metrics)
            for action in due(step):
                action(state)
            if reason := stopping(step):
                break
    recorder.flush()
    with recorder.pause("saving"), session.watchdog.pause():
        saver.finish(state, fingerprint(run, state))
    return state, GAVE_UP if recorder.give_up else reason or stop.reason


def _stop_rule(session: Session) -> Callable[[int], str | None]:
    """Returns `step -> reason to stop after that step, or None`; reasons in order of precedence."""
    config, recorder, vote = session.run.config.train, session.recorder, processes.StopVote()

    def stopping(step: int) -> str | None:
        if step >= config.steps:
            return "finished"
        if recorder.give_up:
            return GAVE_UP
        if signal := vote.reason(session.stop.reason, step):
            return signal
        return "stop_after" if config.stop_after and step >= config.stop_after else None

    return stopping


def _due_actions(session: Session) -> Callable[[int], list[Callable[[TrainState], None]]]:
    """Returns `step -> actions due after that step`. The last step has none: `_finish` evaluates and saves it."""
    run, recorder, saver = session.run, session.recorder, session.saver
    config = run.config.train

    def save(state: TrainState) -> None:
        recorder.flush()  # the log then covers the checkpoint
        with recorder.pause(), session.watchdog.pause():
            saver.begin(state, fingerprint(run, state))

    def poll(state: TrainState) -> None:
        del state
        saver.poll()
        if session.mirror is not None:
            session.mirror.poll(session.checkpoints)

    evaluation = functools.partial(_evaluate_between_steps, session)
    table = [(1, poll), (config.eval_every, evaluation), (run.config.checkpoint.every, save)]

    def due(step: int) -> list[Callable[[TrainState], None]]:
        if step >= config.steps or recorder.give_up:
            return []
        return [action for every, action in table if every and step % every == 0]

    return due


def _checked_step(session: Session, compiled: Callable) -> Callable[..., tuple[TrainState, PackedMetrics]]:
    """Returns `(step, state, batch) -> (state, metrics)`, which runs some steps twice; see `ReplayChecked`."""
    run, recorder = session.run, session.recorder

    def launch(state: TrainState, batch: Any) -> tuple[TrainState, PackedMetrics]:
        session.watchdog.launch()
        return compiled(state, batch)

    def report(step: int, leaves: list[str]) -> int | None:
        with contextlib.suppress(Exception):  # the mismatch is the more important error
            session.saver.wait()
        recorder.flush()
        recorder.event("replay_mismatch", "", step=step, leaves=leaves)
        return session.checkpoints.latest_step()

    step, every = run.hooks.wrap_step(launch), run.config.train.replay_check
    return ReplayChecked(every, step, run.program.abstract_state, report)


def _evaluate_between_steps(session: Session, state: TrainState) -> None:
    """Evaluates between steps. A stop abandons the evaluation."""
    session.recorder.flush()
    with contextlib.suppress(Stopped):
        result = _validate(session, state, session.run.config.train.eval_batches)
        session.checkpoints.score(int(state.step), result["nll"])


def _validate(session: Session, state: TrainState, num_batches: int | None, **more: float) -> dict[str, float | int]:
    """Evaluates the validation split, and records the result with the values in `more`."""
    run, stop, step = session.run, session.stop, int(state.step)
    options = {"num_batches": num_batches, "watchdog": session.watchdog}
    options |= {"stop": stop} if processes.is_alone() else {}  # several processes stop after the same step
    with session.recorder.pause("evaluating"):
        result = evaluate_sources(run, state.params, "validation", **options) | more
    text = f"validation at step {step}: nll {result['nll']:.4f}, perplexity {result['perplexity']:.2f}"
    if "bits_per_byte" in result:
        text += f", {result['bits_per_byte']:.4f} bits per byte"
    if run.store.sources:
        text += " (nll " + ", ".join(f"{name} {result[f'nll/{name}']:.4f}" for name in run.store.sources) + ")"
    session.recorder.event("eval", text, step=step, **result)
    return result


def _finish(session: Session, state: TrainState) -> dict[str, Any]:
    """Evaluates the whole split, compares the result with plain compressors, and writes a sample."""
    run, recorder, stop = session.run, session.recorder, session.stop
    config, split = run.config.train, run.store.validation
    compressed = {}
    is_small = split.masks is None and split.num_bytes is not None and split.num_bytes <= _COMPRESS_LIMIT
    if is_small and processes.is_lead():
        with recorder.pause("compressing the same text with gzip and xz"), session.watchdog.pause():
            compressed = stop.run(lambda: compressor_bits_per_byte(split_text(split, run.store.tokenizer)))
    more = {f"{name}_bits_per_byte": value for name, value in compressed.items()}
    outcome = {"evaluation": _validate(session, state, None, **more)}
    if config.eval_every and not config.eval_batches:  # comparable with the scores of earlier checkpoints
        session.checkpoints.score(int(state.step), outcome["evaluation"]["nll"])
        processes.run_on_lead("delete old checkpoints", session.checkpoints.prune)
    if compressed:
        recorder.say(f"the same bytes: gzip -9 {compressed['gzip']:.4f}, xz -9 {compressed['xz']:.4f} bits per byte")
    if config.sample_tokens and hasattr(run.program.model, "decode"):
        outcome["sample"] = "sample.txt"
        prompt, count = config.sample_prompt, config.sample_tokens
        with recorder.pause("sampling"), session.watchdog.pause():
            text = stop.run(lambda: continue_text(run, state.params, prompt, count))
        if processes.is_lead():
            write_text(run.folder / "sample.txt", prompt + text)
    return outcome


def continue_text(run: Run, params: Any, prompt: str, num_tokens: int) -> str:
    """Continues a text, as the beginning of a document, and returns the new text only.

    The parameters may be on any of the run's devices; one device per process computes.
    """
    if jax.process_count() > 1:  # shards of other processes arrive only by replication
        gather = jax.jit(lambda tree: tree, out_shardings=replicated(run.program.mesh))
        processes.compile_together(gather, params)
        params = gather(params)
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    else:
        params = jax.device_put(params, run.program.mesh.devices.flat[0])
    (completion,) = complete(run.program.model, params, run.tokenizer, [prompt], num_tokens, seed=run.config.seed)
    return completion.text
