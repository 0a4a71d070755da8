"""Cached generation gives what reading everything anew gives; where neighbours come from."""

import json
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from nearest.errors import CorpusError, SettingError
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
from nearest.retro import (
    AskedNeighbours,
    FixedNeighbours,
    NeighbourCache,
    RetroCache,
    RetroForCausalLM,
)
from retro_models import (
    CHUNK,
    PRESETS,
    VARIANTS,
    VOCAB,
    found,
    neighbours,
    rounding,
    tiny_model,
    tokens,
    variant,
)

PROMPTS = range(1, 3 * CHUNK + 1)
NEW = 2 * CHUNK + 1


def pairwise(*names: str) -> pytest.MarkDecorator:
    """Some variants of the model: each meets each other in some test, and all meet in the first."""
    return pytest.mark.parametrize("model", names, indirect=True)


@pytest.fixture(params=sorted(VARIANTS))
def model(request: pytest.FixtureRequest) -> RetroForCausalLM:
    return variant(request.param)


def uncached_logits(
    model: RetroForCausalLM, sequence: Tensor, retrieve: Callable[[Tensor], Tensor]
) -> Tensor:
    """One unpadded sequence read in one pass, with the neighbours of its whole chunks."""
    whole = len(sequence) // CHUNK
    shape = retrieve(tokens(1, CHUNK)).shape[1:]
    ids = torch.full((1, model.config.chunks(len(sequence)), *shape), -1)
    if whole:
        ids[0, :whole] = retrieve(sequence[: whole * CHUNK].reshape(whole, CHUNK))
    with torch.no_grad():
        mask = torch.ones_like(sequence)[None]  # a generated token is none of the padding
        return model(sequence[None], attention_mask=mask, neighbour_ids=ids).logits[0]


def generated_logits(model: RetroForCausalLM, prompt: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Sequences, and the logits of each new token in the model's own precision."""
    passes: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: passes.append(output.logits[:, -1]))
    sequences = model.generate(
        prompt, max_new_tokens=NEW, eos_token_id=None, do_sample=False, **options
    )
    hook.remove()
    return sequences, torch.stack(passes, dim=1)


def test_every_prompt_length(model):
    for length in PROMPTS:
        sequences, logits = generated_logits(model, tokens(1, length), neighbours=found)
        expected = uncached_logits(model, sequences[0, :-1], found)[length - 1 :]
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=rounding(expected))
        assert sequences[0, length:].tolist() == expected.argmax(-1).tolist()


@pairwise("norlund", "retro-pytorch")
def test_float32_differs_by_rounding(model):
    model = model.float()
    sequences, logits = generated_logits(model, tokens(1, 3), neighbours=found)
    expected = uncached_logits(model, sequences[0, :-1], found)[2:]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=rounding(expected))


@pairwise("paper", "public-rotations")
def test_neighbours_with_several_continuation_chunks(model):
    """Three neighbours of four chunks, of which the last one may be cut short."""

    def continued(chunks: Tensor) -> Tensor:
        ids = (chunks.repeat(1, 4)[:, None] * torch.tensor([1, 3, 7])[:, None] + 1) % 48 + 2
        ids[:, 1, -3:] = -1
        return ids

    for length in (1, CHUNK - 1, CHUNK, 2 * CHUNK + 1):
        sequences, logits = generated_logits(model, tokens(1, length), neighbours=continued)
        expected = uncached_logits(model, sequences[0, :-1], continued)[length - 1 :]
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=rounding(expected))
        cut = uncached_logits(model, sequences[0, :-1], lambda ids: continued(ids)[..., :-CHUNK])
        assert not torch.allclose(cut[length - 1 :], expected)


@pairwise("norlund", "public-rotations", "deepnet")
def test_batches_of_mixed_lengths(model):
    """Rows end their chunks in different steps, some before and some in the prompt."""
    lengths, longest = [*PROMPTS, 2, 7], max(PROMPTS)
    prompt = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(prompt)
    for row, length in enumerate(lengths):
        prompt[row, longest - length :] = tokens(1, length, seed=row)
        mask[row, longest - length :] = 1
    sequences, logits = generated_logits(model, prompt, attention_mask=mask, neighbours=found)
    for row, length in enumerate(lengths):
        sequence = sequences[row, longest - length :]
        expected = uncached_logits(model, sequence[:-1], found)[length - 1 :]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=rounding(expected))


@pairwise("retro-pytorch", "paper")
def test_beams_equal_beams_without_cache(model):
    options = {
        "max_new_tokens": NEW,
        "num_beams": 4,
        "num_return_sequences": 4,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
        "neighbours": found,
    }
    prompt = tokens(2, 2 * CHUNK + 1)
    cached = model.generate(prompt, **options)
    plain = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=0, atol=1e-5)
    for sequence, score in zip(cached.sequences, cached.sequences_scores, strict=True):
        log_probs = uncached_logits(model, sequence[:-1], found)[-NEW:].log_softmax(-1)
        mean = log_probs.gather(1, sequence[-NEW:, None]).mean()
        torch.testing.assert_close(score.double(), mean, rtol=0, atol=1e-4)


@pairwise("norlund", "paper")
def test_logits_of_beams_of_mixed_lengths(model):
    """Step by step, with rows whose chunks end at different times."""
    lengths, longest = [1, CHUNK, 2 * CHUNK - 1, 3 * CHUNK], 3 * CHUNK
    prompt, mask = torch.zeros(2, len(lengths), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        prompt[row, longest - length :] = tokens(1, length, seed=row)
        mask[row, longest - length :] = 1
    options = {"attention_mask": mask, "neighbours": found, "num_beams": 3}
    cached_sequences, cached = generated_logits(model, prompt, **options)
    sequences, expected = generated_logits(model, prompt, use_cache=False, **options)
    assert torch.equal(cached_sequences, sequences)
    torch.testing.assert_close(cached, expected, rtol=0, atol=rounding(expected))


@pytest.mark.parametrize("preset", PRESETS)
def test_sampling_and_other_rules_are_those_of_transformers(preset):
    model, prompt = variant(preset), tokens(2, 6)
    for options in (
        {"do_sample": True, "top_k": 20, "temperature": 1.5, "num_return_sequences": 3},
        {"do_sample": False, "no_repeat_ngram_size": 2},
        {"do_sample": False, "repetition_penalty": 3.0, "min_new_tokens": 5},
    ):
        answers = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            answers.append(
                model.generate(
                    prompt, max_new_tokens=20, neighbours=found, use_cache=use_cache, **options
                )
            )
        assert torch.equal(*answers)
    forbidden = model.generate(
        prompt, max_new_tokens=30, neighbours=found, no_repeat_ngram_size=2, eos_token_id=None
    )
    grams = [tuple(pair.tolist()) for pair in forbidden[0].unfold(0, 2, 1)]
    assert len(set(grams)) == len(grams)


@pairwise("norlund", "retro-pytorch", "deepnet")
def test_several_tokens_after_a_cache_equal_one_by_one(model):
    """Prompts continued, and ragged ones too."""
    input_ids, neighbour_ids = tokens(2, 14), neighbours(model, 2, 14)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = model(input_ids, attention_mask=mask, neighbour_ids=neighbour_ids).logits
        for first in range(1, 14):
            ids = neighbour_ids[:, : model.config.chunks(first)]
            output = model(input_ids[:, :first], attention_mask=mask[:, :first], neighbour_ids=ids)
            before = torch.tensor([first // CHUNK, max(first - 3, 0) // CHUNK])
            ended = torch.tensor([14 // CHUNK, 11 // CHUNK]) - before
            rest = torch.full((2, int(ended.max()), 2, 6), -1)
            for row in range(2):
                done = neighbour_ids[row, before[row] : before[row] + ended[row]]
                rest[row, : len(done)] = done
            logits = model(
                input_ids[:, first:],
                attention_mask=mask,
                neighbour_ids=rest,
                past_key_values=output.past_key_values,
            ).logits
            torch.testing.assert_close(
                logits[0], whole[0, first:], rtol=0, atol=rounding(whole[0, first:])
            )
            real = max(first, 3)
            torch.testing.assert_close(
                logits[1, real - first :], whole[1, real:], rtol=0, atol=1e-8
            )


def test_a_conversation_goes_on_from_its_cache():
    model, prompt = variant("norlund"), tokens(1, 6)
    first = model.generate(
        prompt, max_new_tokens=5, neighbours=found, return_dict_in_generate=True, eos_token_id=None
    )
    longer = torch.cat([first.sequences, tokens(1, 3, seed=5)], dim=1)
    options = {"max_new_tokens": 6, "neighbours": found, "eos_token_id": None}
    again = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, model.generate(longer, **options))


def test_given_neighbours_come_first_and_then_the_callable_s():
    model, prompt = variant("norlund"), tokens(1, 6)
    given = neighbours(model, 1, CHUNK)
    asked: list[Tensor] = []

    def retrieve(chunks: Tensor) -> Tensor:
        asked.append(chunks)
        return found(chunks)

    sequences, logits = generated_logits(model, prompt, neighbour_ids=given, neighbours=retrieve)
    sequence = sequences[0, :-1]
    chunks = sequence[: len(sequence) // CHUNK * CHUNK].reshape(-1, CHUNK)
    assert torch.equal(torch.cat(asked), chunks[1:])
    ids = torch.cat([given[0], found(chunks[1:])])[None]
    ids = torch.cat([ids, ids[:, :1]], dim=1)[:, : model.config.chunks(len(sequence))]
    expected = model(
        sequence[None], attention_mask=torch.ones_like(sequence)[None], neighbour_ids=ids
    ).logits[0, 5:]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=rounding(expected))


def test_given_neighbours_alone_leave_later_chunks_without():
    model, prompt = variant("norlund"), tokens(1, 6)
    given = neighbours(model, 1, CHUNK)
    sequences, logits = generated_logits(model, prompt, neighbour_ids=given)
    sequence = sequences[0, :-1]
    ids = torch.full((1, model.config.chunks(len(sequence)), 2, 6), -1)
    ids[:, 0] = given[:, 0]
    expected = model(
        sequence[None], attention_mask=torch.ones_like(sequence)[None], neighbour_ids=ids
    ).logits[0, 5:]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=rounding(expected))


def test_each_chunk_is_asked_for_once_whatever_the_search():
    model, asked = variant("paper"), []

    def retrieve(chunks: Tensor) -> Tensor:
        asked.extend(map(tuple, chunks.tolist()))
        return found(chunks)

    model.generate(tokens(3, 9), max_new_tokens=9, num_beams=3, neighbours=NeighbourCache(retrieve))
    assert asked
    assert len(set(asked)) == len(asked)


def test_the_cache_keeps_the_current_chunk_only():
    model = variant("retro-pytorch")
    for rows in (1, 2):
        mask = torch.ones(rows, 14, dtype=torch.int64)
        mask[1:, :3] = 0
        ids = neighbours(model, rows, 14)
        chunk = model(
            tokens(rows, 14), attention_mask=mask, neighbour_ids=ids
        ).past_key_values.chunk
        sizes = {name: tuple(tensor.shape) for name, tensor in chunk.tensors.items()}
        keys = (rows, 2, 13, 12)  # heads, two neighbours of 6 and the null one, dims of a head
        assert sizes == {
            "carry": (rows, 14 % CHUNK if rows == 1 else 3, 32),
            "seen": (rows, 13),
            **{f"{kind}.{layer}": keys for kind in ("keys", "values") for layer in (1, 2)},
        }
        for tensor in chunk.tensors.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_neighbours_are_encoded_once():
    model, encoded = variant("norlund"), []
    model.encoder.register_forward_hook(lambda _, args, __: encoded.append(args[0].shape[1]))
    model.generate(tokens(1, 9), max_new_tokens=12, neighbours=found, eos_token_id=None)
    assert encoded == [2, 1, 1, 1]  # two chunks of the prompt, then one at each chunk's end


def test_the_cache_forgets_the_oldest_and_what_was_searched_before():
    asked: list[int] = []
    version = [0]

    def retrieve(chunks: Tensor) -> Tensor:
        asked.extend(chunks[:, 0].tolist())
        return found(chunks)

    cache = NeighbourCache(retrieve, size=2, version=lambda: version[0])
    chunks = torch.arange(2, 6).repeat(3, 1) + torch.arange(3)[:, None] * 10
    assert torch.equal(cache(chunks[:2]), found(chunks[:2]))
    cache(chunks[:1])  # now the second is the one asked for longest ago
    cache(chunks[2:])
    assert torch.equal(cache(chunks[:1]), found(chunks[:1]))
    assert asked == [2, 12, 22]
    assert torch.equal(cache(chunks[1:2]), found(chunks[1:2]))
    assert asked == [2, 12, 22, 12]
    version[0] = 1
    cache(chunks[1:2])
    assert asked == [2, 12, 22, 12, 12]


def test_passages_typed_or_in_a_file(tiny_tokenizer, tmp_path: Path):
    path = tmp_path / "passages.txt"
    path.write_text("the law\n\nof the court\n", encoding="utf-8")
    fixed = FixedNeighbours.from_file(path, tiny_tokenizer, 9)
    ids = fixed(tokens(3, CHUNK))
    assert ids.shape == (3, 2, 9)
    law, court = (tiny_tokenizer(text)["input_ids"] for text in ("the law", "of the court"))
    assert ids[1].tolist() == [[*law, -1, -1], court[:9]]
    prompts = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return ["the law", ""][len(prompts) % 2 - 1]

    asked = AskedNeighbours(tiny_tokenizer, 2, 9, ask)
    chunk = torch.tensor([tiny_tokenizer("the court")["input_ids"]])
    assert asked(chunk).tolist() == [[[*law, -1, -1], [-1] * 9]]
    assert "the court" in prompts[0]
    assert "2 of 2" in prompts[1]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_files_without_passages_are_refused(content, tiny_tokenizer, tmp_path: Path):
    path = tmp_path / "passages.txt"
    path.write_bytes(content)
    with pytest.raises(CorpusError):
        FixedNeighbours.from_file(path, tiny_tokenizer, 9)
    with pytest.raises(CorpusError):
        FixedNeighbours.from_file(tmp_path / "missing", tiny_tokenizer, 9)


def test_a_callable_that_answers_badly():
    model, prompt = variant("norlund"), tokens(2, 8)
    for retrieve, message in (
        (lambda chunks: found(chunks)[:1], "chunks"),
        (lambda chunks: found(chunks)[:, 0], "chunks"),
        (lambda chunks: found(chunks) + 1000, "vocabulary"),
        (lambda chunks: found(chunks).float(), "token ids"),
        (lambda chunks: found(chunks) > 0, "token ids"),
        (lambda chunks: found(chunks).tolist(), "gave list"),
    ):
        with pytest.raises(SettingError, match=message):
            model.generate(prompt, max_new_tokens=3, neighbours=retrieve)
    widths = iter([6, 5, 4])
    with pytest.raises(SettingError, match="one length"):
        model.generate(
            prompt, max_new_tokens=9, neighbours=lambda chunks: found(chunks)[..., : next(widths)]
        )
    with pytest.raises(SettingError, match="one length"):
        model.generate(
            prompt,
            max_new_tokens=3,
            neighbour_ids=neighbours(model, 2, 4, width=5),
            neighbours=found,
        )


def test_retrieval_cannot_begin_in_the_middle_of_a_cache():
    model = variant("norlund")
    cache = model(tokens(1, 6)).past_key_values
    with pytest.raises(SettingError, match="without neighbours"):
        model(tokens(1, 2), neighbour_ids=neighbours(model, 1, 2), past_key_values=cache)


@pairwise("paper", "deepnet")
def test_prompt_lookup_gives_what_plain_search_gives(model):
    """Drafts are taken back over the ends of chunks, neighbours or none."""
    rejected: list[int] = []

    class Watched(RetroCache):
        def crop(self, tokens_to_remove: int) -> None:
            rejected.append(-tokens_to_remove)
            super().crop(tokens_to_remove)

    for length in range(9, 9 + CHUNK):
        prompt = tokens(1, length) % 3 + 2
        for source in (found, None) if length == 9 else (found,):
            options = {"max_new_tokens": 17, "eos_token_id": None, "neighbours": source}
            plain = model.generate(prompt, **options)
            drafted = model.generate(
                prompt,
                prompt_lookup_num_tokens=CHUNK + 2,
                past_key_values=Watched(model.config),
                **options,
            )
            assert torch.equal(drafted, plain)
    assert max(rejected) > CHUNK  # whole chunks were undone
    drafted = model.generate(prompt, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(drafted, plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retro", "gpt2"])
def test_an_assistant_drafts_without_neighbours(kind):
    """Whatever it drafts, what is accepted is what plain search gives."""

    class Source:
        def __call__(self, chunks: Tensor) -> Tensor:
            return found(chunks)

        def __deepcopy__(self, _: dict[int, object]) -> "Source":
            raise AssertionError("a memory that is searched must not be copied")

    model = variant("norlund")
    assistant = variant("norlund")
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB}
        assistant = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    for length in (3, 2 * CHUNK):
        prompt = tokens(1, length)
        for given in (None, neighbours(model, 1, length)):
            options = {"neighbours": Source(), "neighbour_ids": given, "max_new_tokens": 17}
            plain = model.generate(prompt, eos_token_id=None, **options)
            drafted = model.generate(
                prompt, eos_token_id=None, assistant_model=assistant, **options
            )
            assert torch.equal(drafted, plain)


def test_another_cache_is_refused():
    with pytest.raises(SettingError, match="static"):
        variant("norlund").generate(tokens(1, 6), cache_implementation="static", max_new_tokens=2)


def test_drafts_of_its_own_first_layers_are_refused():
    with pytest.raises(SettingError, match="assistant_early_exit"):
        variant("norlund").generate(tokens(1, 6), assistant_early_exit=1, max_new_tokens=2)


def test_neighbours_of_a_live_search_and_of_a_remote_service():
    """Chunks of a corpus, found by their tokens here and asked for over HTTP."""
    corpus, model = tokens(40, CHUNK, seed=8), variant("paper")
    bags = torch.nn.functional.one_hot(corpus, VOCAB).sum(1).float().numpy()
    index = ExactIndex(FloatKeys(bags, "l2"), np.arange(len(bags)))

    def search(chunks: Tensor) -> Tensor:
        queries = torch.nn.functional.one_hot(chunks, VOCAB).sum(1).float().numpy()
        return corpus[torch.from_numpy(index.search(queries, 2).ids)]

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            chunks = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(search(torch.tensor(chunks)).tolist()).encode())

        def log_message(self, *_: object) -> None: ...

    def fetch(chunks: Tensor) -> Tensor:
        url = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(url, json.dumps(chunks.tolist()).encode()) as answer:
            return torch.tensor(json.loads(answer.read()))

    options = {"max_new_tokens": NEW, "eos_token_id": None}
    prompt = torch.cat([corpus[3], corpus[17], corpus[5]])[None]
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        remote = model.generate(prompt, neighbours=NeighbourCache(fetch), **options)
        server.shutdown()
    live, logits = generated_logits(model, prompt, neighbours=search)
    assert torch.equal(remote, live)
    assert torch.equal(search(corpus[3:4])[0, 0], corpus[3])
    whole = live[0, :-1]
    ids = search(whole.reshape(-1, CHUNK)[: len(whole) // CHUNK])[None]
    expected = model(whole[None], neighbour_ids=ids[:, : len(whole) // CHUNK]).logits
    torch.testing.assert_close(logits[0], expected[0, 11:], rtol=0, atol=rounding(expected[0, 11:]))


def test_tokens_that_cannot_be_taken_back():
    model = variant("norlund")
    for record, tokens_back in ((False, 2), (True, 6)):
        cache = RetroCache(model.config)
        if record:
            cache.activate_past_recording()
        model(tokens(1, 6), neighbour_ids=neighbours(model, 1, 6), past_key_values=cache)
        cache.crop(0)
        with pytest.raises(SettingError, match="cannot be taken back"):
            cache.crop(-tokens_back)


@pairwise("retro-pytorch", "public-rotations")
def test_rows_of_mixed_lengths_take_tokens_back(model):
    input_ids, ids = tokens(2, 14), neighbours(model, 2, 14)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = model(input_ids, attention_mask=mask, neighbour_ids=ids).logits
        for back in range(1, 14):
            cache = RetroCache(model.config)
            cache.activate_past_recording()
            model(input_ids, attention_mask=mask, neighbour_ids=ids, past_key_values=cache)
            cache.crop(-back)
            begun = torch.tensor([(14 - back) // CHUNK, max(11 - back, 0) // CHUNK])
            ended = torch.tensor([14 // CHUNK, 11 // CHUNK]) - begun
            rest = torch.full((2, int(ended.max()), 2, 6), -1)
            for row in range(2):
                done = ids[row, begun[row] : begun[row] + ended[row]]
                rest[row, : len(done)] = done
            logits = model(
                input_ids[:, -back:], attention_mask=mask, neighbour_ids=rest, past_key_values=cache
            ).logits
            torch.testing.assert_close(
                logits[0], whole[0, -back:], rtol=0, atol=rounding(whole[0, -back:])
            )
            real = min(back, 11)
            torch.testing.assert_close(
                logits[1, -real:], whole[1, -real:], rtol=0, atol=rounding(whole[1, -real:])
            )


def test_a_cache_follows_its_rows():
    model = variant("retro-pytorch")
    input_ids, neighbour_ids = tokens(2, 9), neighbours(model, 2, 9)
    step = tokens(2, 1, seed=4)
    expected = model(input_ids, neighbour_ids=neighbour_ids, use_cache=True)
    rows = torch.tensor([1, 1, 0])
    for change in ("select", "reorder", "repeat"):
        cache = model(input_ids, neighbour_ids=neighbour_ids, use_cache=True).past_key_values
        if change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = torch.tensor([0, 0, 1, 1])
        elif change == "reorder":
            cache.reorder_cache(rows)
        else:
            cache.batch_select_indices(rows)
        none = neighbour_ids[rows][:, :0]
        logits = model(step[rows], neighbour_ids=none, past_key_values=cache).logits
        cache = model(input_ids[rows], neighbour_ids=neighbour_ids[rows]).past_key_values
        expected = model(step[rows], neighbour_ids=none, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        model(input_ids[rows], neighbour_ids=neighbour_ids[rows], past_key_values=cache).logits,
        model(input_ids[rows], neighbour_ids=neighbour_ids[rows]).logits,
    )
    assert isinstance(cache, RetroCache)


def test_padding_hidden_without_a_mask_stays_hidden_in_a_cache():
    model = tiny_model("norlund")
    input_ids = tokens(1, 10)
    input_ids[0, 5] = 0
    whole = model(input_ids).logits
    cache = model(input_ids[:, :7]).past_key_values
    parts = [model(input_ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, 10)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, 7:])


def test_a_prompt_read_in_pieces_is_refused_when_chunks_must_be_looked_up():
    model = variant("norlund")
    with pytest.raises(SettingError, match="whole sequence"):
        model.generate(
            tokens(1, 12),
            max_new_tokens=2,
            neighbours=found,
            prefill_chunk_size=5,
            past_key_values=RetroCache(model.config),
        )
