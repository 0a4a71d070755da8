"""What each extra is for, tried: shell lines that must end well with that extra alone.

They run in a folder with documents, `text.txt` and `text.jsonl`, and a memory of the first, `m`.
`$MODEL` is the model that made it and `$ROOT` this repository.
"""

TRIES = {
    "cpu": """
        nearest build $MODEL text.jsonl --out indexed --index IVF4,SQ8 --no-tune
        nearest verify indexed
        """,
    "data": """
        python - <<'END'
        import datasets, pandas
        pandas.DataFrame({"text": ["One.", "Two."]}).to_parquet("rows.parquet")
        END
        nearest build $MODEL rows.parquet --out rows --keys none
        """,
    "docs": """
        mkdir source
        cp -r $ROOT/{docs,src,mkdocs.yml,README.md,CHANGELOG.md,CONTRIBUTING.md} source
        cd source
        NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
        """,
    "files": """
        python - <<'END'
        import docx, pypdf
        from pathlib import Path
        page = docx.Document()
        page.add_paragraph("A page.")
        page.save("page.docx")
        leaf = pypdf.PdfWriter()
        leaf.add_blank_page(99, 99)
        leaf.write("page.pdf")
        Path("latin.txt").write_bytes(("Straße und Größe. " * 9).encode("latin-1"))
        END
        nearest build $MODEL page.docx page.pdf latin.txt --out pages --keys none --encoding auto
        """,
    "gguf": "python -c 'import gguf; gguf.GGUFReader'",
    "harness": "python -c 'from lm_eval.models.openai_completions import LocalCompletionsAPI'",
    "passages": "nearest eval m --text text.txt --method base,in-context",
    "plots": """
        nearest sweep m --text text.txt --methods knn --out figure
        test -s figure/sweep.png
        """,
    "ray": "nearest build $MODEL text.jsonl --out by-ray --ray local --workers 1 --no-tune",
    "release": """
        python -m build --version
        python -m piplicenses --version
        python -m cyclonedx_py --version
        """,
    "retro": """
        nearest retro chunks text.jsonl --out by-words --tokenizer $MODEL
        nearest retro neighbours by-words --method bm25
        python - <<'END'
        from os import environ
        from sentence_transformers import SentenceTransformer, models
        words = models.Transformer(environ["MODEL"])
        words.tokenizer.pad_token = words.tokenizer.eos_token
        pooled = models.Pooling(words.get_word_embedding_dimension())
        SentenceTransformer(modules=[words, pooled]).save("embedder")
        END
        nearest retro prepare text.jsonl --out by-vectors --tokenizer $MODEL --embedder embedder
        """,
    "s3": """
        python -c 'import fsspec, nearest.store.objects; fsspec.get_filesystem_class("s3")'
        """,
    "serve": """
        python -m nearest serve m --port 8765 &  # not the function: that would be a shell to kill
        trap "kill $!" EXIT
        python - <<'END'
        import json, time, urllib.error, urllib.request
        asked = {"model": "general-gpt2-7m", "prompt": "The court", "max_tokens": 4}
        body = json.dumps(asked).encode()
        head = {"Content-Type": "application/json"}
        asked = urllib.request.Request("http://127.0.0.1:8765/v1/completions", body, head)
        for _ in range(600):
            try:
                print(urllib.request.urlopen(asked).read())
                break
            except urllib.error.URLError as error:
                if isinstance(error, urllib.error.HTTPError):
                    raise
                time.sleep(0.2)
        else:
            raise SystemExit("no answer")
        END
        """,
    "text-metrics": """
        echo '{"id": "a", "source": "The court", "text": " may order"}' > pairs.jsonl
        nearest eval m --generate --text pairs.jsonl --method base,knn --max-new-tokens 4
        """,
    "train": """
        train="python $ROOT/examples/train_base/train.py"
        $train $MODEL text.jsonl --out trained --max-steps 1 --block 32
        python -c 'import tensorboard, nearest.retro.training'
        """,
}
