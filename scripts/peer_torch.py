#!/usr/bin/env python
"""Peer of bench_train.py: the same model and step in idiomatic PyTorch and transformers.

bench_train.py starts this script in a Python with torch and transformers. The argument is the model as JSON. The script
prints that it is ready; then it reads numbers of steps from standard input and prints the seconds of each step.

  SDPA attention, fused AdamW on two groups of parameters, clipping by the global norm, autocast for bfloat16.
"""

import contextlib
import json
import resource
import sys
import time
from typing import Any

import torch
import transformers


def make_model(spec: dict[str, Any]) -> torch.nn.Module:
    """Makes a GPT-2 or Llama of the given sizes, without dropout."""
    sizes = {"vocab_size": spec["vocab_rows"], "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    if spec["style"] == "gpt2":
        config = transformers.GPT2Config(
            **sizes,
            n_positions=spec["max_seq_len"],
            n_embd=spec["d_model"],
            n_inner=spec["d_ff"],
            n_layer=spec["num_layers"],
            n_head=spec["num_heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    else:
        config = transformers.LlamaConfig(
            **sizes,
            max_position_embeddings=spec["max_seq_len"],
            hidden_size=spec["d_model"],
            intermediate_size=spec["d_ff"],
            num_hidden_layers=spec["num_layers"],
            num_attention_heads=spec["num_heads"],
            num_key_value_heads=spec["num_kv_heads"],
            head_dim=spec["head_dim"],
            tie_word_embeddings=spec["tie_embeddings"],
        )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if spec["checkpoint"]:
        model.gradient_checkpointing_enable()
    return model.train()


class Trainer:
    """Training step with its model, optimizer and batch."""

    def __init__(self, spec: dict[str, Any]):
        self._spec = spec
        self._device = "cuda" if torch.cuda.is_available() and spec["platform"] == "gpu" else "cpu"
        torch.manual_seed(0)
        model = make_model(spec).to(self._device)
        self._params = list(model.parameters())
        groups = [
            {"params": [p for p in self._params if p.ndim >= 2], "weight_decay": spec["weight_decay"]},
            {"params": [p for p in self._params if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(spec["b1"], spec["b2"]), fused=True)
        shape = (spec["accumulate"], spec["batch_size"] // spec["accumulate"], spec["seq_len"] + 1)
        self._tokens = torch.randint(0, spec["vocab_size"], shape, device=self._device)

        def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=inputs).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

        self._loss = torch.compile(loss) if spec["compile"] else loss

    def step(self) -> torch.Tensor:
        """Trains on the batch; returns the loss of the last micro-batch without waiting for it."""
        spec = self._spec
        mixed = torch.autocast(self._device, torch.bfloat16) if spec["bfloat16"] else contextlib.nullcontext()
        self._optimizer.zero_grad(set_to_none=True)
        for tokens in self._tokens:
            with mixed:
                loss = self._loss(tokens[:, :-1], tokens[:, 1:]) / spec["accumulate"]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._params, spec["clip_norm"])
        self._optimizer.step()
        return loss.detach()

    def run(self, num_steps: int) -> list[float]:
        """Times each step; like the loop of jaxtrain, waits for the loss of the previous step. Returns seconds."""
        seconds, before, since = [], self.step(), time.perf_counter()
        before.item()
        for _ in range(num_steps):
            before, last = self.step(), before
            last.item()
            now = time.perf_counter()
            seconds.append(now - since)
            since = now
        before.item()
        return seconds

    def peak_bytes(self) -> int:
        """Returns the peak memory of the GPU, or of this process."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    begin = time.perf_counter()
    trainer = Trainer(json.loads(sys.argv[1]))
    trainer.run(2)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"ready": time.perf_counter() - begin, "versions": versions}), flush=True)
    for line in sys.stdin:
        seconds = trainer.run(int(line))
        print(json.dumps({"seconds": seconds, "peak_bytes": trainer.peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
