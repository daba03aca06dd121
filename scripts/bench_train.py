#!/usr/bin/env python
"""Speed of the train step of a config, beside the same step in PyTorch.

Tokens are random and on the device; bench_loop.py measures the loop around the step. Rounds alternate between ours and
the peers, so that a busy machine slows all alike. A ratio compares two forms in one round; the table shows its median.

  python scripts/bench_train.py configs/gpt2_124m.py --train.batch-size 32 --train.accumulate 1 --peer torch
  python scripts/bench_train.py configs/gpt2_124m.py --model.num-layers 2 --peer torch --peer-python ~/torch/bin/python

Other flags change the config, as those of `jaxtrain train` do. The peer runs in another Python:

  python -m venv .venv-torch && .venv-torch/bin/pip install torch transformers
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from benchmark import Table, parser, report, start_jax

from jaxtrain.config import Config, ModelConfig
from jaxtrain.models.model import TransformerModel
from jaxtrain.models.size import flops_per_token
from jaxtrain.monitoring.metrics import PackedMetrics
from jaxtrain.plan.formulas import has_large_matrix, plan_vocab
from jaxtrain.runtime.chips import peak_flops
from jaxtrain.runtime.flags import parse_config
from jaxtrain.runtime.mesh import make_mesh
from jaxtrain.training.program import make_program

PEERS = {"torch": ("torch eager", "torch compiled"), "eager": ("torch eager",), "compiled": ("torch compiled",)}


class Ours:
    """Train step of a config on the available devices."""

    def __init__(self, config: Config):
        start_jax(has_large_matrix(config))
        mesh, vocab_size = make_mesh(config.mesh), plan_vocab(config)
        program = make_program(config, mesh, vocab_size)
        self.model = program.model.config
        self._state = program.init_state()
        keys = jax.random.split(jax.random.key(0))
        shape = program.abstract_batch["inputs"].shape
        batch = {
            "inputs": jax.random.randint(keys[0], shape, 0, vocab_size),
            "labels": jax.random.randint(keys[1], shape, 0, vocab_size),
            "where": jnp.ones(shape, bool),
        }
        batch |= {name: jnp.zeros(shape, jnp.int32) for name in program.abstract_batch.keys() - batch.keys()}
        self._batch = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), batch, program.abstract_batch)
        begin = time.perf_counter()
        self._step = program.compile(self._state, self._batch, print)
        self.compile_seconds = time.perf_counter() - begin
        self.executable, self.mesh = self._step.executable, mesh
        self.run(2)

    def run(self, num_steps: int) -> list[float]:
        """Times each step; like the loop, waits for the metrics of the previous step. Returns seconds."""
        seconds, metrics, since = [], self._one(), time.perf_counter()
        metrics.unpack()
        for _ in range(num_steps):
            metrics, last = self._one(), metrics
            last.unpack()
            now = time.perf_counter()
            seconds.append(now - since)
            since = now
        metrics.unpack()
        return seconds

    def text(self) -> str:
        """Returns the compiled program."""
        return self.executable.as_text()

    def _one(self) -> PackedMetrics:
        self._state, metrics = self._step(self._state, self._batch)
        return metrics

    def peak_bytes(self) -> int:
        """Returns the peak memory of one device; on a CPU, the compiler's plan for the step."""
        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"]
        plan = self.executable.memory_analysis()
        return plan.argument_size_in_bytes + plan.temp_size_in_bytes


class Peer:
    """Child process that runs scripts/peer_torch.py."""

    def __init__(self, python: Path, spec: dict[str, Any]):
        command = [str(python), str(Path(__file__).with_name("peer_torch.py")), json.dumps(spec)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready = self._answer()
        self.compile_seconds, self.versions = ready["ready"], ready["versions"]
        self._peak_bytes = 0

    def run(self, num_steps: int) -> list[float]:
        """Times each step; returns seconds."""
        print(num_steps, file=self._child.stdin, flush=True)
        answer = self._answer()
        self._peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def peak_bytes(self) -> int:
        """Returns the peak memory of the last run."""
        return self._peak_bytes

    def _answer(self) -> dict[str, Any]:
        for line in self._child.stdout:
            if line.startswith("{"):  # libraries print lines as well
                return json.loads(line)
        raise SystemExit(f"error: the peer ended with exit code {self._child.wait()}; its output is above")


def peer_style(config: Config, model: ModelConfig) -> str:
    """Returns the family of the peer's model; raises a ValueError if transformers has none."""
    styles = {
        "gpt2": ("learned", "layernorm", "gelu", True, True),
        "llama": ("rope", "rmsnorm", "swiglu", False, model.tie_embeddings),
    }
    ours = (model.positions, model.norm, model.feed_forward, model.use_bias, model.tie_embeddings)
    style = next((name for name, fields in styles.items() if fields == ours), None)
    if style is None or model.qk_norm or model.logit_softcap or config.train.precision == "float16":
        raise ValueError(
            "the peer has plain GPT-2 and Llama in float32 and bfloat16 only: leave out --peer for other configs"
        )
    return style


def peer_spec(config: Config, model: ModelConfig, compiled: bool) -> dict[str, Any]:
    """Describes the model for the peer; a ValueError, as of `peer_style`."""
    sizes = ("vocab_size", "vocab_rows", "num_layers", "num_heads", "d_model", "d_ff", "max_seq_len", "tie_embeddings")
    return {
        "style": peer_style(config, model),
        **{name: getattr(model, name) for name in sizes},
        "num_kv_heads": model.kv_heads,
        "head_dim": model.channels_per_head,
        **{name: getattr(config.optim, name) for name in ("b1", "b2", "weight_decay", "clip_norm")},
        **{name: getattr(config.train, name) for name in ("batch_size", "seq_len", "accumulate")},
        "bfloat16": config.train.precision == "bfloat16",
        "checkpoint": model.remat == "full",
        "platform": jax.devices()[0].platform,
        "compile": compiled,
    }


def bench(config: Config, options: argparse.Namespace) -> tuple[list[Table], dict[str, Any]]:
    """Runs all forms in turn. Returns the table and the seconds of every step."""
    if options.peer != "none":
        peer_style(config, config.model)  # before anything compiles
    ours = Ours(config)
    forms: dict[str, Ours | Peer] = {"jaxtrain": ours}
    for name in PEERS.get(options.peer, ()):
        forms[name] = Peer(options.peer_python, peer_spec(config, ours.model, name.endswith("compiled")))
    rounds: dict[str, list[list[float]]] = {name: [] for name in forms}
    for _ in range(options.rounds):
        for name, form in forms.items():
            rounds[name].append(form.run(options.steps))
    peers = [form for form in forms.values() if isinstance(form, Peer)]
    more = {"rounds": rounds, "peer_versions": peers[0].versions if peers else {}}
    return [_table(config, ours.model, forms, rounds, options)], more


def _table(config: Config, model: ModelConfig, forms, rounds, options: argparse.Namespace) -> Table:
    settings, device = config.train, jax.devices()[0]
    tokens = settings.batch_size * settings.seq_len
    peak = peak_flops(device.device_kind, settings.precision)
    flops = [tokens * flops_per_token(model, settings.seq_len, causal=causal) for causal in (True, False)]
    shapes = jax.eval_shape(TransformerModel(model).init, jax.random.key(0))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    table = Table(
        f"Train step: {model.num_layers} layers, d_model {model.d_model}, {num_params:,} parameters, "
        f"T {settings.seq_len}, batch {settings.batch_size}, {settings.precision}",
        {
            "": "",
            "tokens/s": ",.0f",
            "ms, median": ".2f",
            "ms, p90": ".2f",
            "jaxtrain is faster by": ".2f",
            "GFLOP/s": ",.0f",
            "MFU causal": ".1%",
            "MFU full": ".1%",
            "GiB": ".2f",
            "s to start": ".1f",
        },
        notes=[
            f"{options.rounds} rounds of {options.steps} steps, interleaved. 'jaxtrain is faster by': our tokens/s "
            "over those of the peer, median over pairs of rounds. GFLOP/s by the causal formula. GiB: peak of the "
            "device; on a CPU, the compiler's plan for ours and the whole process for a peer. s to start: compilation "
            "of ours, or the time to the third step of a peer.",
        ],
    )
    own = [statistics.median(seconds) for seconds in rounds["jaxtrain"]]
    for name, form in forms.items():
        steps = sorted(second for seconds in rounds[name] for second in seconds)
        median = statistics.median(steps)
        ratio = statistics.median(
            statistics.median(theirs) / mine for theirs, mine in zip(rounds[name], own, strict=True)
        )
        mfu = [work / median / (peak * jax.device_count()) if peak else None for work in flops]
        times = tokens / median, 1e3 * median, 1e3 * steps[int(0.9 * (len(steps) - 1))]
        rates = None if form is forms["jaxtrain"] else ratio, flops[0] / median / 1e9, *mfu
        table.rows.append([name, *times, *rates, form.peak_bytes() / 2**30, form.compile_seconds])
    return table


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", type=Path, help="config file")
    arguments.add_argument("--steps", type=int, default=10, help="steps per round")
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--peer", choices=["none", *PEERS], default="none", help="torch: eager and compiled")
    arguments.add_argument("--peer-python", type=Path, default=Path(".venv-torch/bin/python"))
    options, flags = arguments.parse_known_args()
    if options.peer != "none" and not options.peer_python.exists():
        sys.exit(f"error: no Python at {options.peer_python}: create one (see --help) or name it with --peer-python")
    options.flags = flags
    try:
        config = parse_config([str(options.config), *flags])
        tables, more = bench(config, options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report(options, tables, **more)


if __name__ == "__main__":
    main()
