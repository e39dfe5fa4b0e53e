"""The methods, each a `Recipe`: a Module whose forward is the training loss."""

from gta2cs.recipes.base import Draws, Losses, Recipe
from gta2cs.recipes.dacs import Dacs
from gta2cs.recipes.diga import Diga, DigaWarmup
from gta2cs.recipes.self_training import Selection, SelfTraining
from gta2cs.recipes.source_only import SourceOnly

RECIPES: dict[str, type[Recipe]] = {
    "source_only": SourceOnly,
    "dacs": Dacs,
    "diga_warmup": DigaWarmup,
    "diga": Diga,
}

__all__ = [
    "RECIPES",
    "Dacs",
    "Diga",
    "DigaWarmup",
    "Draws",
    "Losses",
    "Recipe",
    "Selection",
    "SelfTraining",
    "SourceOnly",
]
