"""Class means of features, and class prototypes and distributions that are updated with them."""

from udakit.prototypes.class_distributions import ClassDistributions
from udakit.prototypes.class_prototypes import ClassPrototypes
from udakit.prototypes.means import class_means

__all__ = ["ClassDistributions", "ClassPrototypes", "class_means"]
