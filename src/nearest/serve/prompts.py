"""A prompt on its way through the model, piece by piece, and what is told about its tokens."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nearest.retrieval.queries import Queries
from nearest.serve.mixing import Mixture, States, beginning
from nearest.serve.passes import Batch, Passed, Passes
from nearest.serve.sampling import likeliest
from nearest.serve.vocabulary import TextStream, Vocabulary
from nearest.serve.work import Told, Wanted, Work

PIECE = 256  # tokens that are read at once
_STATEFUL_PIECE = 32  # where each of them is looked up after the one before
_PIECE_LOGITS = 1 << 24  # numbers, 64 MB, where all of them are predicted


class Prompt:
    """One prompt; `prediction`, at `number`, says what follows it once it has been read."""

    def __init__(self, work: Work, passes: Passes, vocabulary: Vocabulary) -> None:
        self.work = work
        compare = work.wanted.sources or work.wanted.base_top > 0
        self.batch: Batch = work.reading.begin(passes, compare=compare)
        self.echoed: list[Told] = []
        self.prediction: Mixture
        self.number = 0
        self._vocabulary = vocabulary
        self._tokens = np.array(work.prompt, dtype=np.int64)
        self._state = beginning(work.ensemble)
        self._read = 0
        last = len(work.prompt) - 1
        replay = work.wanted.replay if work.ensemble.keeps_state else 0
        self._first = 0 if work.wanted.echo else max(0, last - replay)  # that is predicted from
        self._text = TextStream(vocabulary, ())
        if work.wanted.echo:
            self._echo(Told(int(self._tokens[0]), "", None, None, [], [], [], prompt=True))

    def read_piece(self) -> int:
        """Read the next piece; the number of its tokens."""
        start, stop = self._read, min(self._read + self._size(), len(self._tokens))
        keep = max(0, stop - max(start, self._first))
        passed = self.batch.read(self._tokens[start:stop].tolist(), keep)
        if stop > self._first:
            self._predict(range(stop - keep, stop), passed)
        self._read = stop
        return stop - start

    @property
    def done(self) -> bool:
        """Whether all of it has been read."""
        return self._read == len(self._tokens)

    def _size(self) -> int:
        if not self.batch.pieces:
            return len(self._tokens)
        if self._first == len(self._tokens) - 1:
            return PIECE
        size = _STATEFUL_PIECE if self.work.ensemble.keeps_state else PIECE
        return min(size, max(16, _PIECE_LOGITS // self._vocabulary.size))

    def _predict(self, positions: range, passed: Passed) -> None:
        """Predict what follows each of the positions."""
        wanted = self.work.wanted
        for prediction, part in self._predictions(positions, passed):
            if part[-1] + 1 == len(self._tokens):
                self.prediction, self.number = prediction, len(part) - 1
            if wanted.echo:
                tokens = self._tokens[part[0] + 1 : part[-1] + 2].tolist()
                rows = range(len(tokens))
                for told in tell([wanted] * len(tokens), prediction, rows, tokens):
                    self._echo(told)

    def _predictions(
        self, positions: range, passed: Passed
    ) -> Iterator[tuple[Mixture, Sequence[int]]]:
        """All positions at once, or one after another with the state that each leaves."""
        ensemble, keys, base = self.work.ensemble, passed.keys[0].numpy(), passed.log_probs[0]
        alone = base if passed.alone is None else passed.alone[0]
        read = passed.read[0] if passed.read else [None] * len(base)
        step = 1 if ensemble.keeps_state else len(positions)
        for start in range(0, len(positions), step):
            rows, part = slice(start, start + step), positions[start : start + step]
            queries = Queries(keys[rows], self._tokens, np.array(part, dtype=np.int64))
            states: list[States] = [self._state] * len(part)
            prediction = Mixture(ensemble, queries, states, base[rows], alone[rows], read[rows])
            following = part[-1] + 1
            if ensemble.keeps_state and following < len(self._tokens):
                self._state = prediction.after([0], [int(self._tokens[following])])[0]
            yield prediction, part

    def _echo(self, told: Told) -> None:
        piece = self._text.push(told.token)
        if len(self.echoed) + 1 == len(self._tokens):
            piece += self._text.flush()
        self.echoed.append(told._replace(text=piece, prompt=True))


def tell(
    wanted: Sequence[Wanted],
    prediction: Mixture,
    numbers: Sequence[int],
    tokens: Sequence[int],
) -> list[Told]:
    """What is to be told about tokens, whose text is found elsewhere.

    `numbers` are the rows of the prediction that the tokens were chosen from.
    """
    rows = list(numbers)
    mixed, base = prediction.log_probs[rows], prediction.alone[rows]
    at = torch.tensor(list(tokens), device=mixed.device)[:, None]
    return [
        Told(
            token,
            "",
            log_prob,
            base_log_prob,
            top,
            base_top,
            prediction.spoke(number, token) if one.sources else [],
            prediction.of_text(number, token) if one.sources else 0.0,
            prediction.read[number],
            read_log_prob,
        )
        for one, number, token, log_prob, base_log_prob, read_log_prob, top, base_top in zip(
            wanted,
            numbers,
            tokens,
            mixed.gather(1, at)[:, 0].tolist(),
            base.gather(1, at)[:, 0].tolist(),
            prediction.base[rows].gather(1, at)[:, 0].tolist(),
            likeliest(mixed, [one.top for one in wanted]),
            likeliest(base, [one.base_top for one in wanted]),
            strict=True,
        )
    ]
