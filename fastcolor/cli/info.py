"""`fastcolor info`."""

from __future__ import annotations


def info() -> None:
    """Show versions, devices, threads, and which backend would run each operation."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from rich.console import Console
    from rich.table import Table

    import fastcolor
    from fastcolor.model.colorizer import BUNDLED
    from fastcolor.ops import _backend

    console = Console()

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("fastcolor", fastcolor.__version__)
    facts.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("torch", "triton", "numpy", "safetensors", "pyvips", "av", "tensorboard"):
        facts.add_row(name, installed(name))
    native = _backend.native("_cpu")
    facts.add_row("SIMD", native if isinstance(native, str) else native.simd_level())
    facts.add_row("threads", str(torch.get_num_threads()))
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        facts.add_row(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
        devices.append(torch.device("cuda", i))
    if len(devices) == 1:
        facts.add_row("cuda", "no device")
    if torch.backends.mps.is_available():
        facts.add_row("mps", "available")
    facts.add_row("weights", str(BUNDLED) if BUNDLED.exists() else "none bundled; use --weights")
    console.print(facts)

    table = Table("operation", "device", "backend", "why")
    for op in sorted(_backend.OFFERS):
        for device in devices:
            try:
                choice = _backend.choose(op, device)
                table.add_row(op, str(device), choice.name, choice.why)
            except _backend.BackendError as error:
                table.add_row(op, str(device), "none", str(error))
    console.print(table)
    absent = Table("backend", "not available because")
    for name in _backend.BACKENDS:
        if why := _backend.missing(name):
            absent.add_row(name, why)
    if absent.row_count:
        console.print(absent)
