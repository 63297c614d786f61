"""What a command will do and what it leaves: plans, lineage, run folders, fingerprints, and going on with a run.

Nothing here imports torch at the top.
"""
