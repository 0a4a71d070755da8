"""The report's plots, as SVG elements to stand inside a page. Needs matplotlib (extra: plots)."""

import matplotlib

from nearest import plots
from nearest.pages.figures import STYLE, svg
from nearest.verbs.results import Result
from nearest.verbs.settings_search import Tuned


def tuning_plot(tuned: Tuned) -> str:
    """Perplexity on the tuning text against λ, a line a temperature, the best settings marked."""
    with matplotlib.rc_context(STYLE):
        return svg(
            plots.tuning(tuned), "Perplexity against the weight of the memory, by temperature"
        )


def documents_plot(names: list[str], base: Result, knn: Result) -> str:
    """Change in nll a token of every scored document, the largest gain on top."""
    with matplotlib.rc_context(STYLE):
        drawn = plots.documents(base, knn, names)
        return svg(drawn, "Change in negative log-likelihood of every test topic")
