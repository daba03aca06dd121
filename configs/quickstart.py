"""A small byte-level model of Python's own standard library: the first thing to run.

  jaxtrain train configs/quickstart.py

Two CPU cores, about two minutes. Ends at validation nll @NLL@, @BPB@ bits per byte; the same held-out
files take @GZIP@ with gzip -9 and @XZ@ with xz -9 (Python 3.11; another Python has other sources). 1,000 steps x
8 sequences x 128 bytes = 1.0 M tokens, a tenth of the text.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(sources=("python-stdlib",)),
        model=llama(num_layers=4, num_heads=4, d_model=128, d_ff=384, max_seq_len=128, scan_unroll=0),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=50, b2=0.99),
        train=TrainConfig(
            steps=1000,
            batch_size=8,
            seq_len=128,
            log_every=20,
            eval_every=250,
            sample_tokens=600,
            sample_prompt="def ",
        ),
        checkpoint=CheckpointConfig(every=500),
    )
