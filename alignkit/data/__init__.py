"""From files, folders and the hub to rows, and from rows to token ids.

Nothing here imports torch at the top.
"""

from alignkit.data.reading import READERS, Located, Rows, WrongKindError, fingerprint, hold_out, load, read

__all__ = ["READERS", "Located", "Rows", "WrongKindError", "fingerprint", "hold_out", "load", "read"]
