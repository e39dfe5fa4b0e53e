"""Losses on tensors: a function and a Module each."""

from udakit.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from udakit.losses.kd import KDLoss, kd_loss

__all__ = ["CrossEntropyLoss", "KDLoss", "cross_entropy", "kd_loss"]
