"""Rollouts: prompts → responses from a causal LM, with a key-value cache of per-row lengths."""

from distill.rollouts.generator import Generator
from distill.rollouts.rollout import Rollout
from distill.rollouts.sampling import SamplingParams

__all__ = ["Generator", "Rollout", "SamplingParams"]
