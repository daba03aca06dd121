"""Llama 2, 7 billion parameters, as its paper trains it: 2 trillion tokens (arXiv:2307.09288, section 2.2).

  jaxtrain prepare TEXT... --tokenizer hf:llama2/tokenizer.json --out stores/llama2
  jaxtrain train configs/llama2_7b.py

The plan by formula, from `jaxtrain plan configs/llama2_7b.py --devices 64 --chip v5p`:
64 x v5p, data 8 x fsdp 8: the state (parameters and moments, float32) takes 10.1 GB, everything 54 of each 103 GB; at
40 % MFU 274,000 tokens a second, 84 days, 130,000 chip-hours. With fsdp 64 the TPU compiler replaces every gather by
an all-reduce.

By the TPU compiler, from `jaxtrain plan configs/llama2_7b.py --topology v5p:2x2x2 --train.batch-size 16`:
2 x 4,096 tokens on each of 8 chips: the state takes 10.11 GB, temporaries 4.45 GB more at the peak, of 103 GB.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(store="stores/llama2"),
        model=llama(
            num_layers=32, num_heads=32, d_model=4096, d_ff=11_008, max_seq_len=4096, vocab_size=32_000, remat="full"
        ),
        optim=OptimConfig(peak_lr=3e-4, warmup_steps=2000),
        # 1,024 x 4,096 = 4.2 million tokens a step.
        train=TrainConfig(steps=476_837, batch_size=1024, seq_len=4096, precision="bfloat16", eval_every=1000),
        mesh=MeshConfig(data=-1, fsdp=8),
        checkpoint=CheckpointConfig(every=1000),
    )
