"""Models and the roles that they play: adapters on one trunk, log-probabilities, number formats and devices.

Importing a module of it imports torch.
"""
