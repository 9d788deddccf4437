"""LPIPS and FID, figures of networks that others trained: computed where their weights are at hand. Nothing is ever
downloaded; where something is missing, it is said what and where it was looked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcolor.model.checkpoint import why_not_loaded

ALEXNET = "alexnet-owt-*.pth"  # torchvision's names of the file: alexnet-owt-7be5be79.pth and an older one
INCEPTION = "*inception-2015-12-05*.pth"  # torch-fidelity's name, and pytorch-fid's of the same weights
_LINEAR = {"torchmetrics": "functional/image/lpips_models/alex.pth", "lpips": "weights/v0.1/alex.pth"}
_SMALLEST = 31  # pixels a side: less leaves AlexNet's second pooling nothing
_KEPT = 1 << 21  # pixels of a picture whose features are kept while its colourings are measured: 60 MB
FEW = 5000  # pictures below which FID is said to be biased


class WeightsError(ValueError):
    """Weights of LPIPS that were named and cannot be used. The message names the file and says why."""


class _Missing(Exception):
    """What is not at hand, and where it was looked for."""


# --- LPIPS ------------------------------------------------------------------------------------------------------------


class AlexNet(nn.Module):
    """The convolutions of AlexNet as Krizhevsky 2014 (arXiv 1404.5997) has them, under torchvision's names, so that its
    ImageNet file loads."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to what the five convolutions give, rectified."""
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


class Lpips(nn.Module):
    """Learned perceptual similarity of Zhang et al. 2018 (arXiv 1801.03924, equation 1), version 0.1 with AlexNet:

        d(x, y) = Σ over layers, mean over positions, Σ over channels of w · (x̂ − ŷ)²

    x̂ is a layer's output with unit length over channels, w ≥ 0 the learned weight of a channel. 0 where pictures are
    equal. Pictures are not resized, so figures of different sizes do not compare.

    Args:
        features: torchvision's state of AlexNet, `features.0.weight` and so on; more may be in it.
        linear: state of the channels' weights, `lin0.model.1.weight` [1, C, 1, 1] and so on.

    Raises:
        WeightsError: something is missing, or has another shape.
    """

    def __init__(self, features: dict[str, Tensor], linear: dict[str, Tensor]):
        super().__init__()
        self.network = AlexNet()
        wanted = self.network.state_dict()
        _check({name: tuple(t.shape) for name, t in wanted.items()}, features)
        self.network.load_state_dict({name: features[name] for name in wanted})
        widths = [m.out_channels for m in self.network.features if isinstance(m, nn.Conv2d)]
        _check({_linear_name(i): (1, n, 1, 1) for i, n in enumerate(widths)}, linear)
        for i in range(len(widths)):
            self.register_buffer(f"weight{i}", linear[_linear_name(i)].float())
        # from [-1, 1] to what ImageNet's mean and deviation, rounded by the authors, make of it
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def units(self, rgb: Tensor) -> list[Tensor]:
        """Features with unit length over channels, of pictures [B, 3, H, W] in [-1, 1]."""
        # added to the length as the authors do: where nothing fires nothing is divided by 0
        return [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in self.network((rgb - self.shift) / self.scale)]

    def forward(self, image: Tensor, truth: Tensor) -> Tensor:
        """Distances [B] of pictures [B, 3, H, W] in [-1, 1], at least 31 pixels a side."""
        return self._apart(self.units(image), self.units(truth))

    def _apart(self, image: list[Tensor], truth: list[Tensor]) -> Tensor:
        layers = zip(image, truth, strict=True)
        parts = [
            ((x - y).square() * getattr(self, f"weight{i}")).sum(1).mean((1, 2)) for i, (x, y) in enumerate(layers)
        ]
        return torch.stack(parts).sum(0)

    def against(self, truth: Tensor) -> Callable[[Tensor], float] | None:
        """What measures colourings of one picture [3, H, W] uint8; None where it is too small."""
        if min(truth.shape[1:]) < _SMALLEST:
            return None
        known = self.units(_signed(truth)) if truth[0].numel() <= _KEPT else None

        def distance(image: Tensor) -> float:
            true = self.units(_signed(truth)) if known is None else known
            return self._apart(self.units(_signed(image)), true).item()

        return distance


def _signed(rgb: Tensor) -> Tensor:
    """[3, H, W] uint8 to [1, 3, H, W] in [-1, 1]."""
    return rgb[None].float() / 127.5 - 1


def _linear_name(layer: int) -> str:
    return f"lin{layer}.model.1.weight"


def _check(wanted: dict[str, tuple], found: dict[str, Tensor]) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise WeightsError(f"has no {name}")
        if tuple(found[name].shape) != shape:
            raise WeightsError(f"{name} must have shape {list(shape)}, got {list(found[name].shape)}")


def _state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # whatever unpickling finds wrong, of any type
        raise WeightsError(f"not a file of weights ({why_not_loaded(error)})") from error
    if not isinstance(state, dict):
        raise WeightsError(f"expected a state dict, got {type(state).__name__}")
    return state


def _in_package(package: str, file: str) -> Path | None:
    """A file of a package that is installed; the package is not imported."""
    spec = find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((Path(place, file) for place in places if Path(place, file).is_file()), None)


def _downloaded(pattern: str) -> Path | None:
    """A file that PyTorch's hub has downloaded before."""
    return next(iter(sorted((Path(torch.hub.get_dir()) / "checkpoints").glob(pattern))), None)


def _hub() -> str:
    """Where that is, without the name of the home folder: it goes into reports."""
    place = Path(torch.hub.get_dir()) / "checkpoints"
    return f"~/{place.relative_to(Path.home()).as_posix()}" if place.is_relative_to(Path.home()) else str(place)


def find_lpips(alexnet: Path | None = None) -> tuple[Lpips, dict]:
    """LPIPS from the files at hand, and what it was made of.

    Args:
        alexnet: torchvision's file of AlexNet, else what lies in the hub's folder; the channels' weights are those that
            the packages torchmetrics and lpips carry.

    Raises:
        _Missing: one of the two is not at hand. WeightsError: a file cannot be used.
    """
    places = {package: _in_package(package, file) for package, file in _LINEAR.items()}
    linear = next(((package, path) for package, path in places.items() if path is not None), None)
    features = alexnet or _downloaded(ALEXNET)
    if features is None:
        raise _Missing(f"no weights of AlexNet ({ALEXNET}) in {_hub()}; --lpips FILE names them elsewhere")
    if linear is None:
        raise _Missing("no weights of its channels: torchmetrics and lpips carry them, and neither is installed")
    try:
        model = Lpips(_state(features), _state(linear[1]))
    except WeightsError as error:
        raise WeightsError(f"{features}: {error}; expected torchvision's file of AlexNet, {ALEXNET}") from error
    digest = hashlib.sha256(features.read_bytes()).hexdigest()[:16]
    return model, {"network": "AlexNet, version 0.1", "file": features.name, "sha256": digest, "channels": linear[0]}


# --- FID --------------------------------------------------------------------------------------------------------------


class Fid:
    """Fréchet distance between the features of the truths and of each way of colouring (Heusel et al. 2017, arXiv
    1706.08500), by torchmetrics. Features of the truths are computed once."""

    def __init__(self, network: nn.Module):
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._new = partial(FrechetInceptionDistance, feature=network)
        self._truth = self._new()
        self._ways: dict[object, FrechetInceptionDistance] = {}

    def add_truth(self, rgb: Tensor) -> None:
        """[3, H, W] uint8."""
        self._truth.to(rgb.device).update(rgb[None], real=True)

    def add(self, way: object, rgb: Tensor) -> None:
        if way not in self._ways:
            self._ways[way] = self._new().to(rgb.device)
        self._ways[way].update(rgb[None], real=False)

    def value(self, way: object) -> float | None:
        """None of fewer than two pictures."""
        metric = self._ways[way]
        for name in ("real_features_sum", "real_features_cov_sum", "real_features_num_samples"):
            setattr(metric, name, getattr(self._truth, name))
        if metric.fake_features_num_samples < 2:
            return None
        found = metric.compute().item()
        return found if math.isfinite(found) else None


def find_inception() -> tuple[nn.Module, dict]:
    """The network of FID as torch-fidelity has it, and what it was made of.

    Raises:
        _Missing: a package or the file is not at hand.
    """
    absent = [name for name in ("torchmetrics", "torch_fidelity") if find_spec(name) is None]
    path = _downloaded(INCEPTION)
    reasons = [f"{name.replace('_', '-')} is not installed" for name in absent]
    if path is None:
        reasons.append(f"no weights of Inception ({INCEPTION}) in {_hub()}")
    if reasons:
        raise _Missing("; ".join(reasons))
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        network.num_features = 2048  # else each metric asks it, with a picture on the CPU wherever the network is
    except (ImportError, OSError, RuntimeError, KeyError) as error:  # torch-fidelity imports torchvision
        raise _Missing(f"torch-fidelity cannot be used ({str(error).splitlines()[0]})") from error
    return network, {"network": "Inception v3 of FID, by torch-fidelity", "file": path.name}


# --- both -------------------------------------------------------------------------------------------------------------


@dataclass
class Perceptual:
    """What is at hand of the two, what it is, and why the rest is missing."""

    lpips: Lpips | None = None
    inception: nn.Module | None = None
    about: dict[str, dict] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def find_perceptual(alexnet: Path | None = None, device: torch.device | str = "cpu", fid: bool = True) -> Perceptual:
    """Looks for the weights of LPIPS and of FID on this machine.

    Raises:
        WeightsError: `alexnet` is given, and LPIPS cannot be made of it.
    """
    found = Perceptual()
    try:
        found.lpips, found.about["lpips"] = find_lpips(alexnet)
        found.lpips.to(device)
    except (_Missing, WeightsError) as error:
        if alexnet is not None:
            raise WeightsError(
                f"--lpips {error if isinstance(error, WeightsError) else f'{alexnet}: {error}'}"
            ) from error
        found.missing["lpips"] = f"not computed: {error}"
    if not fid:
        found.missing["fid"] = "not computed: not wanted"
        return found
    try:
        found.inception, found.about["fid"] = find_inception()
        found.inception.to(device)
    except _Missing as error:
        found.missing["fid"] = f"not computed: {error}"
    return found
