"""The settings of the judges, and their checks."""
