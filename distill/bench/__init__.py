"""What BENCHMARKS.md reports of the trainer, one module per table: ``python -m distill.bench.NAME --help`` says what it measures.

``training`` an on-policy step beside TRL's, ``teachers`` separate ranks, ``cache``, ``server``, ``loss_path`` with and without
logits, ``checkpoints`` and ``replicas`` under kills, ``gradient_variance`` of aggregations, ``recording`` what the trace
costs a step. Rollouts have theirs in ``distill.rollouts``, kernels in ``distill.kernels``.
"""
