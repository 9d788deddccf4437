"""Weights in safetensors, with all that rebuilds the network in the file's own metadata."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastcolor._files import atomic_path
from fastcolor.model.field import check_field_options
from fastcolor.model.network import ColorNetwork, NetworkConfig

FORMAT = 1
_KEY, _PRIOR = "fastcolor", "prior"


class CheckpointError(ValueError):
    """A weights file that is missing, broken or of another kind. The message names it."""


@dataclass
class Checkpoint:
    """A network and what belongs to it: the label prior of its training set, the mean field that was trained with it
    (options of `mean_field`; empty where none was), and notes on the training (plain JSON)."""

    network: ColorNetwork
    prior: Tensor | None = None  # [K] float64, sums to the number of label axes
    notes: dict = field(default_factory=dict)
    mrf: dict = field(default_factory=dict)


def why_not_loaded(error: Exception) -> str:
    """Of what torch.load raises with `weights_only`, of any type: a line. Its own words for a file that it does not
    know advise to run the code in it."""
    if isinstance(error, pickle.UnpicklingError):
        return "torch.save did not write it, or it holds more than tensors and plain values"
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Writes the file whole or not at all: weights as `dtype`, statistics of the normalization as float32."""
    tensors = {}
    for name, value in checkpoint.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue  # of no use after training
        keep = "running_" in name or not value.is_floating_point()
        tensors[name] = value.detach().to("cpu", value.dtype if keep else dtype).contiguous()
    if checkpoint.prior is not None:
        tensors[_PRIOR] = checkpoint.prior.detach().cpu().float().contiguous()
    header = {"format": FORMAT, "network": checkpoint.network.config.to_dict(), "notes": checkpoint.notes}
    if checkpoint.mrf:
        header["mrf"] = checkpoint.mrf
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path}: cannot be written ({error})") from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a file of `save_checkpoint`; the network comes in float32, in eval mode.

    Raises:
        CheckpointError: the file is missing, truncated, not of fastcolor, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if header is None:
                raise CheckpointError(f"{path}: a safetensors file, but not one of fastcolor (no configuration inside)")
            if header["format"] > FORMAT:
                raise CheckpointError(
                    f"{path}: format {header['format']}, this fastcolor reads up to {FORMAT}; upgrade it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        network = ColorNetwork(NetworkConfig.from_dict(header["network"]))
        options = check_field_options(header.get("mrf", {}))
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable fastcolor checkpoint ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    prior = tensors.pop(_PRIOR, None)
    expected = {n for n in network.state_dict() if not n.endswith("num_batches_tracked")}
    if expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())
        raise CheckpointError(f"{path}: its weights do not fit its configuration: {', '.join(odd[:3])}")
    try:
        network.load_state_dict({n: v.float() for n, v in tensors.items()}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit its configuration ({error})") from error
    if prior is not None and prior.shape != (network.config.bins.count,):
        raise CheckpointError(f"{path}: its prior has shape {list(prior.shape)}, not [{network.config.bins.count}]")
    return Checkpoint(network.to(device).eval(), prior, header.get("notes", {}), options)
