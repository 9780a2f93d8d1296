"""Loading models: bundled ones by name, others by folder, and what is said when that does not work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from vtc import zoo
from vtc.errors import UnsupportedModelError, VtcError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that cannot be used, each for another reason."""
    root = tmp_path_factory.mktemp("checkpoints")
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = LlamaConfig(**sizes)
    LlamaForCausalLM(text).save_pretrained(root / "text-only")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=39))
    model.save_pretrained(root / "no-processor")
    (root / "empty").mkdir()
    return root


def test_tiny_llava_loads_as_documented() -> None:
    model, processor = zoo.load("tiny-llava")
    assert isinstance(model, LlavaForConditionalGeneration)
    assert type(processor).__name__ == "LlavaProcessor"
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_dtype_and_attention_are_passed_on() -> None:
    model, _ = zoo.load("tiny-llava", dtype=torch.bfloat16, attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"


def test_folder_and_name_are_the_same_model() -> None:
    by_name, by_folder = (zoo.load(name)[0].state_dict() for name in ("tiny-llava", str(zoo.find("tiny-llava"))))
    assert by_name.keys() == by_folder.keys()
    assert all(torch.equal(by_name[key], by_folder[key]) for key in by_name)


def test_weights_are_safetensors_only() -> None:
    assert {path.suffix for path in zoo.find("tiny-llava").iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}


def test_near_miss_is_suggested() -> None:
    with pytest.raises(VtcError, match="did you mean 'tiny-llava'"):
        zoo.load("tinyllava")


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(VtcError, match="called 'gpt-17'.*bundled: " + (", ".join(zoo.names()) or "none")):
        zoo.load("gpt-17")


def test_folder_without_config(folders: Path) -> None:
    with pytest.raises(VtcError, match=r"has no config\.json"):
        zoo.load(str(folders / "empty"))


def test_text_only_model_is_refused(folders: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="is a llama model, which takes no images"):
        zoo.load(str(folders / "text-only"))


def test_missing_processor_is_one_line(folders: Path) -> None:
    with pytest.raises(VtcError) as caught:
        zoo.load(str(folders / "no-processor"))
    assert "no-processor" in str(caught.value) and "\n" not in str(caught.value)


def test_clips_without_torchvision_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    zoo.load("tiny-llava")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text('{"video_processor": {}}')
    with pytest.raises(VtcError, match=r"needs? torchvision: install the build .*vtc\[video\]"):
        zoo.load(str(tmp_path))
