"""Lend a model a memory: every forward pass then predicts with both, until it is given back.

The mixture is made of the model's final logits, after soft caps, scalings and biases. It is made in
`forward`, not in a logits processor: those run after the ones that ban tokens, and see only the
last position, while assisted decoding scores several.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from nearest.build.match import common_key_layer, refuse_attached
from nearest.encode.forward import encode_and_score
from nearest.encode.identity import AnyModel, bare_model
from nearest.encode.layers import input_hook
from nearest.encode.view import lm_view
from nearest.errors import ModelError, NearestError, SettingError
from nearest.models.arguments import TextArguments
from nearest.models.generated import Generated, Prompt
from nearest.models.prefixes import LookupSpans, Prefixes, Sequences, row_hashes
from nearest.models.sources import TokenSources, token_sources
from nearest.retrieval.ensemble import Ensemble, Memories
from nearest.retrieval.queries import Queries
from nearest.retrieval.settings import MEMORY_METHODS, Settings, check_method

_BATCHING = "init_continuous_batching"  # what generate_batch and its kin begin with


def attach(
    model: AnyModel,
    memory: Memories,
    method: str = "knn",
    *,
    weights: Sequence[float] | None = None,
    tokenizer: Any = None,
    force: bool = False,
    replay: int | str = 0,
    **settings: Any,
) -> "Session":
    """Attach memories to a Hugging Face language model; use as a context manager.

    Greedy search, sampling, beams, left-padded batches, assisted decoding and plain calls of the
    model then predict with the memory; continuous batching does with methods that need hidden
    states alone. A model that PEFT or torch.compile has wrapped is attached with its adapters as
    they are then. Leaving the context gives the model back unchanged.

    Args:
        model: the model that built the memory, in evaluation mode.
        memory: what to look up.
        method: "knn" (kNN-LM), "retomaton", "suffix", "hybrid" or one with another gate.
        weights: of several memories, summing to at most 1: the prediction is Σ w_m·p_m, p_m what
            the model predicts with memory m alone, and the rest the model's own. Equal ones when
            not given.
        tokenizer: checked against the memory's where given.
        force: accept another model than the one that built the memory.
        replay: how many of a prompt's positions are looked up before the last, for a method that
            keeps state; "full" for all of them, as `evaluate` does.
        **settings: of the method (`retrieval.settings.Settings`); what is not given comes from
            `tune`'s result in the memory, else from the paper's defaults.

    Raises:
        ModelError: the model does not fit the memory.
        SettingError: a setting is unknown or out of range, or the model has a memory attached.
    """
    check_method(method, MEMORY_METHODS)
    if replay != "full" and not (isinstance(replay, int) and replay >= 0):
        raise SettingError(f'replay must be a number of positions or "full", got {replay!r}')
    ensemble = Ensemble.of(memory, method, weights, **settings)
    return Session(model, ensemble, tokenizer, force, replay)


class Session:
    """An attached memory; see `attach`."""

    def __init__(
        self,
        model: AnyModel,
        ensemble: Ensemble,
        tokenizer: Any = None,
        force: bool = False,
        replay: int | str = 0,
    ) -> None:
        self.model = model = bare_model(model)
        refuse_attached(model)
        self._ensemble = ensemble
        memories = [lookup.memory for lookup in ensemble.lookups]
        self._layer = common_key_layer(memories, model, tokenizer, force=force)
        self._replay = sys.maxsize if replay == "full" else int(replay)
        self._here = _Here()
        self._generate_lock = threading.Lock()
        self._generated: Generated | None = None
        self._text = TextArguments.of(model)
        self._hook = input_hook(self._layer.module, self._here.see)
        names = ("forward", "prepare_inputs_for_generation", "generate")
        self._replaced = {name: vars(model).get(name) for name in names}
        vars(model)["forward"] = self._wrap_forward(model.forward)
        vars(model)["prepare_inputs_for_generation"] = self._wrap_prepare(
            cast(Any, model.prepare_inputs_for_generation)
        )
        vars(model)["generate"] = self._wrap_generate(cast(Any, model.generate))
        if any(lookup.needs_context for lookup in ensemble.lookups):
            self._replaced[_BATCHING] = vars(model).get(_BATCHING)
            vars(model)[_BATCHING] = self._refuse_batching

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def settings(self) -> Settings:
        """λ, temperature and whatever else is in use, of the first memory."""
        return self._ensemble.lookups[0].settings

    @property
    def ensemble(self) -> Ensemble:
        """The memories as this thread uses them."""
        return self._here.ensemble or self._ensemble

    def _refuse_batching(self, *_: Any, **__: Any) -> Any:
        raise ModelError(
            f"{self._ensemble.lookups[0].method} looks at the tokens before a prediction, and "
            "continuous batching (generate_batch) does not show them: use model.generate, or a "
            "method that needs hidden states alone, such as knn without guard and length_power"
        )

    def detach(self) -> None:
        """Give the model back as it was; harmless when done twice."""
        self._hook.remove()
        for name, original in self._replaced.items():
            vars(self.model).pop(name, None)
            if original is not None:
                vars(self.model)[name] = original
        self._replaced = {}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone in this thread, for as long as the context lasts."""
        before, self._here.base_only = self._here.base_only, True
        try:
            yield
        finally:
            self._here.base_only = before

    @contextmanager
    def weighted(self, *weights: float) -> Iterator[None]:
        """Other weights of the memories in this thread, for as long as the context lasts.

        Weight 0 turns a memory off.

        Raises:
            SettingError: the weights are not one for each memory, or sum to more than 1.
        """
        before, self._here.ensemble = self._here.ensemble, replace(self._ensemble, weights=weights)
        try:
            yield
        finally:
            self._here.ensemble = before

    def sources(self, row: int = 0) -> list[TokenSources]:
        """Where each new token of a row of the last `generate` came from.

        Computed from the finished sequence by one pass of the base model over it: a prediction
        depends on its prefix alone, so this is what was mixed while generating, whichever way.

        Raises:
            NearestError: nothing was generated yet, or the prompt was given as embeddings or as an
                encoder's outputs.
            IndexError: there is no such row.
        """
        if self._generated is None:
            raise NearestError(
                "nothing to name sources of: call model.generate with input_ids first (embeddings "
                "and encoder_outputs cannot be read again)"
            )
        tokens, prompt_length, read = self._generated.row(row)
        if len(tokens) == prompt_length:
            return []
        inputs = tokens[None, :-1]
        replayed = self._replay if self.ensemble.keeps_state else 0
        first = max(0, prompt_length - 1 - replayed)
        wanted = torch.zeros(inputs.shape, dtype=torch.bool)
        wanted[:, first:] = True
        targets = tokens[first + 1 :].numpy()
        with self.disabled():
            keys, lm_log_probs, view = encode_and_score(
                self.model,
                self._layer,
                inputs.numpy(),
                wanted.numpy(),
                targets,
                self.ensemble.needs_lm,
                read,
            )
        queries = Queries(keys.numpy(), tokens.numpy(), np.arange(first, len(tokens) - 1), view)
        skipped = prompt_length - 1 - first
        return token_sources(self.ensemble, queries, targets, lm_log_probs, skipped)

    def _wrap_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        parameters = tuple(inspect.signature(original).parameters)

        @functools.wraps(original)  # generate() reads the signature to decide what to pass
        def forward(*args: Any, **kwargs: Any) -> Any:
            here = self._here
            ensemble = self.ensemble
            if here.base_only or not ensemble.used:
                return original(*args, **kwargs)
            as_tuple = kwargs.pop("return_dict", None) is False
            named = dict(zip(parameters, args, strict=False)) | kwargs
            shape, keep = self._text.shape(named), named.get("logits_to_keep", 0)
            sequences, here.sequences = here.sequences, None
            # A call between the steps of generate(), as for guidance, has a state of its own.
            prefixes = here.prefixes if sequences else None
            this = None
            if ensemble.needs_context:
                sequences = sequences or Sequences.of_call(self._text, named)
                this = LookupSpans(sequences, shape[1], keep, ensemble.keeps_state)
                if "logits_to_keep" in parameters:
                    kwargs["logits_to_keep"] = self._wider(this, keep)
            output, hidden = here.seen_in(original, *args, return_dict=True, **kwargs)
            if this is None:
                output.logits = self._mix(self._queries(hidden, shape, keep), output.logits)
            else:
                hidden = hidden.reshape(shape[0], -1, hidden.shape[-1])
                output.logits = self._mix_rows(this, prefixes, hidden, output.logits, keep)
            if named.get("labels") is not None:
                rest = {name: value for name, value in kwargs.items() if name not in parameters}
                output.loss = self._text.loss(output.logits, named["labels"], rest)
            return output.to_tuple() if as_tuple else output

        # Neither look-ups nor hooks can be traced: attached, a model runs as it is written.
        untraced: Callable[..., Any] = torch.compiler.disable(forward)
        untraced.nearest_session = self  # type: ignore[attr-defined]
        return untraced

    def _queries(
        self, hidden: Tensor, shape: torch.Size, keep: int | Tensor
    ) -> Float[Tensor, "q dim"]:
        """Captured states of the positions that get logits, in their order."""
        if self._layer.name == "last_ffn_input":  # the head's own input is cut already
            hidden = slice_logits_to_keep(hidden.reshape(*shape, -1), keep)
        return hidden.reshape(-1, hidden.shape[-1])

    def _mix(
        self, hidden: Float[Tensor, "q dim"], logits: Float[Tensor, "*shape vocab"]
    ) -> Float[Tensor, "*shape vocab"]:
        """Log-probabilities of base and memory together, where hidden states are all it takes."""
        keys, ensemble = hidden.float().cpu().numpy(), self.ensemble
        none = np.empty(0, dtype=np.int64)
        log_probs = logits.float().log_softmax(-1).reshape(len(keys), -1)
        view = lm_view(log_probs) if ensemble.needs_lm else None
        queries = Queries(keys, none, np.zeros(len(keys), np.int64), view)
        predicted = [
            lookup.log_probs(queries, lookup.candidates(queries), log_probs)
            for lookup, _ in ensemble.used
        ]
        return ensemble.mixed(predicted, log_probs).reshape(logits.shape)

    def _mix_rows(
        self,
        spans: LookupSpans,
        prefixes: Sequence[Prefixes] | None,
        hidden: Float[Tensor, "rows states dim"],
        logits: Float[Tensor, "*shape vocab"],
        keep: int | Tensor,
    ) -> Float[Tensor, "*kept vocab"]:
        """Log-probabilities of base and memory together; the base's alone before the first.

        `prefixes` are None for a call that no other goes on from.
        """
        ensemble = self.ensemble
        kept = slice_logits_to_keep(logits, keep)
        log_probs = kept.float().log_softmax(-1).reshape(-1, kept.shape[-1])
        these = spans.looked_up(
            hidden, logits, log_probs, with_view=ensemble.needs_lm, with_lm=ensemble.guards
        )
        shown = these.returned[these.returned >= 0]
        if not len(shown):
            return log_probs.reshape(kept.shape)
        everywhere = np.array_equal(shown, np.arange(len(log_probs)))
        at = torch.from_numpy(shown).to(log_probs.device)
        base = log_probs if everywhere else log_probs[at]
        followed = prefixes or [Prefixes(lookup) for lookup, _ in ensemble.used]
        predicted = [one.mix(these, base, follow=prefixes is not None) for one in followed]
        mixed = ensemble.mixed(predicted, base)
        if not everywhere:
            whole = log_probs.clone()  # what gradients need stays as it is
            whole[at] = mixed
            mixed = whole[torch.from_numpy(spans.filled).to(whole.device)]
        return mixed.reshape(kept.shape)

    def _wider(self, this: LookupSpans, keep: int | Tensor) -> int:
        """How many logits to ask for, of the last columns; 0 for all.

        At least those that are kept; where more columns are looked up, also theirs when the head's
        own input is the key (it is cut as its output is), or when their logits are needed too.
        """
        if not isinstance(keep, int) or keep == 0:
            return 0
        ensemble = self.ensemble
        needed = self._layer.name == "last_hidden" or ensemble.needs_lm or ensemble.guards
        return max(keep, this.reach) if needed else keep

    def _wrap_prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def prepare(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            here = self._here
            if here.prefixes is not None:
                cache = kwargs.get("past_key_values")
                past = 0 if cache is None else int(cache.get_seq_length())
                if here.ids is None and past > here.first:
                    raise ModelError(
                        "past_key_values stand for positions of the prompt that are to be looked "
                        "up: give the whole sequence as input_ids and replay fewer positions, or "
                        "leave the cache out"
                    )
                if past and kwargs.get("next_sequence_length") is None and here.ids is not None:
                    here.ids = torch.cat([here.ids, ids], dim=1)  # a long prompt, in pieces
                else:
                    here.ids = ids  # of the whole sequences: beams in order, drafts at the end
                mask = kwargs.get(self._text.mask)
                if mask is not None:
                    mask = mask[:, : here.ids.shape[1]]
                sources = here.sources_of(kwargs.get("encoder_outputs"))
                here.sequences = Sequences.of(here.ids, mask, here.first, sources)
            return original(ids, *args, **kwargs)

        return prepare

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._generate_lock.acquire(blocking=False):
                raise NearestError(
                    "this attached model is generating already: wait for it, or attach the memory "
                    "to another copy of the model"
                )
            try:
                self._generated = None
                named = signature.bind_partial(*args, **kwargs).arguments
                named |= named.pop("kwargs", {})
                prompt = Prompt.of(self._text, named)
                with self._following(prompt):
                    output = original(*args, **kwargs)
                self._generated = Generated.of(output, self.model, prompt, named)
                return output
            finally:
                self._generate_lock.release()

        return generate

    @contextmanager
    def _following(self, prompt: Prompt) -> Iterator[None]:
        """Know the sequences of the passes that generate() makes in this thread."""
        here = self._here
        if self.ensemble.needs_context:
            here.prefixes = [Prefixes(lookup) for lookup, _ in self.ensemble.used]
            replayed = self._replay if self.ensemble.keeps_state else 0
            here.first = max(0, prompt.length - 1 - replayed)
        try:
            yield
        finally:
            here.prefixes = here.ids = here.sequences = here.encoded = None


class _Here(threading.local):
    """What one thread is about: its passes are not to be mixed up with another's."""

    base_only = False
    seen: list[Tensor] | None = None  # what went into the key layer, during a pass
    ensemble: Ensemble | None = None  # where this thread weighs the memories otherwise
    # Of each memory, while generating with a method that looks at the context.
    prefixes: list[Prefixes] | None = None
    first = 0
    ids: Tensor | None = None
    sequences: Sequences | None = None
    encoded: tuple[Tensor, Int[np.ndarray, " rows"]] | None = None  # what an encoder gave, hashed

    def see(self, states: Tensor) -> None:
        """Keep what goes into the key layer, where this thread wants to know."""
        if self.seen is not None:
            self.seen.append(states)

    def seen_in(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """What a pass gives, and what went into the key layer."""
        self.seen = []
        try:
            return forward(*args, **kwargs), self.seen[0]
        finally:
            self.seen = None

    def sources_of(self, outputs: Any) -> Int[np.ndarray, " rows"] | None:
        """Numbers that tell apart what an encoder gave to each row; hashed once a generate()."""
        if outputs is None:
            return None
        states = outputs[0]
        if self.encoded is None or self.encoded[0] is not states:
            self.encoded = states, row_hashes(states)
        return self.encoded[1]
