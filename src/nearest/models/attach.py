"""Lend a model a memory: every forward pass then predicts with both, until it is given back.

The mixture is made of the model's final logits (after soft caps, scaling, bias) in `forward`, not
in a logits processor: those run after the ones that ban tokens, and see the last position only.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from nearest.build.match import common_key_layer, refuse_attached, refuse_pickling
from nearest.encode.forward import encode_and_score
from nearest.encode.hooks import captured_input, hooked, without_input_hook
from nearest.encode.identity import AnyModel, bare_model
from nearest.errors import ModelError, NearestError, SettingError, warn_caller
from nearest.models.arguments import TextArguments
from nearest.models.drafting import Drafter, Experience, can_draft
from nearest.models.generated import TWO_STARTS, Generated, Prompt, begins_twice
from nearest.models.mixing import logits_needed, mix_rows, mix_states
from nearest.models.prefixes import LookupSpans, Prefixes, Sequences
from nearest.models.sources import TokenSources, token_sources
from nearest.models.thread_state import ThreadState
from nearest.retrieval.ensemble import Ensemble, Memories
from nearest.retrieval.queries import Queries, Sources
from nearest.retrieval.settings import MEMORY_METHODS, Settings, check_method
from nearest.store.tuned import SettingsFrom

_DRAFTING = "_get_candidate_generator"  # what assisted decoding asks for drafts
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
    draft: bool = False,
    settings: Settings | None = None,
    **given: Any,
) -> "Session":
    """Attach memories to a Hugging Face language model; use as a context manager.

    Greedy search, sampling, beams, left-padded batches, assisted decoding and plain calls of the
    model then predict with the memory, in any number of threads; continuous batching does with
    methods that need hidden states alone. The model's `logits` are then log-probabilities. A model
    that PEFT or torch.compile has wrapped is attached with its adapters as they are then. A
    `generate` that the model makes inside its own, to draft tokens, is the base model's, and a deep
    copy of the model is one without memory. Leaving the context gives the model back unchanged; so
    does `detach`.

    Args:
        model: the model that built the memory, in evaluation mode.
        memory: what to look up.
        method: "knn" (kNN-LM), "retomaton", "suffix", "hybrid" or one with another gate.
        weights: of several memories, summing to at most 1: the prediction is Σ w_m·p_m, with p_m
            that of memory m alone, and the rest the model's own; equal when not given.
        tokenizer: checked against the memory's where given.
        force: skip the checks that this model and tokenizer built the memory.
        replay: how many of a prompt's positions are looked up before the last, for a method that
            keeps state; "full" for all of them, as `evaluate` does.
        draft: let memory and text draft several tokens for the model to verify in one pass, where
            that is quicker, as a running estimate says. Greedy search gives the same text, and
            sampling the same distribution, but another text for the same seed. Only `generate`
            calls that write one text token by token are drafted for: no batches, beams, stops.
        settings: of the method, all of them, in place of those stored in the memory.
        **given: single settings, by the names of `Settings`, before all others. What neither gives
            comes from `tune`'s result in the memory, else from the paper's defaults.

    Raises:
        ModelError: the model does not fit the memory.
        SettingError: a setting is unknown or out of range, or the model has a memory attached.
    """
    check_method(method, MEMORY_METHODS)
    if replay != "full" and not (isinstance(replay, int) and replay >= 0):
        raise SettingError(f'replay must be a number of positions or "full", got {replay!r}')
    ensemble = Ensemble.of(memory, method, weights, settings, **given)
    return Session(model, ensemble, tokenizer, force, replay, draft=draft)


def detach(model: AnyModel) -> None:
    """Give a model back as it was before `attach`; harmless where no memory is attached."""
    session = getattr(bare_model(model).forward, "nearest_session", None)
    if session is not None:
        session.detach()


class Session:
    """An attached memory; see `attach`.

    Attributes:
        replay: how many of a prompt's positions are looked up before the last.
    """

    def __init__(
        self,
        model: AnyModel,
        ensemble: Ensemble,
        tokenizer: Any = None,
        force: bool = False,
        replay: int | str = 0,
        *,
        draft: bool = False,
    ) -> None:
        self.model = model = bare_model(model)
        refuse_attached(model)
        self._ensemble = ensemble
        memories = [lookup.memory for lookup in ensemble.lookups]
        self._start_token = memories[0].manifest.model.start_token
        self._layer = common_key_layer(memories, model, tokenizer, force=force)
        self.replay = sys.maxsize if replay == "full" else int(replay)
        self._drafts = draft
        self._here = ThreadState()
        self._last: Generated | None = None  # of whichever thread
        self._text = TextArguments.of(model)
        replaced: dict[str, Any] = {
            "forward": self._wrap_forward(model.forward),
            "__deepcopy__": self._copy,
            "__reduce_ex__": refuse_pickling,
        }
        if hasattr(model, "prepare_inputs_for_generation"):
            replaced["prepare_inputs_for_generation"] = self._wrap_prepare(
                cast(Any, model.prepare_inputs_for_generation)
            )
        if hasattr(model, "generate"):
            replaced["generate"] = self._wrap_generate(cast(Any, model.generate))
        if draft and hasattr(model, _DRAFTING):
            replaced[_DRAFTING] = self._wrap_drafting(getattr(model, _DRAFTING))
        if any(lookup.needs_context for lookup in ensemble.lookups):
            replaced[_BATCHING] = self._refuse_batching
        self._originals = {name: vars(model).get(name) for name in replaced}
        with ExitStack() as undo:
            undo.enter_context(hooked(self._layer.module))
            for name, replacement in replaced.items():
                undo.callback(_restore, vars(model), name, self._originals[name])
                vars(model)[name] = replacement
            self._undo = undo.pop_all()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def settings(self) -> Settings:
        """λ, temperature and whatever else is in use, of the first memory."""
        return self._ensemble.lookups[0].settings

    @property
    def settings_from(self) -> SettingsFrom:
        """Where settings come from that were not given for this call; see `Ensemble`."""
        return self._ensemble.settings_from

    def __repr__(self) -> str:
        first = self._ensemble.lookups[0]
        settings = ", ".join(f"{n}={v}" for n, v in first.settings.of(first.method).items())
        memories = ", ".join(str(lookup.memory.path) for lookup in self._ensemble.lookups)
        return f"Session({first.method} with {memories}; settings {self.settings_from}: {settings})"

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
        self._undo.close()

    def _copy(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the model, without the memory."""
        model: Any = self.model
        copied = model.__class__.__new__(model.__class__)
        memo[id(model)] = copied
        state = dict(vars(model))
        for name, original in self._originals.items():
            _restore(state, name, original)
        vars(copied).update(copy.deepcopy(state, memo))
        without_input_hook(copied.get_submodule(self._layer.path))
        return copied

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

        The last one of this thread counts, or of any where this thread made none. The finished
        sequence is read once more by the base model and predicted by the memories and weights of
        that call: a prediction depends on its prefix alone, so this is what was mixed then.

        Raises:
            NearestError: nothing was generated yet, or the prompt was given as embeddings or as an
                encoder's outputs.
            IndexError: there is no such row.
        """
        generated = self._here.generated or self._last
        if generated is None:
            raise NearestError(
                "nothing to name sources of: call model.generate with input_ids first (embeddings, "
                "encoder_outputs and what a cache stands for cannot be read again)"
            )
        tokens, prompt_length, read = generated.row(row)
        ensemble = generated.ensemble
        if ensemble is None or len(tokens) == prompt_length:
            return [TokenSources(int(token), 0.0, []) for token in tokens[prompt_length:]]
        inputs = tokens[None, :-1]
        replayed = self.replay if ensemble.keeps_state else 0
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
                ensemble.needs_lm,
                read,
            )
        ends = np.arange(first, len(tokens) - 1)
        sources = None if read is None else Sources(read.unpadded(), np.zeros_like(ends))
        queries = Queries(keys.numpy(), tokens.numpy(), ends, view, sources=sources)
        skipped = prompt_length - 1 - first
        return token_sources(ensemble, queries, targets, lm_log_probs, skipped)

    def _wrap_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)
        parameters = tuple(signature.parameters)

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
            spans, cut = None, self._layer.name == "last_hidden"  # the head's input, as it cuts it
            if ensemble.needs_context:
                sequences = sequences or Sequences.of_call(self._text, named)
                spans = LookupSpans(sequences, shape[1], keep, ensemble.keeps_state)
                if "logits_to_keep" in parameters:
                    kwargs["logits_to_keep"] = logits_needed(ensemble, spans, keep, cut=cut)
            with captured_input(self._layer.module) as seen:
                output = original(*args, return_dict=True, **kwargs)
            hidden = seen[0]
            if spans is not None or not cut:
                hidden = hidden.reshape(shape[0], -1, hidden.shape[-1])
            if spans is not None:
                output.logits = mix_rows(ensemble, spans, prefixes, hidden, output.logits, keep)
            else:
                hidden = hidden if cut else slice_logits_to_keep(hidden, keep)
                output.logits = mix_states(ensemble, hidden, output.logits)
            if named.get("labels") is not None:
                rest = {name: value for name, value in kwargs.items() if name not in parameters}
                output.loss = self._text.loss(output.logits, named["labels"], rest)
            return output.to_tuple() if as_tuple else output

        # Neither look-ups nor hooks can be traced: attached, a model runs as it is written.
        untraced: Callable[..., Any] = torch.compiler.disable(forward)
        untraced.nearest_session = self  # type: ignore[attr-defined]
        untraced.__signature__ = signature  # type: ignore[attr-defined]  # asked for at each token
        return untraced

    def _wrap_prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def prepare(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            here = self._here
            if here.prefixes is not None and not here.base_only:
                cache = kwargs.get("past_key_values")
                past = 0 if cache is None else int(cache.get_seq_length())
                pieces = past and kwargs.get("next_sequence_length") is None  # all are read
                if here.ids is None and (pieces or past > here.first):
                    raise ModelError(
                        "past_key_values stand for tokens that are not shown, or are to be looked "
                        "up: give the whole sequence as input_ids, without prefill_chunk_size, and "
                        "replay fewer positions; or leave the cache out"
                    )
                # Else they are of whole sequences: beams in order, drafts at the end.
                so_far = here.ids if pieces else None
                here.ids = ids if so_far is None else torch.cat([so_far, ids], dim=1)
                mask = kwargs.get(self._text.mask)
                if mask is not None:
                    mask = mask[:, : here.ids.shape[1]]
                encoded = here.encoded_rows(kwargs.get("encoder_outputs"))
                read = here.read_by_encoder()
                here.sequences = Sequences.of(here.ids, mask, here.first, encoded, read)
            return original(ids, *args, **kwargs)

        return prepare

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            here = self._here
            if here.generating:  # a draft for the call that goes on
                with self.disabled():
                    return original(*args, **kwargs)
            here.generating, here.generated, self._last = True, None, None
            try:
                named = signature.bind_partial(*args, **kwargs).arguments
                named |= named.pop("kwargs", {})
                prompt = Prompt.of(self._text, named)
                if begins_twice(prompt, named, self._start_token):
                    warn_caller(TWO_STARTS)
                ensemble = None if here.base_only or not self.ensemble.used else self.ensemble
                if self._drafts and ensemble and can_draft(self.model, prompt, named):
                    here.drafting = ensemble
                    kwargs["prompt_lookup_num_tokens"] = 1  # asks for assisted decoding
                with self._following(prompt):
                    output = original(*args, **kwargs)
                here.generated = Generated.of(output, self.model, prompt, named, ensemble)
                self._last = here.generated
                return output
            finally:
                here.generating, here.drafting = False, None

        return generate

    def _wrap_drafting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def candidates(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
            here = self._here
            if here.drafting is None or here.base_only:
                return original(generation_config, *args, **kwargs)
            here.experience = here.experience or Experience()
            memories = [lookup.memory for lookup, _ in here.drafting.used]
            return Drafter(memories, here.experience, generation_config.max_length)

        return candidates

    @contextmanager
    def _following(self, prompt: Prompt) -> Iterator[None]:
        """Know the sequences of the passes that generate() makes in this thread."""
        here = self._here
        if self.ensemble.needs_context:
            here.prompt = prompt
            here.prefixes = [Prefixes(lookup) for lookup, _ in self.ensemble.used]
            replayed = self.replay if self.ensemble.keeps_state else 0
            here.first = max(0, prompt.length - 1 - replayed)
        try:
            yield
        finally:
            here.prefixes = here.ids = here.sequences = here.encoded = here.prompt = None


def _restore(attributes: dict[str, Any], name: str, original: Any) -> None:
    attributes.pop(name, None)
    if original is not None:
        attributes[name] = original
