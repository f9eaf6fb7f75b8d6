"""Models and their tokenizers, from folders and from the local cache."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..types import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "tekken.json")  # names of their files


def load(
    path: str | pathlib.Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder, or by name from the local cache.

    Nothing is downloaded, no code of the model's author is run, and only safetensors are read.

    Args:
        path: Folder, or name of a model in the cache of Hugging Face.
        dtype: Of the weights; ``"auto"`` takes the one they are stored in.
        device: Where to put the model.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: Neither a folder nor a name in the cache.
        ValueError: There is no such device.
        UnsupportedModelError: Not a causal language model that csfast may load.
    """
    import safetensors
    import transformers

    folder = pathlib.Path(path)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"[load] device = {str(device)!r}: want cpu, torch sees no other here.")
    config = _config(folder, str(path))
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"[load] {path}: want weights that are not quantised.")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"[load] {path}: model type {config.model_type!r}: want a causal language model that "
            "transformers knows without code of its author."
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(f"[load] {path}: want weights in .safetensors files.")
    if folder.is_dir() and not any(path for n in _TOKENIZERS for path in folder.glob(n)):
        raise UnsupportedModelError(f"[load] {path}: want a tokenizer beside the weights.")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _without_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, use_safetensors=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **options)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise UnsupportedModelError(
            f"[load] {path}: want a whole model folder ({error})."
        ) from error
    return cast("PreTrainedModel", nn.Module.to(model, device)), tokenizer


def demo_folder() -> pathlib.Path:
    """Give the folder of the model that ships with csfast."""
    return pathlib.Path(__file__).parents[1] / "demo_model"


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own on stderr."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _config(folder: pathlib.Path, name: str) -> Any:
    """The configuration of a model folder or of a model in the cache."""
    import transformers

    if folder.exists() and not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"[load] {name}: want a model folder with config.json.")
    try:
        return transformers.AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(
            f"[load] {name}: want a configuration that transformers reads without code of its "
            f"author ({error})."
        ) from error
    except OSError as error:
        if folder.exists():
            raise UnsupportedModelError(f"[load] {name}: want a sound config.json.") from error
        raise FileNotFoundError(
            f"[load] {name!r}: want a model folder, or the name of a model in the local cache."
        ) from error
