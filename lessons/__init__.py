"""Lessons: write picotron_lab's techniques yourself; `python -m lessons` says where you are."""

from lessons.todo import TODO

__all__ = ["TODO"]
