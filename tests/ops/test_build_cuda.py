"""The CUDA sources compile for sm_80 and sm_90a wherever nvcc is, and keep their values in registers.

`pytest -rP` shows what each kernel takes of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
NVCC = shutil.which("nvcc")


def readable(name: str) -> str:
    """What a mangled name says, as far as that is at hand."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return name
    shown = subprocess.run([demangler, name], capture_output=True, text=True).stdout
    return re.sub(r"^void |fastcolor::cuda::|\(anonymous namespace\)::|\(.*\)$", "", shown.strip())


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("source", sorted(KERNELS.glob("cuda/*.cu")), ids=lambda path: path.name)
def test_compiles_without_spills(source, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", "-ftz=true", f"-I{KERNELS}", "-Xptxas", "-v", "-c", source]
    for arch in ("80", "90a"):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    built = subprocess.run([*command, "-o", tmp_path / "kernels.o"], capture_output=True, text=True)
    if "Unsupported gpu architecture" in built.stderr:
        pytest.skip(f"this nvcc is too old for sm_90a: {built.stderr.strip()}")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    entry = r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
    for name, arch, spilled, registers, more in re.findall(entry, built.stderr, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", more)
        static = shared[1] if shared else 0  # dynamic shared memory is asked for at the launch
        print(f"{arch:7} {registers:>3} registers {spilled:>3} spilled {static:>5} static shared  {readable(name)}")
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.stderr)
    assert kernels and all(set(k) == {"0"} for k in kernels), built.stderr


def test_functions_of_headers_are_inline():
    """Two sources that include one without it compile, and cannot be linked."""
    text = "".join(path.read_text() for path in sorted(KERNELS.rglob("*.h")))
    functions = re.findall(r"^(template.*\n)?(__(?:device|host)__ .*\()", text, re.MULTILINE)
    assert functions
    assert not [f for template, f in functions if not template and "inline" not in f]
