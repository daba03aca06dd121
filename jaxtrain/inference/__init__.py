"""Use of a trained model: loading, generated text, prompts and chat, evaluation harnesses."""
