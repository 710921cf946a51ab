"""Distributed distillation of reasoning language models on the ``ncclx`` backend."""
