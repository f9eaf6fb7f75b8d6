"""The decode loop: a model's own tokens, drafted by its sketch and checked by the model."""

from .engine import Engine, Result, Stream

__all__ = ["Engine", "Result", "Stream"]
