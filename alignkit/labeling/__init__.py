"""People rank answers in a browser: the store of what they submit, the server of the page, agreement between labelers.

No module here imports torch.
"""

from typing import TYPE_CHECKING

from alignkit.lazy import lazy_imports

__all__ = ["Agreement", "cohen_kappa", "krippendorff_alpha", "pair_agreement", "preferences"]

if TYPE_CHECKING:
    from alignkit.labeling.agreement import (
        Agreement,
        cohen_kappa,
        krippendorff_alpha,
        pair_agreement,
        preferences,
    )
else:
    __getattr__, __dir__ = lazy_imports(__name__, __file__)
