"""The bundled models: small, trained, and loaded without a network.

    model, processor = vtc.zoo.load("tiny-llava")

Each is an ordinary checkpoint folder beside this file, with ordinary Hugging Face classes and safetensors weights.
"""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vtc.errors import UnsupportedModelError, VtcError, did_you_mean
from vtc.zoo import torchvision

FOLDER = Path(str(resources.files(__name__)))


def names() -> tuple[str, ...]:
    """The bundled models."""
    return tuple(sorted(config.parent.name for config in FOLDER.glob("*/config.json")))


def find(name: str) -> Path:
    """The folder of a bundled model, or of any checkpoint: `name` is a bundled name or a path."""
    for folder in (FOLDER / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    if Path(name).is_dir():
        raise VtcError(f"'{name}' has no config.json: give the folder that save_pretrained wrote")
    known = ", ".join(names()) or "none"
    raise VtcError(
        f"no bundled model and no checkpoint folder is called '{name}'{did_you_mean(name, names())}; bundled: {known}"
    )


def _takes_clips(folder: Path) -> bool:
    """Whether a processor of clips was saved into the folder."""
    processor = folder / "processor_config.json"
    inside = processor.is_file() and '"video_processor"' in processor.read_text(encoding="utf-8")
    return inside or (folder / "video_preprocessor_config.json").is_file()


def load(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
) -> tuple[Any, Any]:
    """Load a model, in evaluation mode, and its processor. Nothing is downloaded.

    Args:
        name: one of `names()`, or the folder of a vision-language checkpoint.
        dtype: of the weights; by default float32 on a CPU and the checkpoint's own elsewhere.
        device: where the model goes.
        attention: `attn_implementation` of transformers, for example `"eager"`; its default if `None`.

    Returns:
        The model and its processor, as `AutoModelForImageTextToText` and `AutoProcessor` make them.
    """
    folder = find(name)
    if find_spec("torchvision") is None and _takes_clips(folder):
        raise VtcError(
            f"'{name}' takes clips, and transformers' processors of clips need torchvision: install the build that "
            'fits your torch, or this package with its extra: pip install "/path/to/vtc[video]"'
        )
    torchvision.mend()  # before transformers looks for it
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise UnsupportedModelError(
                f"'{name}' is a {config.model_type} model, which takes no images; "
                "vtc needs a vision-language model, such as a LLaVA"
            )
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        if not hasattr(processor, "image_processor"):
            raise VtcError(f"'{name}' has no image processor: save the model's processor into the same folder")
        default = torch.float32 if torch.device(device).type == "cpu" else "auto"
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype or default,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
        )
    except VtcError:
        raise
    except (OSError, ValueError, ImportError) as error:  # transformers' ways to say that a checkpoint is unusable
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VtcError(f"cannot load '{name}': {reason}") from error
    return model.eval().to(device), processor
