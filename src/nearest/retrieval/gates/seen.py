"""What gates are trained on: predictions of held-out text with what the memory found for them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nearest.retrieval.gates.gate import View


class Seen(NamedTuple):
    """Some predictions of a text, the tokens that came, and the model's log-probability of them.

    `rows` numbers them in the text; the same text seen with other searches has the same numbers.
    """

    rows: Int[np.ndarray, " n"]
    view: View
    targets: Int[np.ndarray, " n"]
    lm_log_probs: Float[np.ndarray, " n"]  # nats
    documents: Int[np.ndarray, " n"]
