"""Launching jobs: readable recipes in ``recipes/``, each a shell script around torchrun."""
