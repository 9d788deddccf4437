"""Frames of a film in, their chroma out, with a state through time.

Two things keep the colours calm. The network looks at keyframes alone; what it said of one, the scores of all labels,
goes along with the picture's motion until the next. And scores of a new keyframe take over little by little. On top,
the colours of the frame before can be one more neighbour of every pixel in the field.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.model.colorizer import Colorizer
from fastcolor.model.network import pool_to
from fastcolor.ops.render import luma_to_lightness, render, render_uv
from fastcolor.video import cuts, motion
from fastcolor.video.control import Control, hints_unary
from fastcolor.video.gpu import Ferry, Graphed
from fastcolor.video.state import Evidence, Track, evidence_of, from_dict, gather, still, to_dict, trusted
from fastcolor.yuv import YuvFormat

# Chosen by benchmarks/flicker.py: docs/video.md has the figures.
LONGEST, SHORTEST = 12, 3  # frames from keyframe to keyframe, where they are chosen
CHANGED = 0.06  # share of the picture that the last keyframe does not explain, at which the next one comes
LOST = 15.0  # L units: a hint that follows is not for things of another lightness than it began with
SIGMA_TIME = 5.0  # L units: of the frame before in the field
SETTLE = 3  # passes of the field at the start of a scene, whose first frame has none before it


@dataclass(frozen=True)
class VideoOptions:
    """How a film is coloured.

    temporal: how much of what was believed of the frame before is kept, 0 (nothing: every keyframe by itself) to 1.
    bond: weight of the colours of the frame before in the field, in units of the field's own weight (which is 0.1 where
        nothing else was learned) for one neighbour, >= 0. It sharpens colours as much as it calms them.
    keyframes: the network runs at every n-th frame of a scene; "auto" where the picture changed enough.
    motion: whether what comes from the frame before is moved along with the picture.
    cuts: numbers of the frames that start a scene, from 0; None finds them.
    lookahead: frames that are worked on together, and so held back; the network sees their keyframes in one batch.
    low_latency: every frame comes out as soon as it went in.
    """

    temporal: float = 0.9
    bond: float = 0.0
    keyframes: str | int = "auto"
    motion: bool = True
    cuts: tuple[int, ...] | None = None
    lookahead: int = 16
    low_latency: bool = False

    def __post_init__(self):
        if not 0 <= self.temporal <= 1:
            raise ValueError(f"temporal must be between 0 and 1, got {self.temporal}")
        if not 0 <= self.bond <= 1000:
            raise ValueError(f"bond must be between 0 and 1000, got {self.bond}")
        whole = isinstance(self.keyframes, int) and not isinstance(self.keyframes, bool)
        if self.keyframes != "auto" and not (whole and self.keyframes >= 1):
            raise ValueError(f"keyframes must be 'auto' or a number >= 1, got {self.keyframes!r}")
        if not 1 <= self.lookahead <= 1024:
            raise ValueError(f"lookahead must be between 1 and 1024 frames, got {self.lookahead}")
        if self.cuts is not None and any(not isinstance(n, int) or n < 0 for n in self.cuts):
            raise ValueError(f"cuts must be numbers of frames, from 0, got {self.cuts!r}")


@dataclass
class VideoStats:
    """Counts, and seconds by stage: of the host alone, where the device is a GPU."""

    frames: int = 0
    network: int = 0  # frames that the network saw
    cuts: int = 0
    keyframes: list[int] = field(default_factory=list)  # the numbers of the frames that the network saw
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("motion", "network", "field", "render"), 0.0)
    )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


@dataclass
class _Frame:
    """A frame on its way; all on the device."""

    picture: object  # what came: for the renderer
    L: Tensor  # [1, 1, n, m] at network size
    guide: Tensor  # [1, 1, h, w]
    number: int = 0
    cut: bool = False
    key: bool = False
    flow: Tensor | None = None  # [1, 2, h, w] to the frame before
    places: Tensor | None = None  # [1, 2, h, w] in the last keyframe before this frame
    trust: Tensor | None = None  # [1, 1, h, w] in what is there
    scores: Tensor | None = None  # [1, C, h, w] of a keyframe
    ab: Tensor | None = None  # [1, 2, h, w]


class VideoColorizer:
    """Colours a film frame by frame.

    Args:
        colorizer: the network and its options.
        format: of the frames' planes, 8 bits 4:2:0 of BT.709 if left out; `colorize` needs none.
        options: see `VideoOptions`.
        control: hints, palette and reference of the film: `fastcolor.video.control.load_control`.
        first: number of the first frame, which cuts and hints count by.
    """

    def __init__(
        self,
        colorizer: Colorizer,
        format: YuvFormat | None = None,
        options: VideoOptions | None = None,
        control: Control | None = None,
        first: int = 0,
    ):
        self.colorizer, self.format, self.options = colorizer, format or YuvFormat(), options or VideoOptions()
        self.control = control
        self.stats = VideoStats()
        self._first = first
        self._cuts = frozenset(self.options.cuts or ())
        self._ferry = Ferry(colorizer.device)
        self._carried = Graphed(self._carry)
        self._mixes = torch.zeros(0, 2)
        self._unary = None
        if control is not None:
            unary = control.unary(colorizer.bins, colorizer.checkpoint.prior, colorizer.options.vividness)
            self._unary = None if unary is None else unary.to(colorizer.device)
        self.reset()

    def reset(self) -> None:
        """Forgets all frames: what comes next is the start of a film."""
        self._track, self._evidence = Track(number=self._first), Evidence()
        self._waiting: list[_Frame] = []
        self._leaving: list[tuple] = []  # results, and the events after which they are on the host
        self._shape: tuple[int, int] | None = None

    # --- planes -------------------------------------------------------------------------------------------------------

    def push(self, luma: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The next frame's luma plane, [H, W] of the format's type; rows may lie apart, as decoders leave them.

        Returns:
            (U, V) of the frames that are ready, in order, on the device that their luma came from.

        Raises:
            TypeError, ValueError: a plane of another type, or another size than the frame before.
        """
        if not isinstance(luma, Tensor) or luma.dtype != self.format.dtype:
            came = getattr(luma, "dtype", type(luma).__name__)
            raise TypeError(f"luma must be {self.format.dtype} for {self.format.bits} bits, got {came}")
        if luma.ndim != 2 or luma.numel() == 0:
            raise ValueError(f"luma must have shape [H, W], got {list(luma.shape)}")
        return self._add(luma, self._lightness_of_luma, self._planes)

    def flush(self) -> list[tuple[Tensor, Tensor]]:
        """(U, V) of the frames held back. The state is then that after the last frame, and more may be pushed."""
        return self._work(self._planes) + self._arrived()

    @torch.inference_mode()
    def _lightness_of_luma(self, luma: Tensor) -> tuple[Tensor, Tensor]:
        planes = self._ferry.to_device(luma)[None, None]
        return (planes, luma.device), luma_to_lightness(planes, self.format.bits, self.format.full_range)

    def _planes(self, frame: _Frame) -> tuple[tuple[Tensor, Tensor], torch.cuda.Event | None]:
        (luma, device), ab = frame.picture, frame.ab * self.colorizer.options.saturation
        u, v = (plane[0, 0] for plane in render_uv(ab, frame.guide, luma, self.format, scale=self._scale(frame)))
        return self._ferry.to_host((u, v)) if device.type == "cpu" else ((u.to(device), v.to(device)), None)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def colorize(self, frames: Iterable[np.ndarray | Tensor]) -> Iterator[np.ndarray | Tensor]:
        """Colours frames one after the other, for pipes of one's own; goes on from the frames before.

        Args:
            frames: arrays [H, W], [H, W, 1] or [H, W, 3], or tensors [H, W], [1 or 3, H, W], of one size; uint8,
                uint16, or floating in [0, 1].

        Yields:
            RGB of the same kind and type, [H, W, 3] or [3, H, W], in order; with `low_latency` each before the next
            frame is asked for.
        """
        for frame in frames:
            yield from self._add(frame, self._lightness_of_picture, self._rgb)
        yield from self._work(self._rgb) + self._arrived()

    @torch.inference_mode()
    def _lightness_of_picture(self, picture: np.ndarray | Tensor) -> tuple[tuple, Tensor]:
        if isinstance(picture, np.ndarray):
            if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (1, 3)):
                raise ValueError(f"frame must have shape [H, W], [H, W, 1] or [H, W, 3], got {list(picture.shape)}")
            pixels = torch.from_numpy(np.ascontiguousarray(picture, picture.dtype.newbyteorder("=")))
            pixels = pixels[None] if picture.ndim == 2 else pixels.permute(2, 0, 1)
        elif isinstance(picture, Tensor):
            pixels = picture[None] if picture.ndim == 2 else picture
            if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
                raise ValueError(f"frame must have shape [H, W] or [1 or 3, H, W], got {list(picture.shape)}")
        else:
            raise TypeError(f"frame must be a numpy array or a tensor, got {type(picture).__name__}")
        L = self.colorizer._lightness(pixels, "frame")[None]
        return (L, pixels.dtype, picture.device if isinstance(picture, Tensor) else None), L

    def _rgb(self, frame: _Frame) -> tuple[np.ndarray | Tensor, None]:
        L, dtype, device = frame.picture
        ab = frame.ab * self.colorizer.options.saturation
        rgb = render(ab, frame.guide, L, scale=self._scale(frame), dtype=dtype, channels_last=device is None)[0]
        return (rgb.cpu().numpy() if device is None else rgb.to(device)), None

    # --- the state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that the frames to come depend on, for torch.save. Frames that are held back are not part of it.

        Raises:
            RuntimeError: there are such frames: `flush` first.
        """
        if held := len(self._waiting) + len(self._leaving):
            raise RuntimeError(f"{held} frames are held back: flush() before state_dict()")
        return {"track": to_dict(self._track), "evidence": to_dict(self._evidence), "size": self._shape}

    def load_state_dict(self, state: dict) -> None:
        """Goes on, to the bit, where the colorizer was that gave `state`: same network, options and control."""
        if not isinstance(state, dict) or set(state) != {"track", "evidence", "size"}:
            raise ValueError("state must be of VideoColorizer.state_dict()")
        self.reset()
        self._track = from_dict(Track, state["track"], self.colorizer.device)
        self._evidence = from_dict(Evidence, state["evidence"], self.colorizer.device)
        self._shape = None if state["size"] is None else tuple(state["size"])

    # --- the work -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _add(self, picture, lightness, finish) -> list:
        with self.stats.stage("motion"):
            kept, L = lightness(picture)
            shape = tuple(L.shape[-2:])
            if self._shape not in (None, shape):
                raise ValueError(
                    f"frames of a film must have one size: {self._shape[1]}×{self._shape[0]} came before, "
                    f"now {shape[1]}×{shape[0]}; reset() starts another film"
                )
            self._shape = shape
            # antialiased bilinear is an area mean when shrinking, and plain bilinear when enlarging
            small = F.interpolate(L, self.colorizer.network_size(*shape), mode="bilinear", antialias=True)
            self._waiting.append(_Frame(kept, small, pool_to(small, self.colorizer.network.stride)))
        full = 1 if self.options.low_latency else self.options.lookahead
        return self._work(finish) if len(self._waiting) >= full else []

    @torch.inference_mode()
    def _work(self, finish) -> list:
        frames, self._waiting = self._waiting, []
        if not frames:
            return []
        with self.stats.stage("motion"):
            self._follow(frames)
        keys = [frame for frame in frames if frame.key]
        with self.stats.stage("network"):
            if keys:
                scores, _ = self.colorizer.scores(torch.cat([frame.L for frame in keys]), self._unary)
                for frame, of_frame in zip(keys, scores.split(1), strict=True):
                    frame.scores = of_frame
        leaving = []
        for frame in frames:
            with self.stats.stage("field"):
                frame.ab = self._colors(frame)
            with self.stats.stage("render"):
                leaving.append(finish(frame))
        self.stats.frames += len(frames)
        self.stats.network += len(keys)
        self.stats.keyframes += [frame.number for frame in keys]
        self.stats.cuts += sum(frame.cut for frame in frames)
        ready = self._arrived()  # the batch before: this one travels while the next is worked on
        self._leaving = leaving
        if self.options.low_latency or all(event is None for _, event in leaving):
            ready += self._arrived()
        return ready

    def _arrived(self) -> list:
        """Waits for the results under way."""
        leaving, self._leaving = self._leaving, []
        for _, event in leaving:
            if event is not None:
                event.synchronize()
        return [result for result, _ in leaving]

    def _follow(self, frames: list[_Frame]) -> None:
        """What lightness alone says of frames: cuts, keyframes, motion."""
        track = self._track
        L = torch.cat([frame.L for frame in frames])
        levels = motion.pyramid(pool_to(L, self.colorizer.network.stride // motion.CELL))
        pyramids = [[level[i, None] for level in levels] for i in range(len(frames))]
        before = [track.pyramid or pyramids[0], *pyramids[:-1]]
        if self.options.motion:
            flows = motion.flow(levels, [torch.cat(level) for level in zip(*before, strict=True)])
        else:
            flows = torch.zeros_like(still(frames[0].guide)).expand(len(frames), -1, -1, -1)
        guides = torch.cat([frame.guide for frame in frames])
        features = [None] * len(frames)
        if self.options.cuts is None:
            guides_before = torch.cat((guides[:1] if track.guide is None else track.guide, guides[:-1]))
            features = cuts.features(guides, motion.warp(guides_before, flows)).tolist()
        for i, (frame, pyramid) in enumerate(zip(frames, pyramids, strict=True)):
            frame.number, frame.flow = track.number, flows[i, None]
            frame.cut = self._is_cut(frame, features[i])
            if frame.cut or track.guide is None:
                frame.key = True
            else:
                frame.places = motion.read_at(track.places, still(frame.guide) + frame.flow)
                frame.trust = trusted(frame.guide, track.key_guide, frame.places)
                frame.key = self._is_key(frame)
            if frame.key:
                track.key_guide, track.places = frame.guide, still(frame.guide)
                track.age = track.waiting = 0
            else:
                track.places = frame.places
            track.age += 1
            track.number += 1
            track.pyramid, track.guide = pyramid, frame.guide

    def _is_cut(self, frame: _Frame, features: list[float] | None) -> bool:
        track = self._track
        if features is None:
            return track.guide is not None and frame.number in self._cuts
        after_blank = track.blank
        if after_blank and track.seen is not None:
            features = cuts.features(frame.guide, track.seen)[0].tolist()
        cut = track.seen is not None and cuts.is_cut(*features, after_blank=after_blank)
        track.blank = cuts.is_blank(features[3])
        if not track.blank:
            track.seen = frame.guide
        if track.blank or after_blank:
            frame.flow = torch.zeros_like(frame.flow)  # nothing moves to or from a blank frame
        return cut

    def _is_key(self, frame: _Frame) -> bool:
        track = self._track
        if self.options.keyframes != "auto":
            return track.age >= self.options.keyframes
        if track.age < SHORTEST or track.blank:
            return False
        if track.age >= LONGEST:
            return True
        # twice in a row: a flash is not worth a keyframe
        track.waiting = track.waiting + 1 if 1 - frame.trust.mean().item() > CHANGED else 0
        return track.waiting > 1

    def _colors(self, frame: _Frame) -> Tensor:
        """ab [1, 2, h, w]: the scores of the last keyframe where they are now, through the field."""
        if frame.cut:
            self._evidence = Evidence()
        evidence, bond = self._evidence, self.options.bond
        if frame.key:
            self._take_over(frame)
        trust = None if frame.key else frame.trust
        places = still(frame.guide) if frame.key else frame.places
        unary, same = self._hints(frame)
        evidence.age += 1
        arguments = evidence.scores, self._shares(evidence.age), places, frame.guide
        if trust is not None and unary is None and bond == 0:
            return self._carried(*arguments, trust)
        scores = self._scores_at(*arguments, trust)
        if unary is not None:  # not carried on: hints are for their frames alone
            scores = scores + unary
        before = None
        if evidence.shown is not None and same and bond > 0:
            before = tuple(motion.warp(x, frame.flow) for x in (evidence.shown, evidence.guide))
        ab = self._field(scores, frame.guide, before)
        if bond > 0:
            # the first frame of a scene has itself as its neighbour: what stands still then stays as it is
            for _ in range(SETTLE if before is None else 0):
                ab = self._field(scores, frame.guide, (ab, frame.guide))
            evidence.shown, evidence.guide = ab, frame.guide
        return ab

    def _take_over(self, frame: _Frame) -> None:
        """A keyframe's scores become those to be carried, beside what was carried until now."""
        evidence = self._evidence
        new = frame.scores.movedim(1, -1).flatten(0, 2)  # [h·w, C]
        old = new
        if evidence.scores is not None and self.options.temporal > 0:
            old = gather(evidence.scores, self._shares(evidence.age), frame.places)
            old = torch.lerp(new, old, frame.trust.flatten()[:, None])  # what is new in the picture has no past
        evidence.scores, evidence.age = evidence_of(old, new, frame.guide), 0

    def _shares(self, frames: int) -> Tensor:
        """Of the scores from before a keyframe and of its own, after so many frames with it: as if each had kept
        `temporal` of what was there. [2]"""
        if frames >= len(self._mixes):
            old = torch.tensor(self.options.temporal, dtype=torch.float64) ** torch.arange(2 * frames + 64)
            self._mixes = torch.stack((old, 1 - old), 1).float().to(self.colorizer.device)
        return self._mixes[frames]

    def _scores_at(self, scores: Tensor, shares: Tensor, places: Tensor, guide: Tensor, trust: Tensor | None) -> Tensor:
        """[1, C, h, w], labels side by side in memory."""
        rows = gather(scores, shares, places, guide, trust)
        return rows.unflatten(0, (1, *guide.shape[-2:])).movedim(-1, 1)

    def _carry(self, scores: Tensor, shares: Tensor, places: Tensor, guide: Tensor, trust: Tensor) -> Tensor:
        """The whole of an ordinary frame, a function of tensors alone."""
        return self.colorizer.colors(self._scores_at(scores, shares, places, guide, trust), guide)

    def _field(self, scores: Tensor, guide: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
        """ab, with the colours and the guide of the frame before where there are any."""
        if before is None:
            return self.colorizer.colors(scores, guide)
        weight = self.options.bond * self.colorizer.field["weight"]
        return self.colorizer.colors(scores, guide, previous=before, weight_time=weight, sigma_time=SIGMA_TIME)

    def _hints(self, frame: _Frame) -> tuple[Tensor | None, bool]:
        """The unary of the frame's hints [1, K, h, w], None without any; whether they are those of the frame before."""
        evidence, control = self._evidence, self.control
        numbers = [] if control is None else control.hints_at(frame.number)
        before = dict(zip(evidence.hints, evidence.origins, strict=True))
        same, evidence.hints, evidence.origins = numbers == evidence.hints, numbers, []
        if not numbers:
            return None, same
        hints, masks = [control.hints[i] for i in numbers], []
        for i, hint in zip(numbers, hints, strict=True):
            mask = hint.mask(*frame.guide.shape[-2:]).to(frame.guide.device)
            origin = torch.cat((still(frame.guide), frame.guide), 1)
            if hint.follow and i in before:
                places, first = before[i].split((2, 1), 1)
                places = motion.read_at(places, still(frame.guide) + frame.flow)
                seen, light = motion.read_at(torch.cat((mask[None, None].to(first), first), 1), places)[0].unbind(0)
                mask = (seen > 0.5) & ((frame.guide[0, 0] - light).abs() < LOST)
                origin = torch.cat((places, first), 1)
            masks.append(mask)
            evidence.origins.append(origin)
        return hints_unary(hints, masks, self.colorizer.bins), same

    def _scale(self, frame: _Frame) -> tuple[float, float]:
        """Pixels of the guide to one of the frame."""
        stride = self.colorizer.network.stride
        return tuple(n / full / stride for n, full in zip(frame.L.shape[-2:], self._shape, strict=True))
