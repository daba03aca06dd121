"""A small byte-level model of Python's own standard library: the first thing to run.

  jaxtrain train configs/quickstart.py

Two CPU cores, one to two minutes. 900 steps x 8 sequences x 128 bytes = 0.9 M tokens, a thirteenth of the text.
Python 3.11 ends at validation nll 1.54 (nats per byte or document end), bits per byte 2.22; the compressors that it
prints beside it take gzip -9 2.13, xz -9 1.91 on the same held-out files. Another Python has other sources.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(sources=("python-stdlib",)),
        model=llama(num_layers=4, num_heads=4, d_model=128, d_ff=384, max_seq_len=128, qk_norm=True),
        optim=OptimConfig(peak_lr=5e-3, schedule="linear", warmup_fraction=1 / 18, b2=0.99, floor=0.0),
        train=TrainConfig(
            steps=900,
            batch_size=8,
            seq_len=128,
            log_every=20,
            eval_every=450,
            sample_tokens=600,
            sample_prompt="def ",
        ),
        checkpoint=CheckpointConfig(every=450),
    )
