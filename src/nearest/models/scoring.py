"""What tuning and evaluation share: a text made ready for a model, and its memory's key layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from nearest.corpus.documents import Document
from nearest.corpus.text import Text
from nearest.corpus.tokens import Tokens
from nearest.encode.encoder import Encoder, ScoredBatch
from nearest.encode.identity import model_name, start_token, vocabulary_size
from nearest.encode.layers import find_key_layer
from nearest.errors import CorpusError, ModelError, SettingError
from nearest.memory.memory import Memory
from nearest.models.match import matching_key_layer, refuse_attached
from nearest.progress import Progress

# Documents, plain strings, or arrays of token ids.
ScoredInput = Iterable[Document | str | Tokens]


@dataclass(frozen=True)
class Scorer:
    """A text, and the model that reads it with the memory's key layer and windows."""

    text: Text
    encoder: Encoder

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        memory: Memory | None,
        documents: ScoredInput,
        *,
        tokenizer: Any = None,
        window: int | None = None,
        stride: int | None = None,
        score_eos: bool = False,
        force: bool = False,
        batch_size: int | None = None,
    ) -> "Scorer":
        """Check that model, memory, tokenizer and text fit together.

        Windows not given are the memory's, so that queries are made as keys were. A tokenizer not
        given is loaded from where the model came from, when there is text to tokenise.

        Raises:
            NearestError: they do not fit.
        """
        refuse_attached(model)
        if isinstance(documents, str | Document):
            raise CorpusError("one document is given: give a list of documents")
        items = list(documents)
        arrays = [item for item in items if isinstance(item, np.ndarray)]
        texts = [item for item in items if not isinstance(item, np.ndarray)]
        vocab_size = vocabulary_size(model)
        for item in items:
            if not isinstance(item, Document | str | np.ndarray):
                raise CorpusError(
                    f"a document is given as {type(item).__name__}: give a Document, a string, or "
                    "a numpy array of token ids"
                )
        if score_eos and arrays:
            raise SettingError("score_eos needs text: end the token arrays with EOS yourself")
        if arrays and texts:
            raise CorpusError("documents and token arrays are mixed: give all as one or the other")
        if arrays:
            text = Text.from_tokens(arrays, vocab_size)
        else:
            tokenizer = tokenizer or _own_tokenizer(model)
            if score_eos and tokenizer.eos_token_id is None:
                raise ModelError("the tokenizer has no EOS token to score: set tokenizer.eos_token")
            text = Text.from_documents(
                texts,
                tokenizer,
                start_token(tokenizer),
                vocab_size,
                tokenizer.eos_token_id if score_eos else None,
            )
        if memory is None:
            layer = find_key_layer(model, "last_hidden")
        else:
            layer = matching_key_layer(memory, model, tokenizer, force=force)
            keys = memory.manifest.keys
            if keys is not None and window is None and stride is None:
                window, stride = keys.window, keys.stride
        return cls(text, Encoder.of(model, layer, window, stride, batch_size))

    def batches(self, progress: Progress, stage: str) -> Iterator[ScoredBatch]:
        """Every prediction of the text exactly once."""
        done, total = 0, self.text.predictions
        progress(stage, 0, total)
        for scored in self.encoder.scores(self.text.documents):
            yield scored
            done += len(scored.lm_log_probs)
            progress(stage, done, total)


def _own_tokenizer(model: PreTrainedModel) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model_name(model))
    except (OSError, ValueError) as error:
        raise ModelError(
            "text needs a tokenizer, and none is where the model came from: pass tokenizer=…"
        ) from error
