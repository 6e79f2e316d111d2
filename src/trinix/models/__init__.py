"""A reference decoder built from ``trinix.layers``, in one file, and a text small enough to train it on a CPU."""

from trinix.models.decoder import Config, Decoder, deepseek, gpt, llama, tiny_text, train

__all__ = ["Config", "Decoder", "deepseek", "gpt", "llama", "tiny_text", "train"]
