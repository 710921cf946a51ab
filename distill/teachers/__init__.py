"""Teachers: where they run, what they say about each token, and how that reaches the student's ranks.

    teachers = open_teachers(config, parts)       # in process, on ranks of their own, behind a server, or from a cache
    teachers.submit(batches)                      # the micro-batches of a step
    for batch in batches:
        signal, reference = teachers.take(batch)  # `Signal`: logits, hidden states, top-k or the sampled token

``signals`` says what a signal is, ``base`` what a placement must do, ``open`` which one a configuration means.
"""
