"""Shakespeare's plays, character by character: nanoGPT's first example, with a recipe of our own for two CPU cores.

  jaxtrain train configs/shakespeare.py --data.sources tinyshakespeare.txt

The text is one file of 1.1 million characters (char-rnn's; bring it yourself); its last tenth is held out. 520 steps
x 8 sequences x 128 characters = 0.5 M tokens, half of the text. Validation nll 1.900 nats a character in 100 s on two
slow cores, 0.56 of the time of nanoGPT's CPU recipe in torch, which ends at 1.891 (scripts/bench_quality.py, which runs
both).
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(sources=("tinyshakespeare.txt",), validation_fraction=0.1),
        model=llama(num_layers=4, num_heads=4, d_model=128, d_ff=320, max_seq_len=128, qk_norm=True),
        optim=OptimConfig(peak_lr=5e-3, schedule="linear", warmup_steps=30, b2=0.99, floor=0.0),
        train=TrainConfig(steps=520, batch_size=8, seq_len=128, log_every=20),
        checkpoint=CheckpointConfig(every=520),
    )
