"""The methods, each a `Recipe`: a Module whose forward is the training loss."""

from gta2cs.recipes.base import Draws, Losses, Recipe
from gta2cs.recipes.dacs import Dacs
from gta2cs.recipes.self_training import Selection, SelfTraining
from gta2cs.recipes.source_only import SourceOnly

RECIPES: dict[str, type[Recipe]] = {"source_only": SourceOnly, "dacs": Dacs}

__all__ = ["RECIPES", "Dacs", "Draws", "Losses", "Recipe", "Selection", "SelfTraining", "SourceOnly"]
