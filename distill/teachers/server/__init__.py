"""A teacher behind a server (``teacher.placement=server``): any OpenAI-compatible endpoint that returns prompt log-probabilities.

    teacher = open_server(config, parts)      # finds the servers, asks the probe, refuses what does not fit
    teacher.submit(batches)                   # each sequence becomes a request; answers come back in the order of the batches

`question` is one request and what its answer must hold, `probe` sees at the start (and after each failure) that a server says what
the run needs, `pool` spreads requests over the servers and waits for those that are away, `scorer` is the ``Scorer``. How to use
it: ``docs/teachers.md``.
"""

from distill.teachers.server.opening import open_server as open_server
