"""What stages share that train on answers of their own policy.

Importing a module of it imports torch.
"""
