"""One run of one stage: where hooks meet a run, and what every trainer has beside its own loss.

Importing a module of it imports torch.
"""
