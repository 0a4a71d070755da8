"""The examples of docs/memories-in-models.md run, and give what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "memories-in-models.md"


def test_the_examples_of_the_page_run_and_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(block, names)
    assert capsys.readouterr().out == "tensor([48, 16])\n" * 2
    memory, average = names["memory"], names["average"]
    expected = memory.lookup(names["state"].detach().numpy(), touch=False).values
    np.testing.assert_allclose(average.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert average.requires_grad
