"""Launching jobs: emulated clusters (``emulate.py``), and readable recipes in ``recipes/``, shell scripts around torchrun."""
