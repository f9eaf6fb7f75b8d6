"""Models and their tokenizers: from folders, GGUF files and the local cache, checked as they come.

What a checkpoint lacks transformers fills with random numbers, and what it has in excess it leaves
out, so both are looked at here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import logging
import math
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..types import UnsupportedModelError
from .text import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "tekken.json")  # names of their files
_FLOATS = ("F64", "F32", "F16", "BF16")  # by their names in files
_GGUF = ".gguf"
_GGUF_PACKAGES = ("gguf", "accelerate")  # what transformers reads GGUF files with
_MARK = b"\xef\xbb\xbf"  # of byte order: what JSON may not begin with
_BYTES_MAX = (
    1 << 22
)  # of a JSON file that is read to check it; larger ones are left to their reader
_ERROR_MAX = 300  # characters of another library's error
_log = logging.getLogger("csfast")


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a model lies.

    Attributes:
        name: As it was asked for.
        folder: Holds its files.
        file: The GGUF file in it, if it is one.
        remedy: What completes it, for errors.
    """

    name: str
    folder: pathlib.Path
    file: str | None = None
    remedy: str = ""

    def refused(self, wanted: str, error: Exception | None = None) -> UnsupportedModelError:
        """Give the error that says what is wanted, in one line, whatever another library said."""
        why = "" if error is None else f" ({type(error).__name__}: {_line(error)})"
        return UnsupportedModelError(f"[load] {self.name}: want {wanted}{why}{self.remedy}.")


def load(
    path: str | pathlib.Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder or a GGUF file, or by name from the local cache.

    Nothing is downloaded, no code of the model's author is run, and only safetensors and GGUF files
    are read. Every tensor of the model has to be there.

    Args:
        path: Folder, GGUF file, or name of a model in the cache of Hugging Face.
        dtype: Of the weights; ``"auto"`` takes the one they are stored in, and bfloat16 for what a
            GGUF file stores in fewer bits.
        device: Where to put the model.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: Neither a folder nor a file nor a name in the cache.
        ValueError: There is no such device.
        UnsupportedModelError: Not a causal language model that csfast may load, or it is damaged or
            lacks something.
    """
    import transformers

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"[load] device = {str(device)!r}: want cpu, torch sees no other here.")
    source = _found(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if source.file is not None:
        _want_gguf(source)
        options["gguf_file"] = source.file
    else:
        _want_files(source)
    with _quiet():
        _want_kind(source, options)
        model = _weights(source, options, dtype)
        with _one_error(source, "a sound tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **options)
    n_words, n_tokens = vocabulary(model), tokenizer.vocab_size
    if n_tokens == 0 or (n_words is not None and n_tokens > n_words):
        raise source.refused(
            f"the model's own tokenizer, not one of {n_tokens} tokens beside an embedding of "
            f"{n_words} rows"
        )
    return nn.Module.to(model, device), tokenizer


def demo_folder() -> pathlib.Path:
    """Give the folder of the model that ships with csfast."""
    return pathlib.Path(__file__).parents[1] / "demo_model"


def _found(path: str | pathlib.Path) -> _Source:
    """Where the files of a model lie; names that are no paths are looked for in the cache."""
    name, place = str(path), pathlib.Path(path)
    if place.is_dir():
        return _Source(name, place)
    if place.is_file() and place.suffix.lower() == _GGUF:
        return _Source(name, place.parent, place.name)
    if place.exists():
        raise UnsupportedModelError(f"[load] {name}: want a model folder, or a {_GGUF} file.")
    wanted = "want a model folder, a GGUF file, or the name of a model in the local cache"
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, local_files_only=True)
    except huggingface_hub.errors.HFValidationError as error:
        raise FileNotFoundError(f"[load] {name!r}: {wanted}.") from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"[load] {name!r}: {wanted}; `hf download {name}` brings one there."
        ) from error
    return _Source(name, pathlib.Path(folder), remedy=f"; `hf download {name}` completes the cache")


def _want_gguf(source: _Source) -> None:
    """Refuse a GGUF file that nothing here can read."""
    missing = [name for name in _GGUF_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise source.refused(f"what reads GGUF files: pip install {' '.join(missing)}")


def _want_files(source: _Source) -> None:
    """Refuse a folder in which something is missing, or is not what its name says."""
    folder = source.folder
    if not (folder / "config.json").is_file():
        raise source.refused("a model folder with config.json")
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        with file.open("rb") as opened:
            raw = opened.read(_BYTES_MAX + 1)
        if raw.startswith(_MARK):
            raise source.refused(f"{file.name} without a byte order mark")
        if file.suffix == ".json" and len(raw) <= _BYTES_MAX:
            try:
                json.loads(raw.decode("utf-8"))
            except ValueError as error:
                raise source.refused(f"a sound {file.name}, JSON in UTF-8", error) from error
    if not any(folder.glob("*.safetensors")):
        raise source.refused("weights in .safetensors files")
    if not any(file for name in _TOKENIZERS for file in folder.glob(name)):
        raise source.refused("a tokenizer beside the weights")


def _want_kind(source: _Source, options: dict[str, Any]) -> None:
    """Refuse what is no causal language model, or is quantised."""
    import transformers

    wanted = "a configuration" if source.file is None else "a GGUF file"
    with _one_error(source, f"{wanted} that transformers reads without code of its author"):
        config = transformers.AutoConfig.from_pretrained(source.folder, **options)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise source.refused(
            f"a causal language model, not one of type {config.model_type!r}, that transformers "
            "knows without code of its author"
        )
    odd = [name for name, value in _numbers(config.to_dict()) if math.isnan(value)]
    if odd:
        raise source.refused(f"numbers in its configuration, not {odd[0]} = NaN")
    for part in (config, getattr(config, "text_config", None)):  # a model within the model
        quantised = getattr(part, "quantization_config", None) is not None
        if quantised and source.file is None:
            raise source.refused("weights that are not quantised")


def _weights(source: _Source, options: dict[str, Any], dtype: torch.dtype | str) -> PreTrainedModel:
    """The model with all of its weights, dequantised."""
    import transformers

    more: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    more["ignore_mismatched_sizes"] = True  # so that they are told, and refused by name
    if source.file is None:
        more["use_safetensors"] = True
    elif hasattr(transformers, "GgufConfig"):  # where there is none, all is dequantised anyway
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    whole = "a whole model folder" if source.file is None else "a whole GGUF file"
    with _one_error(source, whole):
        if source.file is None:
            _want_floats(source)
        elif dtype == "auto" and _is_coded(source.folder / source.file):
            more["dtype"] = torch.bfloat16
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, **more, **options
        )
    model, told = loaded
    _want_all(source, told)
    _want_used(source, model, sorted(told["unexpected_keys"]))
    return cast("PreTrainedModel", model)


def _want_all(source: _Source, told: dict[str, Any]) -> None:
    """Refuse a model of which transformers had to make up a part."""
    differ = [
        key if isinstance(key, str) else f"{key[0]} of {tuple(key[1])} for {tuple(key[2])}"
        for key in told["mismatched_keys"]
    ]
    for names in (differ, told["missing_keys"], told["error_msgs"]):
        if names:
            raise source.refused(
                f"all tensors in their shapes; {len(names)} missing or other, such as "
                f"{_line(min(names))}"
            )


def _want_used(source: _Source, model: PreTrainedModel, left_out: list[str]) -> None:
    """Refuse a configuration that leaves out a part of a module or of the layers; say the rest."""
    modules = dict(model.named_modules())
    kinds = {_numberless(name) for name in model.state_dict()}
    for name in left_out:
        parent = modules.get(name.rpartition(".")[0])
        is_part = parent is not None and any(True for _ in parent.parameters(recurse=False))
        if is_part or _numberless(name) in kinds:
            raise source.refused(
                f"a config.json that uses all tensors; {len(left_out)} left out, such as {name}"
            )
    if left_out:
        _log.warning(
            "[load] %s: tensors that the model has no use for are left out: %d, such as %s.",
            source.name,
            len(left_out),
            left_out[0],
        )


def _want_floats(source: _Source) -> None:
    """Refuse weights of integers or of fewer than 16 bits, which need scales to mean something."""
    import safetensors

    for file in sorted(source.folder.glob("*.safetensors")):
        with safetensors.safe_open(str(file), framework="pt") as opened:
            for name in sorted(opened.keys()):
                kind = opened.get_slice(name).get_dtype() if name.endswith(".weight") else "F32"
                if kind not in _FLOATS:
                    raise source.refused(f"weights that are not quantised, not {name} of {kind}")


def _is_coded(file: pathlib.Path) -> bool:
    """Say whether a GGUF file stores tensors in fewer bits than a float has."""
    reader: Any = importlib.import_module("gguf").GGUFReader(file)
    return any(tensor.tensor_type.name not in _FLOATS for tensor in reader.tensors)


def _numberless(name: str) -> str:
    """The name of a tensor with its layer left out."""
    return re.sub(r"\d+", "N", name)


@contextlib.contextmanager
def _one_error(source: _Source, wanted: str) -> Iterator[None]:
    """Give whatever the files make other libraries raise as one error that says what is wanted."""
    import huggingface_hub
    import safetensors

    # Of a configuration with a value of another type; older ones do not look.
    odd = getattr(huggingface_hub.errors, "StrictDataclassError", OSError)
    try:
        yield
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except (
        odd,
        struct.error,
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        ImportError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        safetensors.SafetensorError,
    ) as error:
        raise source.refused(wanted, error) from error
    except Exception as error:
        # The library of tokenizers raises this very class for all that it cannot read.
        if type(error) is not Exception:
            raise
        raise source.refused(wanted, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and tables on stderr: what matters is said here."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]


def _line(error: object) -> str:
    """Text in one line of bounded length."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= _ERROR_MAX else text[:_ERROR_MAX] + " ..."


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Floats of a configuration, as deep as they go, each with its dotted name."""
    if isinstance(value, float):
        yield name, value
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    for key, member in value.items() if isinstance(value, dict) else ():
        yield from _numbers(member, f"{name}.{key}" if name else str(key))
