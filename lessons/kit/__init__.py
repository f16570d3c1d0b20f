"""The lesson kit: what the test file of a lesson and the mutants of a lesson import."""

from lessons.kit.tasks import Lesson, mutant, task

__all__ = ["Lesson", "mutant", "task"]
