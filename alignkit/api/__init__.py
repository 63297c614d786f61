"""The functions that ``alignkit`` has for Python and notebooks; :mod:`alignkit` imports them on first use.

They take the settings of the command line, and share its code below the command line itself.
"""

__all__: list[str] = []
