"""Parts for unsupervised domain adaptive semantic segmentation, as functions and Modules on tensors."""

from udakit import (
    binary,
    features,
    labels,
    losses,
    mixing,
    norms,
    prototypes,
    pseudo_labels,
    resolution,
    sampling,
    teachers,
    validation,
)
from udakit.binary import *  # noqa: F403
from udakit.features import *  # noqa: F403
from udakit.labels import *  # noqa: F403
from udakit.losses import *  # noqa: F403
from udakit.mixing import *  # noqa: F403
from udakit.norms import *  # noqa: F403
from udakit.prototypes import *  # noqa: F403
from udakit.pseudo_labels import *  # noqa: F403
from udakit.resolution import *  # noqa: F403
from udakit.sampling import *  # noqa: F403
from udakit.teachers import *  # noqa: F403
from udakit.validation import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "binary",
    "features",
    "labels",
    "losses",
    "mixing",
    "norms",
    "prototypes",
    "pseudo_labels",
    "resolution",
    "sampling",
    "teachers",
    "validation",
]
__all__ += binary.__all__
__all__ += features.__all__
__all__ += labels.__all__
__all__ += losses.__all__
__all__ += mixing.__all__
__all__ += norms.__all__
__all__ += prototypes.__all__
__all__ += pseudo_labels.__all__
__all__ += resolution.__all__
__all__ += sampling.__all__
__all__ += teachers.__all__
__all__ += validation.__all__
