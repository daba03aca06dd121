from jaxtrain.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, llama


def config() -> Config:
    return Config(
        data=DataConfig(sources=("python-stdlib",), validation_fraction=0.03),
        model=llama(num_layers=4, num_heads=4, d_model=128, d_ff=384, max_seq_len=256, vocab_size=0),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=20, b2=0.99),
        train=TrainConfig(steps=100, batch_size=16, seq_len=256, num_devices=1, sample_tokens=300),
        checkpoint=CheckpointConfig(every=100),
    )
