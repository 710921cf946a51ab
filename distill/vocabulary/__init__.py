"""A student whose head (and embedding, where the two are tied) is split by vocabulary over a group of ranks.

Ranks train on different tokens, as always; within a group of ``engine.vocab_parallel`` neighbours each holds V/P rows of
the head, with their gradients and optimizer states. For the loss the group's hidden states come together, every rank compares its
rows of the vocabulary for all of the group's tokens, and each rank gets the losses and the hidden gradients of its own:

    ``group``       which ranks, which rows
    ``modules``     the split embedding and head, and how a model gets them
    ``divergence``  the loss from hidden states and the parts of both heads
    ``training``    what an optimizer step and a checkpoint need to know about parameters that differ between ranks
"""
