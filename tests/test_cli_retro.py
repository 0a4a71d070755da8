"""`nearest retro`, from files to neighbours, with a tiny BERT as embedder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from nearest.cli import app
from nearest.errors import ModelError
from nearest.retro import MemoryNeighbours, NeighbourTable, RetroForCausalLM
from nearest.retro.convert import read_retro_json, to_norlund
from nearest.retro.data.database import ChunkDatabase
from nearest.retro.data.embedders import Embedder
from retro_models import CHUNK, tiny_model, tokens

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def corpus(path: Path, count: int, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    lines = [
        {
            "id": f"d{seed}-{number}",
            "text": " ".join(random.choice(WORDS, random.integers(3, 40))),
            "date": f"20{number:02d}-01-01",
        }
        for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def run(*arguments: Any, code: int = 0) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["retro", *map(str, arguments)])
    assert result.exit_code == code, result.output
    lines = result.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def prepared(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    corpus(folder / "train.jsonl", 12)
    options = ("--tokenizer", bert, "--embedder", f"bert:{bert}", "--chunk-size", 8)
    (told,) = run("prepare", folder / "train.jsonl", "--out", folder / "db", *options, "--json")
    assert told["documents"] == 12
    assert told["recall"] == 1.0
    assert told["struck"]["same_document"] >= told["chunks"]
    return folder / "db"


def test_stages_by_themselves_and_in_parts_give_the_same(
    prepared: Path, bert: str, tmp_path: Path
) -> None:
    db = tmp_path / "db"
    source = prepared.parent / "train.jsonl"
    run("chunks", source, "--out", db, "--tokenizer", bert, "--chunk-size", 8)
    run("embed", db, "--embedder", f"bert:{bert}", "--part", "2/2")
    run("embed", db, "--embedder", f"bert:{bert}", "--part", "1/2", "--batch-size", 64)
    run("index", db)
    (told,) = run("neighbours", db, "--json")
    assert told["complete"]
    for name in ("neighbours/ids.npy", "neighbours/distances.npy", "neighbours/table.json"):
        assert (db / name).read_bytes() == (prepared / name).read_bytes()
    (vectors,), (others,) = (at.glob("segments/*/*vectors.npy") for at in (db, prepared))
    assert vectors.read_bytes() == others.read_bytes()
    assert (
        run(
            "prepare",
            source,
            "--out",
            db,
            "--tokenizer",
            bert,
            "--embedder",
            f"bert:{bert}",
            "--chunk-size",
            8,
            "--json",
        )[0]["chunks"]
        == told["chunks"]
    )  # all is there already


def test_neighbours_of_another_corpus_in_several_databases(
    prepared: Path, bert: str, tmp_path: Path
) -> None:
    other = corpus(tmp_path / "valid.jsonl", 4, seed=1)
    table = tmp_path / "valid.neighbours"
    options = ("--table", table, "--neighbours", 3, "--json")
    (told,) = run("neighbours", prepared, "--queries", other, "--database", prepared, *options)
    queries = ChunkDatabase.open(tmp_path / "valid.neighbours.queries")
    assert told["chunks"] == len(queries.chunks)
    ids = np.asarray(NeighbourTable.open(table).ids)
    chunks = len(ChunkDatabase.open(prepared).chunks)
    assert (np.abs(ids[:, 1] - ids[:, 0]) == chunks).all()  # the same one in both
    (told,) = run(
        "neighbours",
        prepared,
        "--queries",
        prepared,
        "--table",
        tmp_path / "t",
        "--method",
        "bm25",
        "--older",
        "--longest-run",
        8,
        "--ngram",
        13,
        "--json",
    )
    assert told["struck"]["not_older"] > 0


def test_showing_and_verifying(prepared: Path, tmp_path: Path) -> None:
    (told,) = run("show", prepared, "--json")
    assert told["documents"] == 12
    assert told["embedder"]["pooling"] == "mean"
    shown = run("show", prepared, "--document", "d0-3", "--json")
    texts = [
        json.loads(line) for line in (prepared.parent / "train.jsonl").read_text().splitlines()
    ]
    assert " ".join(chunk["text"] for chunk in shown) == texts[3]["text"]
    first = shown[0]
    assert len(first["neighbours"]) == 2
    assert all(other["document"] != "d0-3" for other in first["neighbours"])
    assert first["struck"][0] == {**first["struck"][0], "reason": "same_document", "position": 0}
    for neighbour in first["neighbours"]:
        text = {t["id"]: t["text"].split() for t in texts}[neighbour["document"]]
        at = neighbour["position"]
        assert neighbour["text"].split() == text[at : at + 8]
        assert neighbour["continuation"].split() == text[at + 8 : at + 16]
    page = tmp_path / "page.html"
    run("show", prepared, "--document", "3", "--html", page)
    assert "struck out: same_document" in page.read_text()
    assert run("verify", prepared, "--sample", "1", "--json") == [{"problems": []}]
    run("show", prepared, "--document", "nobody", code=2)


def test_verify_finds_what_was_changed(prepared: Path, tmp_path: Path) -> None:
    table = NeighbourTable.open(prepared / "neighbours")
    ids = np.array(table.ids)
    ids[0, [0, 1]] = ids[0, [1, 0]]
    record = {name: value for name, value in table.record.items() if name != "files"}
    NeighbourTable(ids, np.array(table.distances), record).save(tmp_path / "t")
    (told,) = run("verify", prepared, "--table", tmp_path / "t", "--json", code=1)
    assert "1 chunks, as [0]" in told["problems"][0]


@pytest.mark.slow
def test_mistakes(prepared: Path, bert: str, tmp_path: Path) -> None:
    source = prepared.parent / "train.jsonl"
    corpus(prepared.parent / "more.jsonl", 13)
    for arguments, named in (
        (("chunks", source, "--out", tmp_path / "x"), "--tokenizer"),
        (
            ("chunks", source, "--out", prepared, "--tokenizer", bert),
            "vectors of chunks of 8 tokens",
        ),
        (
            (
                "chunks",
                prepared.parent / "more.jsonl",
                "--out",
                prepared,
                "--tokenizer",
                bert,
                "--chunk-size",
                8,
            ),
            "other documents",
        ),
        (
            ("prepare", prepared, "--embedder", f"bert:{bert}", "--out", tmp_path / "x"),
            "leave --out out",
        ),
        (("prepare", source, "--embedder", f"bert:{bert}", "--tokenizer", bert), "give --out"),
        (("neighbours", prepared, "--table", tmp_path / "t", "--neighbours", 0), "at least 1"),
        (("neighbours", prepared, "--part", "3/2"), "such as 2/4"),
        (("show", prepared, "--document", "d0-1", "--neighbours", 21), "stores 20"),
        (("index", prepared, "--index", "nonsense"), "nonsense"),
        (("index", prepared, "--recall", 2), "(0, 1]"),
        (("show", bert), "is not a memory"),
        (("embed", prepared, "--embedder", f"bert-cls:{bert}"), "pooling"),
        (("neighbours", prepared, "--neighbours", 3), "made otherwise"),
        (("neighbours", prepared, "--queries", source), "--table"),
        (("neighbours", tmp_path), "is not a memory"),
        (("embed", prepared, "--embedder", f"bert:{tmp_path}"), "no encoder"),
        (("convert", tmp_path / "no.ckpt"), "--out"),
        (("convert", tmp_path / "no.ckpt", "--out", source), "exists: give a folder that does"),
        (("show", prepared, "--document", "3", "--html", tmp_path / "no" / "x"), "does not exist"),
        (("show", prepared, "--document", "3", "--html", tmp_path), "is a folder: name a file"),
    ):
        result = CliRunner().invoke(app, ["retro", *map(str, arguments)])
        assert result.exit_code == 2, arguments
        assert named in result.stderr.replace("\n", " "), result.stderr


def nearest(*arguments: Any, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_the_life_of_a_prepared_memory(prepared: Path, bert: str, tmp_path: Path) -> None:
    """add, remove, compact and info know chunks; what is stale says how to mend it."""
    path = tmp_path / "m"
    shutil.copytree(prepared, path)
    more = corpus(tmp_path / "more.jsonl", 3, seed=2)
    told = nearest("add", path, more)["chunks"]
    assert (told["size"], told["embedder"], told["recall@4"]) == (8, bert, 1.0)
    assert told["without_vector"] > 0
    result = CliRunner().invoke(app, ["retro", "neighbours", str(path)])
    assert result.exit_code == 2
    assert "run `nearest retro embed" in " ".join(result.stderr.split())
    nearest("remove", path, "--doc", "d0-3")
    result = CliRunner().invoke(app, ["retro", "prepare", str(path), "--embedder", f"bert:{bert}"])
    assert "--chunk-size" in result.stderr or "64" in result.stderr  # it was cut into chunks of 8
    again = ("prepare", path, "--embedder", f"bert:{bert}", "--chunk-size", 8)
    result = CliRunner().invoke(app, ["retro", *map(str, again)])
    assert "made otherwise" in " ".join(result.stderr.split())  # the old table is in its place
    shutil.rmtree(path / "neighbours")
    (told,) = run(*again, "--json")
    assert told["documents"] == 14
    nearest("compact", path)
    assert run("verify", path, "--sample", 1, "--json") == [{"problems": []}]
    shown = run("show", path, "--document", "d2-0", "--neighbours", 20, "--json")
    found = {n["document"] for chunk in shown for n in [*chunk["neighbours"], *chunk["struck"]]}
    assert "d0-3" not in found
    assert len(found) > 5


def test_a_sentence_transformers_model_by_name(bert: str, tmp_path: Path) -> None:
    """A tiny one, made here: by its folder, on the command line and live."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    reads = modules.Transformer(bert, max_seq_length=16)
    pools = modules.Pooling(reads.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[reads, pools], device="cpu").save(str(tmp_path / "st"))
    db = tmp_path / "db"
    source = corpus(tmp_path / "train.jsonl", 6)
    options = ("--tokenizer", bert, "--embedder", tmp_path / "st", "--chunk-size", 8)
    run("prepare", source, "--out", db, *options, "--prefix", "w0 ")
    live = MemoryNeighbours(db, neighbours=3)  # loads the embedder and the tokenizer by their names
    own = ChunkDatabase.open(db)
    assert own.embedder.prefix == "w0 "
    np.testing.assert_allclose(np.linalg.norm(own.embeddings, axis=1), 1, atol=1e-3)
    live(torch.from_numpy(own.chunks.rows(np.arange(3))))
    assert [sources[0].chunk for sources in live.sources] == [0, 1, 2]
    bert_like = Embedder.bert(bert, normalise=True, prefix="w0 ")
    text = json.loads(source.read_text().splitlines()[0])["text"].split()[:8]
    assert bert_like([" ".join(text)])[0] @ own.embeddings[0].astype(np.float32) > 0.5
    shutil.rmtree(tmp_path / "st")
    with pytest.raises(ModelError, match="no sentence-transformers model can be loaded"):
        MemoryNeighbours(db)


def test_an_empty_document_is_left_out(bert: str, tmp_path: Path) -> None:
    source = corpus(tmp_path / "train.jsonl", 3)
    with source.open("a") as file:
        file.write(json.dumps({"id": "empty", "text": " "}) + "\n")
    options = ("--tokenizer", bert, "--embedder", f"bert:{bert}", "--chunk-size", 8)
    (told,) = run("prepare", source, "--out", tmp_path / "db", *options, "--json")
    assert told["documents"] == 3
    run("prepare", source, "--out", tmp_path / "db", *options)  # and compared so, too
    source.write_text("")
    result = CliRunner().invoke(
        app, ["retro", *map(str, ("prepare", source, "--out", tmp_path / "e", *options))]
    )
    assert result.exit_code == 2
    assert "no documents" in " ".join(result.stderr.split())
    assert not (tmp_path / "e").exists()


def test_the_berts_two_poolings(bert: str) -> None:
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    model = BertModel.from_pretrained(bert)
    mean, cls = Embedder.bert(bert, "mean"), Embedder.bert(bert, "cls")
    assert mean.identity != cls.identity
    for text, one, other in zip(texts, mean(texts), cls(texts), strict=True):
        ids = [2, *(4 + WORDS.index(word) for word in text.split())]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(one, states[1:].mean(0).numpy(), atol=1e-5)
        np.testing.assert_allclose(other, states[0].numpy(), atol=1e-5)


def test_weights_of_the_public_code(tmp_path: Path) -> None:
    model = tiny_model("norlund").float()
    state = to_norlund(model)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    settings = {"num_embeddings": 50, "chunk_size": CHUNK, "dropout_p": 0.2, "dec_num_heads": 2}
    (tmp_path / "retro.json").write_text(json.dumps(settings))
    assert read_retro_json(tmp_path / "retro.json")["residual_dropout"] == 0.2
    options = ("--config", tmp_path / "retro.json", "--json")
    run("convert", tmp_path / "a.ckpt", "--out", tmp_path / "model", *options)
    assert not list(tmp_path.glob("*.partial"))
    converted = RetroForCausalLM.from_pretrained(tmp_path / "model")
    assert converted.config.attention_dropout == 0.2
    torch.testing.assert_close(converted(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    (told,) = run("convert", tmp_path / "a.ckpt", "--check", *options)
    assert told["weights"] == sum(w.numel() for w in model.parameters())
    del state["lm_head.weight"]
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "b.ckpt")
    result = CliRunner().invoke(app, ["retro", "convert", str(tmp_path / "b.ckpt"), "--check"])
    assert result.exit_code == 2
    assert "lm_head.weight" in result.stderr
    assert "more" in result.stderr
    (tmp_path / "retro.json").write_text(json.dumps({"heads": 3}))
    result = CliRunner().invoke(
        app,
        [
            "retro",
            "convert",
            str(tmp_path / "a.ckpt"),
            "--check",
            "--config",
            str(tmp_path / "retro.json"),
        ],
    )
    assert result.exit_code == 2
    assert "'heads'" in result.stderr
