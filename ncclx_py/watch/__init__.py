"""What went wrong, and who did it: the trace of every collective, its dumps, and the verdict over them.

Writing side, in the running process: ``trace`` (the last calls, in a ``ring``), ``triggers`` (when a dump is written),
``dump`` (the files) and ``record`` (one call as text). Reading side, from the files alone: ``chrome`` and what
``ncclx diagnose`` is made of.
"""
