"""Evaluation and tuning against the oracle, one window at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import make_documents, make_model, make_tokenizer, random_documents
from nearest import Document, Memory, attach, evaluate, read_text, tune
from nearest.corpus.text import Text
from nearest.corpus.windows import windows
from nearest.encode import encoder
from nearest.errors import CorpusError, ModelError, SettingError
from nearest.metrics import bootstrap_interval, perplexity
from nearest.models.method_run import MethodRun
from nearest.models.scoring import Scorer
from nearest.progress import no_progress
from nearest.retrieval.gates.fitting import TEMPERATURES
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import resolve_settings
from nearest.verbs.settings_search import LAMS
from oracle import keys_and_logits, knn_lm_log_probs

SETTINGS = {"lam": 0.4, "temperature": 30.0, "k": 50}
TOKENIZER = make_tokenizer()
TEXT = make_documents(6, 40, seed=9)
TEXT_TOKENS = [
    np.array([0, *TOKENIZER(d.text, add_special_tokens=False)["input_ids"]]) for d in TEXT
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def memory(model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    return build_memory(model, random_documents())


def oracle_nll(model: PreTrainedModel, memory: Memory, method: str) -> np.ndarray:
    """Summed nll of each document, every window on its own."""
    keys = memory.manifest.keys
    sums = []
    for tokens in TEXT_TOKENS:
        total = 0.0
        for part in windows(len(tokens), keys.window, keys.stride):
            inputs = torch.from_numpy(tokens[part.start : part.stop])
            hidden, logits = keys_and_logits(model, inputs)
            if method == "knn":
                settings = {**SETTINGS, "k": memory.entries}
                log_probs = knn_lm_log_probs(memory, hidden, logits, **settings)
            else:
                log_probs = torch.log_softmax(logits.double(), -1).numpy()
            for position in range(part.first, part.stop):
                total -= log_probs[position - part.start, tokens[position + 1]]
        sums.append(total)
    return np.array(sums)


def test_every_document_equals_the_oracle(model: PreTrainedModel, memory: Memory) -> None:
    settings = {**SETTINGS, "k": memory.entries}  # no k-th neighbour whose choice could differ
    results = evaluate(model, memory, TEXT, ["base", "knn"], tokenizer=TOKENIZER, **settings)
    for result in results:
        expected = oracle_nll(model, memory, result.method)
        np.testing.assert_allclose(result.document_nll, expected, rtol=1e-4)
        counts = [len(tokens) - 1 for tokens in TEXT_TOKENS]
        assert result.document_tokens.tolist() == counts
        assert result.tokens == sum(counts)
        assert result.nll == pytest.approx(expected.sum() / sum(counts), rel=1e-4)


def test_units_of_perplexity(model: PreTrainedModel, memory: Memory) -> None:
    """Token, word and byte figures divide the same nll by different numbers."""
    result = evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER)
    total = result.document_nll.sum()
    words = sum(len(document.text.split()) for document in TEXT)
    size = sum(len(document.text.encode()) for document in TEXT)
    assert result.ppl == pytest.approx(math.exp(total / result.tokens))
    assert result.word_ppl == pytest.approx(math.exp(total / words))
    assert result.bpb == pytest.approx(total / math.log(2) / size)
    # every token of this tokenizer is one byte, so two of the figures must agree
    assert result.bpb == pytest.approx(math.log2(result.ppl))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batch_size_and_order_change_nothing(
    model: PreTrainedModel, memory: Memory, batch_size: int
) -> None:
    expected = evaluate(model, memory, TEXT, tokenizer=TOKENIZER, **SETTINGS)
    backwards = evaluate(
        model, memory, TEXT[::-1], tokenizer=TOKENIZER, batch_size=batch_size, **SETTINGS
    )
    np.testing.assert_allclose(backwards.document_nll[::-1], expected.document_nll, rtol=1e-5)


def test_token_arrays_are_documents_too(model: PreTrainedModel, memory: Memory) -> None:
    text = evaluate(model, memory, TEXT, tokenizer=TOKENIZER, **SETTINGS)
    tokens = evaluate(model, memory, TEXT_TOKENS, **SETTINGS)
    np.testing.assert_allclose(tokens.document_nll, text.document_nll, rtol=1e-6)
    assert (tokens.word_ppl, tokens.bpb) == (None, None)


def test_the_end_of_a_document_is_scored_only_on_request(
    model: PreTrainedModel, memory: Memory
) -> None:
    without = evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER)
    with_end = evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER, score_eos=True)
    assert (with_end.document_tokens - without.document_tokens).tolist() == [1] * len(TEXT)
    ended = [np.append(tokens, 1) for tokens in TEXT_TOKENS]
    explicit = evaluate(model, memory, ended, "base")
    np.testing.assert_allclose(with_end.document_nll, explicit.document_nll, rtol=1e-6)


def test_the_paired_difference(model: PreTrainedModel, memory: Memory) -> None:
    base, knn = evaluate(model, memory, TEXT, ["base", "knn"], tokenizer=TOKENIZER, **SETTINGS)
    assert (base.delta_nll, base.delta_low, base.delta_high) == (None, None, None)
    assert knn.delta_nll == pytest.approx(knn.nll - base.nll)
    assert knn.delta_low is not None
    assert knn.delta_low <= knn.delta_nll <= knn.delta_high
    assert (base.foss, knn.foss) == (None, 0.0)
    assert (base.added_ms, base.lam) == (0.0, None)
    assert knn.added_ms > 0
    assert knn.seconds > base.seconds


def test_distances_of_keys_and_of_index_agree_for_an_exact_index(
    model: PreTrainedModel, memory: Memory
) -> None:
    by_keys = evaluate(model, memory, TEXT, tokenizer=TOKENIZER, **SETTINGS)
    by_index = evaluate(model, memory, TEXT, tokenizer=TOKENIZER, distances="index", **SETTINGS)
    np.testing.assert_allclose(by_index.document_nll, by_keys.document_nll, rtol=1e-4)


def test_an_approximate_index_probed_fully_equals_the_exact_one(
    model: PreTrainedModel, memory: Memory, build_memory: Callable[..., Memory]
) -> None:
    listed = build_memory(model, random_documents(), index="IVF8,Flat", recall=1.0)
    recall = listed.manifest.segments[0].index.recall
    assert recall == pytest.approx(1, abs=1e-3)  # FAISS rounds, and the last place is close
    expected = evaluate(model, memory, TEXT, tokenizer=TOKENIZER, **SETTINGS)
    found = evaluate(model, listed, TEXT, tokenizer=TOKENIZER, **SETTINGS)
    assert found.nll == pytest.approx(expected.nll, rel=0.01)


def test_tuning_finds_the_best_of_the_sweep_and_evaluation_uses_it(
    model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    memory = build_memory(model)
    tuned = tune(model, memory, TEXT, tokenizer=TOKENIZER)
    assert tuned.nll == tuned.nlls.min() == pytest.approx(tuned.curves.min())
    np.testing.assert_allclose(tuned.curves[:, 0], tuned.base_nll)  # λ = 0
    best = tuned.variants.index(tuned.settings.k)
    np.testing.assert_allclose(tuned.curves.min(axis=1), tuned.nlls[:, best])
    np.testing.assert_array_equal(np.array(LAMS)[tuned.curves.argmin(axis=1)], tuned.lams[:, best])
    in_use = evaluate(model, memory, TEXT, tokenizer=TOKENIZER)  # without opening it again
    assert in_use.lam == tuned.settings.lam
    reopened = Memory.open(memory.path)
    assert reopened.manifest.version == 2
    by_default = evaluate(model, reopened, TEXT, tokenizer=TOKENIZER)
    assert by_default.nll == pytest.approx(tuned.nll, rel=1e-5)
    found = (by_default.lam, by_default.temperature, by_default.k)
    assert found == (tuned.settings.lam, tuned.settings.temperature, tuned.settings.k)
    assert evaluate(model, reopened, TEXT, tokenizer=TOKENIZER, lam=0.9).lam == 0.9


def test_the_sweep_equals_one_evaluation_each(model: PreTrainedModel, memory: Memory) -> None:
    tuned = tune(model, memory, TEXT, tokenizer=TOKENIZER, store=False)
    rng = np.random.default_rng(0)
    for _ in range(6):
        t, k = (int(rng.integers(n)) for n in tuned.nlls.shape)
        result = evaluate(
            model,
            memory,
            TEXT,
            tokenizer=TOKENIZER,
            lam=tuned.lams[t, k],
            temperature=TEMPERATURES[t],
            k=tuned.variants[k],
        )
        assert tuned.nlls[t, k] == pytest.approx(result.nll, rel=1e-5)
    assert Memory.open(memory.path).manifest.version == 1


@pytest.mark.slow
def test_a_coarse_index_is_tuned_as_it_is_evaluated(
    model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    """The candidates that are re-ranked must not depend on k, or the sweep describes nothing."""
    memory = build_memory(model, random_documents(), index="IVF4,PQ4x4", nprobe=2)
    tuned = tune(model, memory, TEXT, tokenizer=TOKENIZER)
    by_default = evaluate(model, Memory.open(memory.path), TEXT, tokenizer=TOKENIZER)
    assert by_default.nll == pytest.approx(tuned.nll, rel=1e-5)
    for variant, k in enumerate(tuned.variants):
        settings = {
            "lam": tuned.lams[10, variant],
            "temperature": TEMPERATURES[10],
            "k": k,
            "rerank": tuned.variants[-1],
        }
        result = evaluate(model, memory, TEXT, tokenizer=TOKENIZER, **settings)
        assert result.nll == pytest.approx(tuned.nlls[10, variant], rel=1e-5)


def test_tuned_k_never_exceeds_a_small_memory(build_memory: Callable[..., Memory]) -> None:
    model = make_model()
    memory = build_memory(model, [Document("one", "abcabcabcabd")])
    tuned = tune(model, memory, TEXT, tokenizer=TOKENIZER)
    assert max(tuned.variants) == memory.entries == 12
    assert evaluate(model, Memory.open(memory.path), TEXT, tokenizer=TOKENIZER).k <= 12


def test_the_tokenizer_is_found_where_the_model_came_from(
    model_folder: str, build_memory: Callable[..., Memory]
) -> None:
    from nearest.encode.loading import load_model_and_tokenizer

    model, _ = load_model_and_tokenizer(model_folder)
    memory = build_memory(model)
    found = evaluate(model, memory, TEXT, **SETTINGS)
    assert found.nll == pytest.approx(
        evaluate(model, memory, TEXT, tokenizer=TOKENIZER, **SETTINGS).nll
    )


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([], {}, CorpusError, "no token to predict"),
        ([np.array([0])], {}, CorpusError, "no token to predict"),
        ([np.array([], int), np.array([0, 5, 6])], {}, CorpusError, "a token array is empty"),
        ([np.array([0, 999])], {}, CorpusError, "token 999"),
        ([np.array([0, -1])], {}, CorpusError, "token -1"),
        ([TEXT[0], np.array([0, 5])], {}, CorpusError, "mixed"),
        ("one text", {}, CorpusError, "give a list"),
        ([np.array([0, 5])], {"score_eos": True}, SettingError, "score_eos needs text"),
        (TEXT, {"method": "magic"}, SettingError, "choose among base, knn"),
        (TEXT, {"method": ["knn", "knn"]}, SettingError, "only once"),
        (TEXT, {"method": []}, SettingError, "at least one"),
        (TEXT, {"window": 65}, SettingError, "longer than the model's 64 positions"),
        (TEXT, {"window": 8, "stride": 8}, SettingError, "below the window"),
        (TEXT, {"lam": -0.1}, SettingError, "lam must lie inside"),
    ],
)
def test_what_cannot_be_evaluated(
    model: PreTrainedModel,
    memory: Memory,
    documents: list[Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        evaluate(model, memory, documents, tokenizer=TOKENIZER, **options)


def test_knn_needs_a_memory_and_base_does_not(model: PreTrainedModel, memory: Memory) -> None:
    with pytest.raises(SettingError, match="needs a memory"):
        evaluate(model, None, TEXT, tokenizer=TOKENIZER)
    alone = evaluate(model, None, TEXT, "base", tokenizer=TOKENIZER, window=64, stride=32)
    with_memory = evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER)
    np.testing.assert_allclose(alone.document_nll, with_memory.document_nll, rtol=1e-6)


def test_an_attached_model_is_refused(model: PreTrainedModel, memory: Memory) -> None:
    """Else the base model's figure would be the memory's."""
    with attach(model, memory), pytest.raises(SettingError, match="detach"):
        evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER)


def test_text_without_a_tokenizer_says_so(model: PreTrainedModel, memory: Memory) -> None:
    with pytest.raises(ModelError, match="pass tokenizer="):
        evaluate(model, memory, TEXT)


def test_bootstrap_of_equal_documents_is_a_point() -> None:
    interval = bootstrap_interval(np.full(9, 6.0), np.full(9, 2.0))
    assert interval == (3.0, 3.0)


def test_bootstrap_approaches_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    totals = rng.normal(5, 1, size=4000)
    low, high = bootstrap_interval(totals, np.ones(4000))
    spread = 1.96 * totals.std() / math.sqrt(4000)
    assert low == pytest.approx(totals.mean() - spread, abs=0.005)
    assert high == pytest.approx(totals.mean() + spread, abs=0.005)


def test_bootstrap_weighs_documents_by_their_tokens() -> None:
    """A long document moves the mean as a whole."""
    totals, counts = np.array([0.0, 900.0]), np.array([100.0, 300.0])
    assert bootstrap_interval(totals, counts) == (0.0, 3.0)


def test_bootstrap_passes_over_documents_without_predictions() -> None:
    with_empty = bootstrap_interval(np.array([1.0, 0.0, 5.0]), np.array([1, 0, 2]))
    assert with_empty == bootstrap_interval(np.array([1.0, 5.0]), np.array([1, 2]))


def test_one_document_has_no_interval() -> None:
    assert bootstrap_interval(np.array([3.0]), np.array([1.0])) == (None, None)


def test_perplexity_of_the_impossible_is_infinite() -> None:
    assert perplexity(math.inf, 1) == math.inf
    assert perplexity(5000.0, 2) == math.inf
    assert perplexity(1400.0, 2) == pytest.approx(math.exp(700))


# --- all documents as one sequence ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "knn", "retomaton", "suffix"])
def test_a_stream_is_one_document_of_all(
    model: PreTrainedModel, memory: Memory, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start token, then every document's own tokens; figures stay those of documents."""
    text, arrays = TEXT[1:4], TEXT_TOKENS[1:4]
    given = {} if method == "base" else {"lam": 0.4, "temperature": 30.0}
    joined = np.concatenate([[0], *(tokens[1:] for tokens in arrays)])
    read = read_text(model, memory, [joined], tokenizer=TOKENIZER)
    (block,) = read.blocks(no_progress, "")
    log_probs = block.lm_log_probs
    if method != "base":
        log_probs = MethodRun(
            Lookup.of(memory, method, resolve_settings(method, memory, **given))
        ).log_probs(block)
    ends = np.cumsum([len(tokens) - 1 for tokens in arrays])[:-1]
    expected = [-part.sum(dtype=float) for part in np.split(log_probs.numpy(), ends)]
    for batch_size, group_bytes in ((None, 1 << 27), (1, 1)):  # at once, and in many blocks
        monkeypatch.setattr(encoder, "_GROUP_BYTES", group_bytes)
        result = evaluate(
            model, memory, text, method, tokenizer=TOKENIZER, stream=True, batch_size=batch_size,
            **given,
        )  # fmt: skip
        np.testing.assert_allclose(result.document_nll, expected, rtol=1e-5)
        assert result.document_tokens.tolist() == [len(tokens) - 1 for tokens in arrays]
    apart = evaluate(model, memory, text, method, tokenizer=TOKENIZER, **given)
    assert apart.document_nll[0] == pytest.approx(result.document_nll[0], rel=1e-5)
    assert apart.nll != pytest.approx(result.nll, rel=1e-4)
    assert (apart.tokens, apart.word_ppl is None) == (result.tokens, False)


def test_a_stream_with_ends_predicts_each(model: PreTrainedModel, memory: Memory) -> None:
    """As fairseq reads text: EOS after every document, and predicted."""
    joined = np.concatenate([[0], *(np.append(tokens[1:], 1) for tokens in TEXT_TOKENS)])
    expected = evaluate(model, memory, [joined], "base")
    found = evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER, stream=True, score_eos=True)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert found.tokens == expected.tokens


def test_a_stream_of_token_arrays(model: PreTrainedModel, memory: Memory) -> None:
    text = evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER, stream=True)
    tokens = evaluate(model, memory, TEXT_TOKENS, "base", stream=True)
    np.testing.assert_allclose(tokens.document_nll, text.document_nll, rtol=1e-6)


def test_a_stream_leaves_out_its_own_entries(
    model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    """Every prediction's own entry, by brute force; documents that the memory lacks have none."""
    documents = random_documents()
    memory = build_memory(model, documents[:6])
    text = [documents[4], documents[7], documents[1]]
    read = read_text(model, memory, text, tokenizer=TOKENIZER, stream=True, leave_one_out=True)
    (block,) = read.blocks(no_progress, "")
    own = block.queries.own
    starts = memory.segments[0].offsets[:-1]
    expected = [
        np.arange(len(document.text)) + starts[number] if number < 6 else [-1] * len(document.text)
        for number, document in ((4, text[0]), (7, text[1]), (1, text[2]))
    ]
    assert own.tolist() == np.concatenate(expected).tolist()
    some = own >= 0
    assert (memory.values(own)[some] == block.targets[some]).all()


def test_places_of_a_stream() -> None:
    """Documents without a token to predict stand between others and are never named."""
    arrays = [np.zeros(n + 1, int) for n in (0, 3, 0, 0, 2, 0)]
    text = Text.from_tokens(arrays, 9).as_stream()
    documents, positions = text.places(np.zeros(5, int), np.arange(1, 6))
    assert documents.tolist() == [1, 1, 1, 4, 4]
    assert positions.tolist() == [1, 2, 3, 1, 2]


def test_no_block_of_a_stream_copies_it(
    model: PreTrainedModel, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else scoring a text would take the square of its length."""
    monkeypatch.setattr(encoder, "_GROUP_BYTES", 1)
    scorer = Scorer.prepare(model, memory, TEXT, tokenizer=TOKENIZER, stream=True, batch_size=1)
    blocks = list(scorer.blocks(no_progress, "read"))
    assert len(blocks) > 2
    assert sum(len(block.targets) for block in blocks) == scorer.text.predictions
    assert all(block.queries.context is scorer.text.sequences[0] for block in blocks)


def test_a_stream_of_what_was_read_already(model: PreTrainedModel, memory: Memory) -> None:
    read = read_text(model, memory, TEXT, tokenizer=TOKENIZER, stream=True)
    expected = evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER, stream=True)
    assert evaluate(model, memory, read, "base").nll == pytest.approx(expected.nll, rel=1e-6)
    with pytest.raises(SettingError, match="give stream to read_text"):
        evaluate(model, memory, read, "base", stream=True)


def test_settings_of_a_method_that_is_not_asked_for(model: PreTrainedModel, memory: Memory) -> None:
    with pytest.raises(SettingError, match="'lam' is a setting of methods that use the memory"):
        evaluate(model, memory, TEXT, "base", tokenizer=TOKENIZER, lam=0.3, k=None)
