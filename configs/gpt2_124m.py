"""GPT-2, 124 million parameters, on 10 billion tokens: batch, learning rate and weight decay of GPT-3 Small.

  jaxtrain prepare TEXT... --tokenizer hf:gpt2/tokenizer.json --out stores/gpt2
  jaxtrain train configs/gpt2_124m.py

Radford et al., 2019, for the model; arXiv:2005.14165, table 2.1 and appendix B, for the training.

The plan by formula, from `jaxtrain plan configs/gpt2_124m.py --devices 8 --chip v5e`:
8 x v5e: the state (parameters and moments, float32) takes 1.5 GB of each, everything 8.9 of 16.9 GB; at 40 % MFU
790,000 tokens a second, 3.5 hours, 28 chip-hours.

By the TPU compiler, from `jaxtrain plan configs/gpt2_124m.py --topology v5e:2x4`: the state takes 1.49 GB, temporaries
7.82 GB more at the peak, of 16.9 GB.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, gpt2


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(store="stores/gpt2"),
        model=gpt2(vocab_size=50_257, vocab_multiple=128),
        optim=OptimConfig(peak_lr=6e-4, warmup_steps=700),
        # 512 x 1,024 = 0.5 million tokens a step.
        train=TrainConfig(
            steps=19_073, batch_size=512, seq_len=1024, accumulate=4, precision="bfloat16", eval_every=1000
        ),
        checkpoint=CheckpointConfig(every=1000),
    )
