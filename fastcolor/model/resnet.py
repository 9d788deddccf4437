"""ResNet-18 for one input channel (He et al. 2015, arXiv 1512.03385, table 1), parameter names as in torchvision."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from fastcolor.model.convolution import convolve


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: [B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(convolve(self.conv1, x)))
        return F.relu(self.bn2(convolve(self.conv2, x)) + shortcut)


class ResNet18Gray(nn.Module):
    """ResNet-18 on lightness. `mid_level` gives 128 features at H/8 (the 6th set of layers), `global_level` 512.

    Args:
        classes: outputs of the scene classifier `fc`; 0 leaves it out.
    """

    def __init__(self, classes: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512))
        self.fc = nn.Linear(512, classes) if classes else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def mid_level(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] -> [B, 128, H/8, W/8]: `low_level`, layer2."""
        return self.layer2(self.low_level(x))

    def low_level(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] -> [B, 64, H/4, W/4]: conv1, bn1, relu, maxpool, layer1."""
        return self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(x)))))

    def global_level(self, mid: Tensor) -> Tensor:
        """[B, 128, H/8, W/8] -> [B, 512]: layer3, layer4, average pooling."""
        return self.layer4(self.layer3(mid)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, classes], or the global features [B, 512] where there is no classifier."""
        features = self.global_level(self.mid_level(x))
        return features if self.fc is None else self.fc(features)

    def load_torchvision(self, state: Mapping[str, Tensor]) -> list[str]:
        """Loads a resnet18 state dict with torchvision's names and shapes, of grey or of RGB input.

        A 3-channel conv1 is summed over its channels: what it would answer to a grey picture given three times. The
        classifier is left out where its size is another (or where this network has none).

        Returns:
            the names that were left out.

        Raises:
            ValueError: a name is missing, unknown, or of another shape.
        """
        state = {name.removeprefix("module."): value for name, value in state.items()}
        if "conv1.weight" in state and state["conv1.weight"].shape[1:2] == (3,):
            state["conv1.weight"] = state["conv1.weight"].sum(1, keepdim=True)
        own = self.state_dict()
        skipped = [n for n in state if n.startswith("fc.") and (n not in own or own[n].shape != state[n].shape)]
        unknown = [n for n in state if n not in own and n not in skipped]
        # old files of torchvision have no num_batches_tracked
        missing = [n for n in own if n not in state and not n.startswith("fc.") and not n.endswith("batches_tracked")]
        if unknown or missing:
            raise ValueError(f"not a resnet18 state dict: missing {missing[:3]}, unknown {unknown[:3]}")
        for name, value in state.items():
            if name not in skipped and value.shape != own[name].shape:
                raise ValueError(f"{name} must have shape {list(own[name].shape)}, got {list(value.shape)}")
        self.load_state_dict({n: v for n, v in state.items() if n not in skipped}, strict=False)
        return skipped


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pads [B, C, H, W] below and to the right by reflection, so that both sides divide by `multiple`.

    Where a side is too short to be reflected (the pad has to be smaller than the side), its edge is repeated.
    """
    height, width = x.shape[-2:]
    down, right = -height % multiple, -width % multiple
    if down:
        x = F.pad(x, (0, 0, 0, down), mode="reflect" if down < height else "replicate")
    if right:
        x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    return x


def normalize_lightness(L: Tensor) -> Tensor:
    """L in [0, 100] to what the network reads: the grey mean and deviation of the ImageNet constants."""
    return (L / 100 - 0.449) / 0.226
