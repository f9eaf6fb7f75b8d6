"""The command line."""

from .run import app, main

__all__ = ["app", "main"]
