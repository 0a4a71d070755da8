"""Published perplexities over the fraction of saved searches, to stand beside measured ones.

They are of other models and corpora: their shape can be compared, their numbers cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nearest.errors import SettingError


@dataclass(frozen=True)
class Published:
    """Validation perplexities of one corpus, as reported in a paper.

    Attributes:
        curves: (FoSS, perplexity) of each method; a FoSS of None where only the best is given.
    """

    corpus: str
    source: str
    base: float
    knn: float
    curves: Mapping[str, tuple[tuple[float | None, float], ...]]


_SOURCE = "Alon et al., 2022, arXiv:2201.12431"

PUBLISHED: Mapping[str, Published] = {
    "wikitext-103": Published(
        "WikiText-103",
        _SOURCE,
        base=18.66,
        knn=16.65,
        curves={
            "RetoMaton": ((0.0, 16.08), (0.45, 16.27), (0.61, 16.37), (0.81, 16.65)),
            "AdaptRet": ((None, 16.35),),
        },
    ),
    "law-mt": Published(
        "Law-MT",
        _SOURCE,
        base=106.56,
        knn=12.34,
        curves={
            "RetoMaton": (
                (0.0, 10.49),
                (0.35, 10.70),
                (0.53, 10.89),
                (0.73, 11.25),
                (0.83, 11.98),
            ),
            "AdaptRet": ((None, 12.01),),
        },
    ),
}


def published_named(names: Sequence[str]) -> list[Published]:
    """Published figures by name, in the order given and each once.

    Raises:
        SettingError: there are none of this name.
    """
    for name in names:
        if name not in PUBLISHED:
            raise SettingError(
                f"no published figures are called {name!r}: choose among {', '.join(PUBLISHED)}"
            )
    return [PUBLISHED[name] for name in dict.fromkeys(names)]
