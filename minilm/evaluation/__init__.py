"""Measuring a model: losses of text (`score`), text of a model (`generate`), and the report of eval.py (`report`)."""
