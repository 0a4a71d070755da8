"""`nearest build --plan`: what it says is what then happens, and it writes nothing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import make_documents, snapshot
from nearest import Memory
from nearest.build import plan as plan_module
from nearest.build.build import BuildOptions, planned_memory
from nearest.build.plan import BuildPlan, share_plan
from nearest.cli import app
from nearest.corpus.documents import Document
from nearest.errors import CorpusError, FolderError
from nearest.index.building import code_bytes
from nearest.index.choice import resolve_spec
from nearest.store.manifest import KeysRecord
from nearest.store.new_segment import segment_tokens

CORPORA = {
    "short": make_documents(200, 40),
    "long": [Document("one", " ".join(d.text for d in make_documents(40, 200)))],
    "uneven": [*make_documents(300, 10), Document("one", "law " * 9_000)],
}


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("keys", ["none", "fp16", "int8"])
def test_a_plan_says_what_is_built(
    corpus: str,
    keys: str,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "_SAMPLE", 20_000)  # so that not all of it is tokenised
    documents, options = CORPORA[corpus], BuildOptions(keys=keys)
    path = tmp_path / "m"
    found = planned_memory(path, documents, tiny_model, tiny_tokenizer, options)
    assert not path.exists()
    memory = Memory.build(tiny_model, tiny_tokenizer, documents, path, keys=keys)
    assert found.documents == memory.documents == len(documents)
    assert found.entries == pytest.approx(memory.entries, rel=0.02)
    assert found.tokens == pytest.approx(memory.tokens, rel=0.02)
    assert found.segments == len(memory.segments)
    size = sum(len(data) for data in snapshot(path).values() if isinstance(data, bytes))
    assert found.bytes_needed == pytest.approx(size, rel=0.25)
    assert found.seconds >= 0
    assert set(found.stages) == {"tokens", "suffix array", "checksums"} | (
        set() if keys == "none" else {"keys", "index"}
    )


def test_the_forward_passes_are_counted_as_they_are_made(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With every pass of one length and cost, inputs times seconds an input is their sum."""
    from nearest.corpus.tokens import TokenRules, tokenise
    from nearest.encode.encoder import Encoder
    from nearest.encode.layers import find_key_layer

    layer = find_key_layer(tiny_model, "last_hidden")
    reader = Encoder.of(tiny_model, layer, 32, 16, 4)
    tokens = [i.tokens for i in tokenise(CORPORA["uneven"], tiny_tokenizer, TokenRules(0, 258))]
    exact = sum(int(batch.inputs.shape[0]) for batch in reader.batches(tokens))
    lengths = [len(t) - 1 for t in tokens]
    assert exact == sum(1 + max(0, -(-(n - 32) // 16)) for n in lengths)
    real = plan_module._inputs(plan_module.np.array(lengths, float), reader)
    told = sum(n + max(0, -(-(n - 32) // 16)) * 16 for n in lengths)
    assert real == told


def test_an_index_is_planned_where_one_will_be(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    documents = CORPORA["short"]
    options = BuildOptions(index="exact")
    plain = planned_memory(tmp_path, documents, tiny_model, tiny_tokenizer, options)
    options = BuildOptions(index="IVF64,SQ8")
    found = planned_memory(tmp_path, documents, tiny_model, tiny_tokenizer, options)
    assert found.bytes_needed - plain.bytes_needed == pytest.approx(found.entries * 40, rel=0.1)


@pytest.mark.parametrize("dim", [32, 256, 768, 1024, 4096])
def test_the_codes_of_a_segments_index_fit(dim: int) -> None:
    """As FAISS counts them, with 8 bytes for each id."""
    keys = KeysRecord(
        layer="last_hidden",
        module="",
        dim=dim,
        format="fp16",
        metric="l2",
        window=8,
        stride=4,
        projection=None,
        codebooks=None,
        index="auto",
    )
    tokens = segment_tokens(keys)
    spec = resolve_spec("auto", tokens, dim, 1 << 40)
    assert tokens * (code_bytes(spec, dim) + 8) <= 5 << 27
    assert tokens == 1 << 24 or tokens * (code_bytes(spec, dim) + 8) > 0.99 * (5 << 27)
    assert (
        segment_tokens(None)
        == segment_tokens(msgspec.structs.replace(keys, index="exact"))
        == 1 << 24
    )


def test_the_command(model_folder: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": d.text}) for d in CORPORA["short"]))
    before = snapshot(tmp_path)
    call: list[Any] = ["build", model_folder, str(corpus), "--out", str(tmp_path / "m"), "--plan"]
    result = CliRunner().invoke(app, [*call, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["documents"] == 200
    assert {"entries", "bytes_needed", "memory_bytes", "seconds", "stages"} <= set(found)
    result = CliRunner().invoke(app, call)
    assert f"{found['entries']:,}" in result.stdout
    assert "cost" not in result.stdout
    shared = CliRunner().invoke(app, [*call, "--workers", "16", "--price", "2.5"])
    assert "hours on 16 machines" in shared.stdout
    assert "machine hours" in shared.stdout
    without_plan = CliRunner().invoke(app, [*call[:-1], "--price", "2.5"])
    assert without_plan.exit_code == 2
    assert "--plan" in without_plan.output
    assert snapshot(tmp_path) == before


def test_what_could_not_be_built_is_not_planned(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model, tiny_tokenizer
    with pytest.raises(CorpusError, match="holds no documents"):
        planned_memory(tmp_path / "m", [], *model, BuildOptions())
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="is a file"):
        planned_memory(tmp_path / "file", ["text"], *model, BuildOptions())
    documents = [Document("a", "x"), Document("a", "y")]
    with pytest.raises(CorpusError, match="stands twice"):
        planned_memory(tmp_path / "m", documents, *model, BuildOptions())


def test_segments_are_shared_whole() -> None:
    stages = {"tokens": 100.0, "suffix array": 50.0, "keys": 300.0, "index": 50.0}
    plan = BuildPlan(10, 1_000, 990, 5, 1, 2, 3, 500.0, stages)
    alone = share_plan(plan, 1, 3.0)
    assert (alone.seconds, alone.machine_hours, alone.cost) == (500, 500 / 3600, 1_500 / 3600)
    # The others' indexes are filled like the first one.
    assert share_plan(plan, 5).seconds == share_plan(plan, 100).seconds == 100 + (350 + 2 * 50) / 5
    assert share_plan(plan, 2).seconds == 100 + 400 * 3 / 5  # three of the five on one of them
    assert share_plan(plan, 5, 2.0).cost == pytest.approx(2 * 5 * 190 / 3600)
    assert share_plan(dataclasses.replace(plan, segments=1), 5).seconds == 500


def test_segments_are_as_long_as_asked_for(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = BuildOptions(keys="none", segment_tokens=2_000)
    path = tmp_path / "m"
    found = planned_memory(path, CORPORA["short"], tiny_model, tiny_tokenizer, options)
    built = Memory.build(
        tiny_model, tiny_tokenizer, CORPORA["short"], path, options=options, tune=False
    )
    assert found.segments == len(built.segments) > 2
