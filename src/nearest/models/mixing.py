"""Mix a forward pass's logits with the memories' predictions."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from nearest.encode.view import lm_view
from nearest.models.prefixes import LookupSpans, Prefixes, rows_of
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.queries import Queries
from nearest.retrieval.step import State, step


def mix_states(
    ensemble: Ensemble,
    hidden: Float[Tensor, "*states dim"],
    logits: Float[Tensor, "*shape vocab"],
) -> Float[Tensor, "*shape vocab"]:
    """The mixture where hidden states are all it takes; they are those of the logits."""
    log_probs = logits.float().log_softmax(-1).reshape(-1, logits.shape[-1])
    keys = hidden.reshape(len(log_probs), -1).float().cpu().numpy()
    view = lm_view(log_probs) if ensemble.needs_lm else None
    none = np.empty(0, dtype=np.int64)
    queries = Queries(keys, none, np.zeros(len(keys), np.int64), view)
    start = State.start(len(keys))
    predicted = [step(lookup, queries, start).log_probs(log_probs) for lookup, _ in ensemble.used]
    return ensemble.mixed(predicted, log_probs).reshape(logits.shape)


def mix_rows(
    ensemble: Ensemble,
    spans: LookupSpans,
    prefixes: Sequence[Prefixes] | None,
    hidden: Float[Tensor, "rows states dim"],
    logits: Float[Tensor, "*shape vocab"],
    keep: int | Tensor,
) -> Float[Tensor, "*kept vocab"]:
    """The mixture where methods look at the tokens before; the base's alone before the first.

    Args:
        ensemble: the memories.
        spans: the positions of the pass that are looked up.
        prefixes: of each memory that is used; None for a call that no other goes on from.
        hidden, logits: of the pass's last columns.
        keep: the caller's logits_to_keep.
    """
    kept = slice_logits_to_keep(logits, keep)
    log_probs = kept.float().log_softmax(-1).reshape(-1, kept.shape[-1])
    these = spans.looked_up(
        hidden, logits, log_probs, with_view=ensemble.needs_lm, with_lm=ensemble.guards
    )
    shown = these.returned[these.returned >= 0]
    if not len(shown):
        return log_probs.reshape(kept.shape)
    base = rows_of(log_probs, shown)
    followed = prefixes or [Prefixes(lookup) for lookup, _ in ensemble.used]
    predicted = [one.mix(these, base, follow=prefixes is not None) for one in followed]
    mixed = ensemble.mixed(predicted, base)
    if base is not log_probs:
        whole = log_probs.clone()  # what gradients need stays as it is
        whole[torch.from_numpy(shown).to(whole.device)] = mixed
        mixed = whole[torch.from_numpy(spans.filled).to(whole.device)]
    return mixed.reshape(kept.shape)


def logits_needed(ensemble: Ensemble, spans: LookupSpans, keep: int | Tensor, *, cut: bool) -> int:
    """How many logits to ask the model for, of the last columns; 0 for all.

    At least those that are kept; where more columns are looked up, also theirs when they are needed
    too, or when the key is the head's own input, which the model cuts as it does its output
    (`cut`).
    """
    if not isinstance(keep, int) or keep == 0:
        return 0
    needed = cut or ensemble.needs_lm or ensemble.guards
    return max(keep, spans.reach) if needed else keep
