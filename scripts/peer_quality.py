#!/usr/bin/env python
"""nanoGPT's CPU recipe for Shakespeare's plays, character by character, in PyTorch: the peer of bench_quality.py.

  python scripts/peer_quality.py tinyshakespeare.txt STEPS

4 layers, 4 heads, 128 channels, 64 characters, batches of 12, no dropout; AdamW with b2 0.99, 100 steps of warmup to
1e-3, then a cosine to 1e-4; clipping at 1. Prints one JSON object with the loss over the last tenth of the text.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers

CONTEXT, BATCH, WARMUP, PEAK, FLOOR = 64, 12, 100, 1e-3, 1e-4


def learning_rate(step: int, steps: int) -> float:
    """Returns the learning rate of a step, counted from 0."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    return FLOOR + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) * (PEAK - FLOOR)


def main() -> None:
    begin = time.perf_counter()
    text, steps = Path(sys.argv[1]).read_text(), int(sys.argv[2])
    torch.manual_seed(1337)
    characters = sorted(set(text))
    tokens = torch.tensor([characters.index(c) for c in text])
    train, validation = tokens.split([int(0.9 * len(tokens)), len(tokens) - int(0.9 * len(tokens))])
    sizes = {"vocab_size": len(characters), "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes, **none, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)

    def loss_of(windows: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=windows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    for step in range(steps):
        starts = torch.randint(len(train) - CONTEXT, (BATCH,))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss_of(torch.stack([train[i : i + CONTEXT + 1] for i in starts])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        windows = torch.stack([validation[i : i + CONTEXT + 1] for i in range(0, len(validation) - CONTEXT, CONTEXT)])
        losses = [loss_of(part).item() * len(part) for part in windows.split(64)]
    outcome = {"nll": sum(losses) / len(windows), "seconds_inside": time.perf_counter() - begin}
    outcome |= {"num_params": sum(p.numel() for p in model.parameters()), "steps": steps}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(outcome | {"versions": versions}))


if __name__ == "__main__":
    main()
