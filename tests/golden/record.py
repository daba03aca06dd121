"""Trains four small configs for 20 steps and prints every logged loss and norm, as float32 hexadecimals.

`python tests/golden/record.py` prints the record of this machine; `--write` stores it beside this file, for this jax
version. A refactoring must leave every record as it is. tests/test_golden.py runs this in a process of its own.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
METRICS = ("loss", "grad_norm", "update_norm", "param_norm")
CONFIG = """
from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama


def config():
    return Config(
        data=DataConfig(sources=("SOURCES",), validation_fraction=0.2),
        model=llama(num_layers=2, num_heads=4, d_model=32, d_ff=64, max_seq_len=32, num_kv_heads=2),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=3, clip_norm=1.0),
        train=TrainConfig(steps=20, batch_size=8, seq_len=32, log_every=1),
        mesh=MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=20),
    )
"""
VARIANTS = {
    "float32": [],
    "bfloat16": ["--train.precision", "bfloat16"],
    "accumulate 2": ["--train.accumulate", "2"],
    "4 devices": ["--mesh.data", "2", "--mesh.fsdp", "2"],
}


def write_corpus(folder: Path) -> None:
    """Writes 40 small text files: sums in digits."""
    for i in range(40):
        lines = [f"{a} + {a + i} = {a + a + i}\n" for a in range(i, i + 12)]
        (folder / f"{i:02}.txt").write_text("".join(lines))


def processor() -> str:
    """Returns the vector extension that XLA:CPU compiles for here; another one rounds differently."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else os.uname().machine


def record() -> dict:
    """Trains all variants in temporary folders; returns `{variant: {metric: [hexadecimal of each step]}}`."""
    from jaxtrain.runtime.flags import parse_config
    from jaxtrain.training.run import Hooks
    from jaxtrain.training.train import train

    hooks = Hooks(write_report=lambda folder: "no report")  # its plots take seconds
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus")
        (folder / "golden.py").write_text(CONFIG.replace("SOURCES", str(folder / "corpus")))
        for variant, flags in VARIANTS.items():
            run = folder / variant.replace(" ", "_")
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                outcome = train(parse_config([str(folder / "golden.py"), *flags]), run, hooks=hooks)
            assert outcome["reason"] == "finished", variant
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "loss" in line and "event" not in line]
            assert [line["step"] for line in steps] == list(range(1, 21)), variant
            found[variant] = {metric: [float(line[metric]).hex() for line in steps] for metric in METRICS}
    return found


def main() -> None:
    """Prints the record as JSON, or stores it."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    found = {"jax": jax.__version__, "processor": processor(), "variants": record()}
    if "--write" in sys.argv:
        (FOLDER / f"jax-{jax.__version__}-{processor()}.json").write_text(json.dumps(found, indent=1) + "\n")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
