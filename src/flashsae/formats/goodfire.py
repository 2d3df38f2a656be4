"""Goodfire's SAEs of Llama 3: one file of a state dict.

    f = relu(encoder_linear.weight @ x + encoder_linear.bias);   x_hat = decoder_linear.weight @ f + decoder_linear.bias

The bias of the decoder is not subtracted from what goes in. The name of the file tells what it is of, as in
Llama-3.3-70B-Instruct-SAE-l50.pt.

Source: Goodfire/Llama-3.3-70B-Instruct-SAE-l50 and Goodfire/Llama-3.1-8B-Instruct-SAE-l19 on the hub.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from flashsae.errors import CheckpointError
from flashsae.files.documents import load_pickle
from flashsae.formats.checks import check_finite, check_tensors, of_one_dtype, sizes
from flashsae.formats.content import Content, Format
from flashsae.formats.hook_names import hookpoint_of, model_of
from flashsae.formats.released import known

_HEAD = 1 << 16
"""Bytes of a file that torch.save wrote, in which the names of all tensors stand, before their values."""
_NAMES = {
    "encoder_linear.weight": "W_enc_T",
    "encoder_linear.bias": "b_enc",
    "decoder_linear.weight": "W_dec",
    "decoder_linear.bias": "b_dec",
}


def detects(path: Path) -> bool:
    """Tell whether a file is one of these, or a folder has one."""
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [file for file in files if file.suffix in (".pt", ".pth") and file.is_file() and _is_ours(file)]
    except OSError:
        return []


def _is_ours(file: Path) -> bool:
    with open(file, "rb") as opened:
        return b"encoder_linear.weight" in opened.read(_HEAD)


def read(path: Path) -> Content:
    """Return what a file holds."""
    files = _files(path) if path.is_dir() else [path]
    if len(files) != 1:
        names = ", ".join(each.name for each in files[:3]) or "none"
        raise CheckpointError(f"{path}: expected one file with an SAE of Goodfire's, found {names}: name the file.")
    (file,) = files
    weights = {name: value for name, value in load_pickle(file).items() if isinstance(value, Tensor)}
    (F,), (d,) = sizes(weights, "encoder_linear.bias", 1), sizes(weights, "decoder_linear.bias", 1)
    shapes = dict(zip(_NAMES, [(F, d), (F,), (d, F), (d,)]))
    check_tensors(file, weights, shapes)
    check_finite(file, weights)
    tensors = {_NAMES[name]: tensor for name, tensor in of_one_dtype(weights).items()}
    tensors["W_dec"] = tensors["W_dec"].T.contiguous()
    found = re.fullmatch(r"([\w.-]+)-SAE-l(\d+)", file.stem)
    model = model_of(found[1]) if found else None
    return Content(
        architecture="relu",
        settings={},
        tensors=tensors,
        apply_b_dec_to_input=False,
        metadata=known(
            model=model, hookpoint=hookpoint_of(f"blocks.{found[2]}.hook_resid_post", model) if found else None
        ),
    )


FORMAT = Format("goodfire", "Goodfire", detects, read, source="huggingface.co/Goodfire")
