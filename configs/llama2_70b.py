"""Llama 2, 70 billion parameters, as its paper trains it: 2 trillion tokens (arXiv:2307.09288, section 2.2).

  jaxtrain prepare TEXT... --tokenizer hf:llama2/tokenizer.json --out stores/llama2
  jaxtrain train configs/llama2_70b.py

The plan by formula, from `jaxtrain plan configs/llama2_70b.py --devices 128 --chip v5p`:
128 x v5p. The classic 840 GB (12 bytes for each of 70 billion parameters) and where they go:

                                      a chip   all chips
  parameters, float32                2.16 GB      277 GB
  both moments, float32              4.32 GB      553 GB
    = the state                      6.48 GB      830 GB
  gradients, bfloat16                1.08 GB      138 GB
  gathered while they are used       5.00 GB      639 GB
  activations of 8 x 4,096 tokens   65.77 GB    8,418 GB
  logits of one chunk                0.20 GB       25 GB
    = all at once                   78.52 GB   10,051 GB   of 103 GB a chip

At 40 % MFU that is 55,000 tokens a second, 422 days, 1.3 million chip-hours.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(store="stores/llama2"),
        model=llama(
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            d_model=8192,
            d_ff=28_672,
            max_seq_len=4096,
            vocab_size=32_000,
            remat="full",
        ),
        optim=OptimConfig(peak_lr=1.5e-4, warmup_steps=2000),
        # 1,024 x 4,096 = 4.2 million tokens a step.
        train=TrainConfig(steps=476_837, batch_size=1024, seq_len=4096, precision="bfloat16", eval_every=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=500),
    )
