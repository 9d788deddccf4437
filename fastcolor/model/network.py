"""The colour network: ResNet-18-Gray features, fusion of mid and global level, a head over ab labels or ab."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from fastcolor.bins import ColorBins
from fastcolor.model.resnet import ResNet18Gray, normalize_lightness, pad_to_multiple

HEADS = ("distribution", "regression")
AB_SCALE = 110.0  # the regression head predicts ab / 110


@dataclass(frozen=True)
class NetworkConfig:
    """What a checkpoint needs to build its network again.

    head: "distribution" (logits over `bins`, at H/4) or "regression" (ab itself, at H/2).
    bins: label space of the distribution head.
    fusion: whether the global features reach the colour network.
    classes: names of the scene classes of the joint classifier; empty leaves it out.
    skip: whether the features of layer1, at H/4, reach the colour network where it is back at that resolution.
    """

    head: str = "distribution"
    bins: ColorBins = field(default_factory=ColorBins)
    fusion: bool = True
    classes: tuple[str, ...] = ()
    skip: bool = False

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}; got {self.head!r}")

    def to_dict(self) -> dict:
        return {**asdict(self), "bins": self.bins.to_dict()}

    @classmethod
    def from_dict(cls, state: dict) -> NetworkConfig:
        bins = ColorBins.from_dict(state["bins"])
        # older checkpoints say nothing of a skip connection: they have none
        return cls(state["head"], bins, state["fusion"], tuple(state["classes"]), state.get("skip", False))


class ColorNetwork(nn.Module):
    """Lightness to colour: L [B, 1, H, W] in [0, 100] -> logits [B, K, ⌈H/4⌉, ⌈W/4⌉] or ab [B, 2, ⌈H/2⌉, ⌈W/2⌉].

    The fusion is that of Iizuka et al. 2016, section 3.4, with batch normalization: relu(bn(W_m m + W_g g)), where the
    global vector g is the same at every position; W_m and W_g are one 1×1 convolution of [m, g], split in two.
    Any H and W: sides are padded to multiples of 8 by reflection, and the output is cut back.
    """

    def __init__(self, config: NetworkConfig | None = None):
        super().__init__()
        self.config = config = config or NetworkConfig()
        self.backbone = ResNet18Gray(len(config.classes))
        self.fuse_mid = nn.Conv2d(128, 128, 1, bias=False)
        self.fuse_global = nn.Linear(512, 128, bias=False) if config.fusion else None
        self.fuse_norm = nn.BatchNorm2d(128)
        self.color1 = _conv_bn_relu(128, 128)
        self.color2 = _conv_bn_relu(128, 64)
        self.color3 = _conv_bn_relu(64, 64)
        self.skip = nn.Conv2d(64, 64, 1, bias=False) if config.skip else None
        if config.head == "distribution":
            self.head = nn.Conv2d(64, config.bins.count, 1)
        else:
            self.head = nn.Sequential(_conv_bn_relu(64, 32), nn.Conv2d(32, 2, 3, padding=1))
        last = self.head if config.head == "distribution" else self.head[-1]
        nn.init.normal_(last.weight, std=0.01)  # starts near a uniform distribution, or near grey
        nn.init.zeros_(last.bias)
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)  # starts as the network without it, so that its weights can be taken over

    @property
    def stride(self) -> int:
        """Input pixels to one output pixel, along each side."""
        return 4 if self.config.head == "distribution" else 2

    def forward(self, L: Tensor) -> Tensor:
        return self.forward_with_classes(L)[0]

    def forward_with_classes(self, L: Tensor) -> tuple[Tensor, Tensor | None]:
        """The colour output, and the class scores [B, classes] where the network has a classifier."""
        x, scores = self._features(L)
        x = self.head(x)
        if self.config.head == "regression":
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False) * AB_SCALE
        return self._cut(x, L), scores

    def features(self, L: Tensor) -> Tensor:
        """What the last layer of the distribution head sees, [B, 64, ⌈H/4⌉, ⌈W/4⌉]: for `head_cross_entropy`."""
        return self.features_with_classes(L)[0]

    def features_with_classes(self, L: Tensor) -> tuple[Tensor, Tensor | None]:
        """`features`, and the class scores [B, classes] where the network has a classifier."""
        if self.config.head != "distribution":
            raise ValueError(f"features are those of the distribution head, this network has {self.config.head!r}")
        x, scores = self._features(L)
        return self._cut(x, L), scores

    def unused(self) -> list[nn.Parameter]:
        """Parameters that nothing is computed from: those of layer3 and layer4 without fusion and classifier."""
        if self.fuse_global is not None or self.backbone.fc is not None:
            return []
        return [*self.backbone.layer3.parameters(), *self.backbone.layer4.parameters()]

    def _cut(self, x: Tensor, L: Tensor) -> Tensor:
        return x[..., : -(-L.shape[-2] // self.stride), : -(-L.shape[-1] // self.stride)]

    def _features(self, L: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 64, H/4, W/4] of the padded picture, and the class scores."""
        if L.ndim != 4 or L.shape[1] != 1:
            raise ValueError(f"L must have shape [B, 1, H, W], got {list(L.shape)}")
        low = self.backbone.low_level(pad_to_multiple(normalize_lightness(L), 8))  # [B, 64, H/4, W/4]
        mid = self.backbone.layer2(low)  # [B, 128, H/8, W/8]
        x, scores = self.fuse_mid(mid), None
        if self.fuse_global is not None or self.backbone.fc is not None:
            features = self.backbone.global_level(mid)  # [B, 512]
            if self.fuse_global is not None:
                x = x + self.fuse_global(features)[:, :, None, None]
            if self.backbone.fc is not None:
                scores = self.backbone.fc(features)
        x = self.color1(F.relu(self.fuse_norm(x)))
        x = self.color2(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.color3(x if self.skip is None else x + self.skip(low)), scores


def _conv_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pool_to(x: Tensor, stride: int) -> Tensor:
    """Means over stride×stride blocks, [B, C, H, W] -> [B, C, ⌈H/stride⌉, ⌈W/stride⌉]; blocks at the edge are smaller.

    The grid of the network's output: what targets and the guide of the mean field are brought to.
    """
    return F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False) if min(x.shape[-2:]) > 0 else x
