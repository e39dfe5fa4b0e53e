"""Masks, pasting, class mix, style transfer and strong augmentation on batches."""

__all__: list[str] = []
