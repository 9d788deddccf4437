"""What the Triton kernels cost on a GPU that need not be there: registers, spills and shared memory, by ptxas.

`python -m benchmarks.registers [--arch 80 90] [--sass FOLDER]`

Every kernel is compiled ahead of time as it is launched for 32×64×64 pixels in bfloat16: with 313 labels and 3, 32 or
64 columns, and with 25 + 25 labels. A launch is recorded, not run; tensors have no memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from fastcolor.kernels.field import Gradients, Problem
from fastcolor.kernels.triton import mean_field
from torch import Tensor

from fastcolor.reference.mean_field import offsets

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


class Launch(NamedTuple):
    kernel: triton.JITFunction
    programs: int
    arguments: tuple
    constants: dict


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled: int  # bytes, stores and loads
    shared: int  # bytes
    binary: object


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are listed and not made."""
    launches: list[Launch] = []
    real = mean_field._launch
    mean_field._launch = lambda kernel, programs, *arguments, **constants: launches.append(
        Launch(kernel, programs, arguments, constants)
    )
    try:
        yield launches
    finally:
        mean_field._launch = real


def compiled(launch: Launch, arch: int) -> Usage:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(launch.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature, aligned = {}, {}
    unspecialized = set(launch.kernel.do_not_specialize or ())
    for n, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if value is None:
            constants[name] = None
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned[(n,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in unspecialized:
                aligned[(n,)] = [["tt.divisibility", 16]]
    types = {name: signature.get(name, "constexpr") for name in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, types, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Usage(*assembled(binary.asm["ptx"]), binary.metadata.shared, binary)


def assembled(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas says."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", path, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return int(re.search(r"Used (\d+) registers", said).group(1)), spilled


def problem(
    labels: int, columns: int, counts: list[int] | None = None, labels_last: bool = False, dtype=torch.bfloat16,
    prior: bool = False, shape: tuple[int, int, int] = (32, 64, 64), **options,
) -> Problem:  # fmt: skip
    """A problem without memory."""
    batch, height, width = shape
    around = offsets("square", 2, 1, height, width)
    with torch.device("meta"):
        u = torch.empty(batch, height, width, labels, dtype=dtype).movedim(-1, 1)
        return Problem(
            logits=u if labels_last else u.contiguous(),
            labels_last=labels_last,
            guide=torch.empty(batch, 1, height, width),
            a=torch.empty(labels, columns),
            b=torch.empty(labels, columns),
            space=torch.empty(len(around)),
            sharpness=torch.empty(()),
            prior=torch.empty(batch, columns, height, width) if prior else None,
            dy=[dy for dy, _ in around],
            dx=[dx for _, dx in around],
            counts=counts or [labels],
            **{"sweeps": 2, "checkerboard": False, "damping": 0.0, "uniform": False, **options},
        )


def launches(p: Problem, outputs: tuple[str, ...] = ("marginals", "ab", "backward")) -> list[Launch]:
    """Those of the forward, once for each output, and of the backward with all gradients; equal ones once."""
    batch, labels, height, width = p.logits.shape
    updates = p.sweeps * (2 if p.checkerboard else 1)
    with torch.device("meta"), recorded() as found:
        states = torch.empty(batch * (updates + 1) * 2 * p.a.shape[1] * height * width)
        if "marginals" in outputs:
            mean_field.mean_field(p, torch.empty_like(p.logits), None, 1.0, None, None)
        if "ab" in outputs:
            colors, ab = torch.empty(labels, 2), torch.empty(batch, 2, height, width)
            mean_field.mean_field(p, None, colors, 0.38, ab, None)
        if "backward" in outputs:
            tensors = (p.a, p.b, p.guide, p.space, p.sharpness, p.prior)
            wide = torch.empty_like(p.logits, dtype=torch.float32)
            for factors in (False, True):
                to = [None if x is None else torch.empty_like(x) for x in tensors]
                to[:2] = to[:2] if factors else (None, None)
                mean_field.mean_field_backward(p, torch.empty_like(p.logits), states, Gradients(wide, *to))
    seen = {}
    for launch in found:
        shapes = tuple((x.dtype, x.shape) if isinstance(x, Tensor) else type(x) for x in launch.arguments)
        seen.setdefault((launch.kernel, shapes, tuple(launch.constants.items())), launch)
    return list(seen.values())


CASES = {
    "313, R = 3, planes": {"labels": 313, "columns": 3},
    "313, R = 3, labels last": {"labels": 313, "columns": 3, "labels_last": True},
    "313, R = 32, planes": {"labels": 313, "columns": 32},
    "313, R = 64, labels last": {"labels": 313, "columns": 64, "labels_last": True},
    "25 + 25, R = 4, planes": {"labels": 50, "columns": 4, "counts": [25, 25]},
    "25 + 25, R = 50, board": {"labels": 50, "columns": 50, "counts": [25, 25], "checkerboard": True, "uniform": True},
}


def table(arch: int, cases: dict = CASES, sass: Path | None = None) -> Iterator[tuple[str, Launch, Usage]]:
    """Prints a line for each kernel of each case, and yields (case, launch, usage)."""
    bin = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    print(f"{'kernel':<28}{'of':<26}{'arch':>6}{'registers':>11}{'spilled':>9}{'shared':>9}  launched with")
    for case, sizes in cases.items():
        for n, launch in enumerate(launches(problem(**sizes))):
            usage = compiled(launch, arch)
            flags = {k: v for k, v in launch.constants.items() if k not in ("LABELS_LAST", "K", "FIRST_AXIS", "R")}
            told = " ".join(f"{k}={v}" for k, v in flags.items())
            print(
                f"{launch.kernel.__name__:<28}{case:<26}{'sm_' + str(arch):>6}{usage.registers:>11}"
                f"{usage.spilled:>9}{usage.shared:>9}  {told}"
            )
            if sass:
                sass.mkdir(parents=True, exist_ok=True)
                path = sass / f"{re.sub('[^a-z0-9]+', '_', case)}_{n}_{launch.kernel.__name__}_sm_{arch}"
                path.with_suffix(".cubin").write_bytes(usage.binary.asm["cubin"])
                path.with_suffix(".ttgir").write_text(usage.binary.asm["ttgir"])
                text = subprocess.run([bin / "nvdisasm", path.with_suffix(".cubin")], capture_output=True, check=True)
                path.with_suffix(".sass").write_bytes(text.stdout)
            yield case, launch, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--sass", type=Path, help="folder for cubin, ttgir and disassembly")
    arguments = parser.parse_args()
    for arch in arguments.arch:
        for _ in table(arch, sass=arguments.sass):
            pass


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("nothing is compiled under TRITON_INTERPRET=1")
    main()
