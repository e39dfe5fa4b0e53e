"""Class means of features, and class prototypes that follow them."""

from udakit.prototypes.class_prototypes import ClassPrototypes
from udakit.prototypes.means import class_means

__all__ = ["ClassPrototypes", "class_means"]
