"""Pseudo-label selectors: logits in, labels with ignore, confidence and weight out."""

__all__: list[str] = []
