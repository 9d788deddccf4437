"""Weights of the backbone alone: those of `fastcolor train --task classify`, torchvision's, or a colour network's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastcolor._files import atomic_path
from fastcolor.model.checkpoint import CheckpointError, why_not_loaded
from fastcolor.model.resnet import ResNet18Gray

_KEY = "fastcolor_backbone"
_PREFIX = "backbone."  # of the names in a colour network


@dataclass
class Backbone:
    """Weights by torchvision's names, the classes that their `fc` tells apart (empty where the file says nothing), and
    notes on the training (plain JSON)."""

    state: dict[str, Tensor]
    classes: tuple[str, ...] = ()
    notes: dict = field(default_factory=dict)


def save_backbone(path: str | Path, network: ResNet18Gray, classes: tuple[str, ...], notes: dict) -> None:
    """Writes the file whole or not at all, weights in float32. torchvision's names: others can read it too."""
    tensors = {n: v.detach().cpu().contiguous() for n, v in network.state_dict().items() if "num_batches" not in n}
    header = {"classes": classes, "notes": notes}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path}: cannot be written ({error})") from error


def load_backbone(path: str | Path) -> Backbone:
    """Reads weights of a resnet18: .safetensors by that name, anything else as torch.save writes it (weights alone: no
    code in the file is run). A dictionary may hold them under "state_dict", and names may begin with "module.".

    Raises:
        CheckpointError: missing, not readable, or no weights inside. Whether they fit is for the network to say.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    header = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state) if isinstance(state, dict) else state
        backbone = Backbone(dict(state), tuple(header.get("classes", ())), header.get("notes", {}))
    except Exception as error:  # torch.load raises many kinds on a broken file
        raise CheckpointError(f"{path}: not readable weights ({why_not_loaded(error)})") from error
    if not backbone.state or not all(isinstance(v, Tensor) for v in backbone.state.values()):
        raise CheckpointError(f"{path}: not the weights of a network, but something else")
    inner = {n.removeprefix(_PREFIX): v for n, v in backbone.state.items() if n.startswith(_PREFIX)}
    return Backbone(inner, backbone.classes, backbone.notes) if inner else backbone


def start_backbone(network: ResNet18Gray, path: str | Path, classes: tuple[str, ...] = ()) -> list[str]:
    """Gives a network the weights of a file; its classifier too, where the file's is of the same classes.

    Returns:
        the names that were left out.

    Raises:
        CheckpointError: as `load_backbone`, or weights of another network.
    """
    found = load_backbone(path)
    state = {n.removeprefix("module."): v.float() for n, v in found.state.items()}
    left_out = []
    if found.classes != classes:  # equal numbers of other classes would fit, and mean nothing
        left_out = [n for n in state if n.startswith("fc.")]
        state = {n: v for n, v in state.items() if not n.startswith("fc.")}
    try:
        return left_out + network.load_torchvision(state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
