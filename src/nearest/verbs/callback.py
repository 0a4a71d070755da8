"""While a model is trained with transformers, how well it predicts with a memory."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from nearest.corpus.documents import Document
from nearest.encode.identity import bare_model
from nearest.memory import Memory
from nearest.verbs.evaluate import evaluate


class MemoryCallback(TrainerCallback):
    """Measures a model with a memory at every evaluation of a `transformers.Trainer`.

    Keys are a model's states, so a model that learns needs a new memory each time: one of `corpus`
    is built in a temporary folder and `texts` are scored with it. The perplexities are added to
    the evaluation's metrics and to the trainer's log, as `eval_base_ppl`, `eval_knn_ppl` and so on.

    Args:
        corpus: documents of the memory; a few thousand tokens keep it quick.
        texts: what is scored; none of it should stand in the corpus.
        tokenizer: the model's.
        method: of the memory.
        **settings: of the method, as in `evaluate`.
    """

    def __init__(
        self,
        corpus: Sequence[Document | str],
        texts: Sequence[Document | str],
        tokenizer: Any,
        method: str = "knn",
        **settings: Any,
    ) -> None:
        self.corpus, self.texts, self.tokenizer = corpus, texts, tokenizer
        self.method, self.settings = method, settings

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the trainer after its own evaluation, by the first process alone."""
        if not state.is_world_process_zero:
            return
        model, metrics = given["model"], given.get("metrics")
        trained = bare_model(model)
        training = trained.training
        trained.eval()
        try:
            with tempfile.TemporaryDirectory() as folder:
                memory = Memory.build(trained, self.tokenizer, self.corpus, Path(folder) / "memory")
                methods = ["base", self.method]
                results = evaluate(
                    trained,
                    memory,
                    self.texts,
                    methods,
                    tokenizer=self.tokenizer,
                    **self.settings,
                )
        finally:
            trained.train(training)
        figures = {f"eval_{result.method}_ppl": result.ppl for result in results}
        if metrics is not None:
            metrics.update(figures)
        state.log_history.append({**figures, "step": state.global_step})
