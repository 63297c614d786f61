"""What stages share that train on answers of their own policy.

Importing a module of it imports torch.
"""

from alignkit.online.roles_trainer import RolesTrainer

__all__ = ["RolesTrainer"]
