"""Llama 3, 8 billion parameters, 15 trillion tokens of 8,192 at a time.

  jaxtrain prepare TEXT... --tokenizer hf:llama3/tokenizer.json --out stores/llama3
  jaxtrain train configs/llama3_8b.py

Model, learning rate and number of tokens: arXiv:2407.21783, table 3 and section 3. The paper gives no batch and warm-up
for this size; these are the first batch of its largest model and Llama 2's warm-up.

The plan by formula, from `jaxtrain plan configs/llama3_8b.py --devices 256 --chip v6e`:
256 x v6e, data 16 x fsdp 16: the state (parameters and moments, float32) takes 6.0 GB, everything 21.9 of each 33.5 GB;
at 40 % MFU 1.8 million tokens a second, 95 days, 584,000 chip-hours.

By the TPU compiler, from `jaxtrain plan configs/llama3_8b.py --topology v6e:4x4 --train.batch-size 16`: 8,192 tokens on
each of 16 chips: the state takes 6.03 GB, temporaries 4.46 GB more at the peak, of 33.5 GB.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(store="stores/llama3"),
        model=llama(
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            d_model=4096,
            d_ff=14_336,
            max_seq_len=8192,
            vocab_size=128_256,
            rope_theta=500_000.0,
            remat="full",
        ),
        optim=OptimConfig(peak_lr=3e-4, warmup_steps=2000),
        # 512 x 8,192 = 4.2 million tokens a step.
        train=TrainConfig(steps=3_576_279, batch_size=512, seq_len=8192, precision="bfloat16", eval_every=1000),
        mesh=MeshConfig(data=-1, fsdp=16),
        checkpoint=CheckpointConfig(every=1000),
    )
