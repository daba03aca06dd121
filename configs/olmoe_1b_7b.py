"""OLMoE: 6.9 billion parameters, of which a token uses 1.3, on 5.0 trillion tokens (arXiv:2409.02060).

  jaxtrain prepare TEXT... --tokenizer hf:olmoe/tokenizer.json --out stores/olmoe
  jaxtrain train configs/olmoe_1b_7b.py

Each layer has 64 experts, of which the router chooses 8.

The plan by formula, from `jaxtrain plan configs/olmoe_1b_7b.py --devices 256 --chip h100`:
256 x h100: the state (parameters and moments, float32) takes 10.4 GB of each, everything 24.5 of 80.0 GB; at 40 % MFU
12.9 million tokens a second, 4 days 12 hours, 27,833 chip-hours.

By the TPU compiler, from
`jaxtrain plan configs/olmoe_1b_7b.py --topology v5p:2x2x2 --mesh.data 1 --train.batch-size 32`: the state takes
10.4 GB, temporaries 6.41 GB more at the peak, of 102.8 GB.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, family


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(store="stores/olmoe"),
        model=family(
            "olmoe",
            num_layers=16,
            num_heads=16,
            d_model=2048,
            d_ff=1024,
            max_seq_len=4096,
            vocab_size=50_304,
            remat="full",
        ),
        optim=OptimConfig(peak_lr=4e-4, warmup_steps=2500),
        # 1,024 x 4,096 = 4.2 million tokens a step.
        train=TrainConfig(
            steps=1_200_000, batch_size=1024, seq_len=4096, precision="bfloat16", z_loss=1e-5, eval_every=5000
        ),
        mesh=MeshConfig(data=-1, fsdp=8),
        checkpoint=CheckpointConfig(every=5000),
    )
