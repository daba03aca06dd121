"""The training loop: config -> data, mesh, state (fresh or restored) -> steps, with records, evaluation and saves.

Nothing here knows how a layer, a schedule or a file format works. How a run starts, in this order:

  1. its folder has a checkpoint: the newest is restored, and the run goes on as if it had never stopped
  2. otherwise: fresh parameters from the seed

Under several processes each runs all of this on its own part of the batch and of the state; process 0 alone prepares
data and writes records, and before each part they agree that they are about to do the same.
"""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxtrain import __version__, build, distributed
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import Config
from jaxtrain.data.loader import Prefetcher, TrainBatches, global_batch
from jaxtrain.data.store import TokenStore
from jaxtrain.evaluate import compressor_bits_per_byte, evaluate_split, split_text
from jaxtrain.faults import FaultyBatches
from jaxtrain.generate import continue_text
from jaxtrain.optim import decay_mask, decay_report
from jaxtrain.recorder import Recorder
from jaxtrain.report import write_report
from jaxtrain.run import Run, assemble, claim, describe, record
from jaxtrain.sharding import by_rows
from jaxtrain.step import TrainState

# Compressing a large split for comparison would take minutes.
_COMPRESS_LIMIT = 16 * 2**20

GAVE_UP = "too many bad steps"  # the guard's limits, see `Config.guard`


class _Stop:
    """Remembers that somebody asked the run to stop; the loop looks at each step."""

    def __init__(self):
        self.reason: str | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator["_Stop"]:
        """Takes SIGTERM and SIGINT for a polite request, once; a second one acts as it would have."""
        previous = {}

        def handle(number, frame):
            del frame
            self.reason = signal.Signals(number).name
            signal.signal(number, previous[number])

        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.getsignal(number)
            with contextlib.suppress(ValueError):  # not the main thread: somebody else's signals
                signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                with contextlib.suppress(ValueError):
                    signal.signal(number, handler)


def train(config: Config, run_dir: str | Path) -> dict[str, Any]:
    """Trains, or goes on training, the run in a folder.

    Args:
      config: the run. Where the folder has one already it must say the same, but for fields such as `log_every` that
        change no number of the run.
      run_dir: holds config.json, metrics.jsonl, checkpoints/, and at the end report.html, report.png and sample.txt.

    Returns:
      The `stop` event: `step`, `reason` ("finished", "stop_after", a signal's name, or GAVE_UP) and, of a finished run,
      the last evaluation.

    Raises:
      ValueError: a config, store or checkpoint that does not fit, with the remedy, or processes that disagree on them.
    """
    folder = Path(run_dir)
    run = assemble(config, folder, _data(config, folder))
    with (
        Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        Recorder(run) as recorder,
        _Stop().listen() as stop,
    ):
        recorder.table(f"jaxtrain: {folder}", describe(run))
        recorder.say(decay_report(run.abstract_state.params, decay_mask))
        state = _start(run, checkpoints, recorder)
        state, outcome = _loop(run, state, checkpoints, recorder, stop)
        if outcome["reason"] == "finished":
            outcome |= _finish(run, state, recorder)
        recorder.event("stop", f"stopped at step {outcome['step']}: {outcome['reason']}", **outcome)
        if distributed.is_lead():
            try:
                recorder.say(f"report: {write_report(folder)}")
            except (ImportError, ValueError) as error:  # no matplotlib, or not one step logged: the run is no worse
                recorder.say(f"no report: {error}")
    return outcome


def _data(config: Config, folder: Path) -> TokenStore:
    """Opens the run's data, after process 0 has made its folder and, if need be, the data."""
    distributed.agree(
        "the run",
        dataclasses.asdict(config) | {"jax": jax.__version__, "jaxtrain": __version__},
        remedy="start them with the same command and the same versions",
    )

    def begin() -> None:
        claim(folder, config)
        build.prepare_data(config, folder)

    distributed.first("prepare the data", begin)
    distributed.agree(
        "the run directory",
        {"config.json": "there" if (folder / "config.json").exists() else "not there"},
        remedy="--run-dir must be on a file system that they share",
    )
    store = build.open_data(config, folder)
    distributed.agree(
        "the data", {"fingerprint": store.fingerprint}, remedy="give each the same store, or one that they share"
    )
    return store


def _start(run: Run, checkpoints: Checkpoints, recorder: Recorder) -> TrainState:
    versions = {
        "jax": jax.__version__,
        "processes": jax.process_count(),
        "devices": run.mesh.size,
        "device": run.mesh.devices.flat[0].device_kind,
        "vocab_size": run.model.config.vocab_size,
        "train_tokens": run.store.train.num_tokens,
    }
    step = checkpoints.latest_step()
    distributed.agree(
        "the checkpoint to go on from",
        {"newest step": step},
        remedy="--run-dir must be on a file system that they share",
    )
    if step is None:
        recorder.event("start", "", step=0, attempt=recorder.attempt, **versions)
        return run.init_state()
    state, saved = checkpoints.restore(run.abstract_state, step)
    for key, now in record(run).items():
        if key != "config" and saved[key] != now:
            raise ValueError(
                f"the checkpoint of step {step} was made with another {key}: {saved[key]}, and now it is {now}; "
                "go on with what the run was started with"
            )
    recorder.event("resume", f"resumed from step {step}", step=step, attempt=recorder.attempt, **versions)
    return state


def _loop(
    run: Run, state: TrainState, checkpoints: Checkpoints, recorder: Recorder, stop: _Stop
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the steps that are left; returns the last state and what the `stop` event says."""
    config = run.config.train
    first = int(state.step)
    if first >= config.steps:
        return state, {"step": first, "reason": "finished"}
    batches = TrainBatches(
        run.store.train,
        seed=run.config.seed,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        vocab_size=run.model.config.vocab_size,
    )
    if run.config.faults.in_batch:
        batches = FaultyBatches(batches, run.config.faults)
    fetch = functools.partial(global_batch, batches, sharding=by_rows(run.mesh))
    # Compiled here, once: a call that would need another program is an error rather than a silent recompilation.
    train_step = recorder.compile(run.train_step, state, fetch(first))

    def save(state: TrainState) -> None:
        with recorder.pause():
            checkpoints.save(state, record(run))
        recorder.event("save", "", step=int(state.step))

    done, reason, vote = first, "finished", distributed.StopVote()
    with Prefetcher(fetch, first, config.steps, run.config.data.prefetch) as feed:
        for done, batch in enumerate(feed, start=first + 1):
            state, metrics = train_step(state, batch)
            recorder.step(done, metrics)
            if done == config.steps or recorder.give_up:
                break
            if config.eval_every and done % config.eval_every == 0:
                recorder.flush()
                with recorder.pause():
                    _evaluate(run, state, recorder, config.eval_batches)
            asked = vote.reason(stop.reason, done)
            if asked or done == config.stop_after:
                reason = asked or "stop_after"
                break
            if done % run.config.checkpoint.every == 0:
                save(state)
    recorder.flush()
    save(state)
    checkpoints.wait()
    return state, {"step": done, "reason": GAVE_UP if recorder.give_up else reason}


def _evaluate(
    run: Run, state: TrainState, recorder: Recorder, num_batches: int, **more: float
) -> dict[str, float | int]:
    result = evaluate_split(run, state.params, run.store.validation, num_batches=num_batches) | more
    step = int(state.step)
    text = (
        f"validation at step {step}: nll {result['nll']:.4f}, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )
    recorder.event("eval", text, step=step, **result)
    return result


def _finish(run: Run, state: TrainState, recorder: Recorder) -> dict[str, Any]:
    """Evaluates on the whole split, sets the result beside plain compressors, and writes a sample."""
    config, split = run.config.train, run.store.validation
    rivals = {}
    if split.num_bytes <= _COMPRESS_LIMIT and distributed.is_lead():
        rivals = compressor_bits_per_byte(split_text(split, run.store.tokenizer))
    more = {f"{name}_bits_per_byte": value for name, value in rivals.items()}
    outcome = {"evaluation": _evaluate(run, state, recorder, 0, **more)}
    if rivals:
        recorder.say(f"the same bytes: gzip -9 {rivals['gzip']:.4f}, xz -9 {rivals['xz']:.4f} bits per byte")
    if config.sample_tokens:
        outcome["sample"] = "sample.txt"
        text = continue_text(run, state.params, config.sample_prompt, config.sample_tokens, seed=run.config.seed)
        if distributed.is_lead():
            (run.folder / "sample.txt").write_text(config.sample_prompt + text, encoding="utf-8")
    return outcome
