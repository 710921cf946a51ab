"""What is raised when a plan is wrong, cannot be made, or cannot be read."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan is wrong or cannot be made; the message names the rank and the step, or the algorithm and the reason."""


class PlanFileError(PlanError):
    """A plan file cannot be used; the message names the file and the place in it."""
