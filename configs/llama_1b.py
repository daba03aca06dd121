"""A Llama of 1.3 billion parameters on 27 billion tokens, 20 a parameter (arXiv:2203.15556).

  jaxtrain prepare TEXT... --tokenizer bpe:32000 --out stores/llama
  jaxtrain train configs/llama_1b.py

Width, depth, batch and learning rate of GPT-3 XL (arXiv:2005.14165, table 2.1) in the style of Llama
(arXiv:2302.13971).

The plan by formula, from `jaxtrain plan configs/llama_1b.py --devices 16 --chip v5e`:
16 x v5e: the state (parameters and moments, float32) takes 16.2 GB of all, everything 6.6 of each 16.9 GB; at 40 % MFU
152,000 tokens a second, 2 days, 784 chip-hours.

By the TPU compiler, from `jaxtrain plan configs/llama_1b.py --topology v5e:4x4`: the state takes 1.01 GB, temporaries
3.36 GB more at the peak, of 16.9 GB.
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    """The run."""
    return Config(
        data=DataConfig(store="stores/llama"),
        model=llama(
            num_layers=24, num_heads=16, d_model=2048, d_ff=5504, max_seq_len=2048, vocab_size=32_000, remat="full"
        ),
        optim=OptimConfig(peak_lr=2e-4, warmup_steps=500),
        # 512 x 2,048 = 1.0 million tokens a step.
        train=TrainConfig(
            steps=25_600, batch_size=512, seq_len=2048, accumulate=4, precision="bfloat16", eval_every=1000
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
