"""The command line: one command for every job."""

from . import bench, chat, judge, run  # each puts its commands into the application
from .app import main

__all__ = ["bench", "chat", "judge", "main", "run"]
