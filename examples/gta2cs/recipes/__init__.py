"""The methods. Each is a `Recipe`, a Module whose forward returns the training loss."""

from gta2cs.recipes.base import Draws, Losses, Preparation, Recipe, Shared
from gta2cs.recipes.combined import Combined
from gta2cs.recipes.dacs import Dacs
from gta2cs.recipes.diga import Diga, DigaWarmup
from gta2cs.recipes.duda import Duda, DudaPre
from gta2cs.recipes.ehtdi import Ehtdi
from gta2cs.recipes.self_training import Selection, SelfTraining, TargetStyled
from gta2cs.recipes.source_only import SourceOnly

RECIPES: dict[str, type[Recipe]] = {
    "source_only": SourceOnly,
    "dacs": Dacs,
    "combined": Combined,
    "diga_warmup": DigaWarmup,
    "diga": Diga,
    "ehtdi": Ehtdi,
    "duda_pre": DudaPre,
    "duda": Duda,
}

__all__ = [
    "RECIPES",
    "Combined",
    "Dacs",
    "Diga",
    "DigaWarmup",
    "Draws",
    "Duda",
    "DudaPre",
    "Ehtdi",
    "Losses",
    "Preparation",
    "Recipe",
    "Selection",
    "SelfTraining",
    "Shared",
    "SourceOnly",
    "TargetStyled",
]
