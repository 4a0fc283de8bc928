"""A warning that a generator has lost diversity, which says what was seen, what it means and what to try."""

import math
from collections.abc import Mapping

_LEAST_COVERAGE = 0.2
_LEAST_DENSITY = 0.5
_LEAST_SPREAD = 0.1
_FEWEST_CLASSES = 0.5


def mode_collapse(scores: Mapping[str, float]) -> str | None:
    """The text of a warning for ``scores`` as :class:`GenerationScores` gives them, or None where nothing is amiss.

    Three signs, each of which leaves out what a generator does that has just begun to learn only if asked late enough:
    after the discriminator has seen the data once.

    - ``val/spread`` below 0.1: the samples vary less than a tenth as much as real images.
    - ``val/coverage`` below 0.2 at a ``val/density`` above 0.5: samples are where real images are, but only where few
      of them are. As good as real samples have 0.875 and 1.
    - ``val/reverse_kl`` above log 2: as if less than half of the classes appeared.
    """
    seen = [*_alike(scores), *_uncovered(scores), *_classes_missing(scores)]
    if not seen:
        return None
    return (
        f"mode collapse: {'; '.join(seen)}. The generator answers different latents with samples that are too much "
        "alike, which no single sample betrays to the discriminator. To try: the relativistic loss (--loss r3) with "
        "both penalties (--r1, --r2), larger penalties, a lower learning rate of both networks, --augment where there "
        "are few images, labels where there are some (--num_classes)"
    )


def _alike(scores: Mapping[str, float]) -> list[str]:
    spread = scores.get("val/spread", math.nan)
    if not spread < _LEAST_SPREAD:
        return []
    return [f"samples vary {spread:.1%} as much as real images do (val/spread)"]


def _uncovered(scores: Mapping[str, float]) -> list[str]:
    coverage, density = (scores.get(f"val/{name}", math.nan) for name in ("coverage", "density"))
    if not (coverage < _LEAST_COVERAGE and density > _LEAST_DENSITY):
        return []
    return [
        f"samples lie among real images (val/density {density:.2f}) but near {coverage:.0%} of them alone "
        "(val/coverage; 88% is perfect)"
    ]


def _classes_missing(scores: Mapping[str, float]) -> list[str]:
    share = math.exp(-scores.get("val/reverse_kl", math.nan))
    if not share < _FEWEST_CLASSES:
        return []
    return [f"their classes are spread as if over {share:.1%} of the data's classes (exp of minus val/reverse_kl)"]
