"""Models of Hugging Face's transformers: their configs, the names of their tensors, and their safetensors files."""
