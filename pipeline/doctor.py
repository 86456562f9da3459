"""What this machine can run, and what to do about what it cannot."""

import importlib.metadata
import os
import platform
import shutil

from pipeline.store import Store
from stages.errors import BadInput

_PACKAGES = ("torch", "ray", "deepspeed", "transformers", "datasets", "mlflow", "pyarrow")


def examine(store: Store, tracking_uri: str, address: str | None) -> tuple[list[str], bool]:
    """A line per finding, with a remedy where something is missing; and whether all is well."""
    lines, healthy = [], True

    def line(good: bool | None, subject: str, text: str) -> None:
        nonlocal healthy
        healthy &= good is not False
        lines.append(f"{ {True: '✓', False: '✗', None: ' '}[good] } {subject:<13} {text}")

    version = platform.python_version_tuple()
    supported = version[:2] in (("3", "11"), ("3", "12"))
    line(supported, "python", platform.python_version() + (
        "" if supported else ": not supported; make a virtual environment with 3.11 or 3.12"))
    for package in _PACKAGES:
        try:
            line(True, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            line(False, package, "not installed; run `pip install -e . -c constraints.txt`")

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    line(memory >= 16 or None, "machine", f"{os.cpu_count()} CPUs, {memory:.0f} GiB memory" + (
        "" if memory >= 16 else "; the quickstart takes up to 16 GiB"))
    _accelerators(line)
    _places(line, store, tracking_uri)
    _ray(line, address)
    line(None, "this machine", "runs sweeps/smoke.yaml in about 4 minutes and "
         "sweeps/quickstart.yaml in about 12 on 2 CPUs")
    return lines, healthy


def _accelerators(line) -> None:
    import torch

    if not torch.cuda.is_available():
        line(None, "accelerators", "none; set resources.*.gpus to 0 (the quickstart does)")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        line(True, "accelerator", f"{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB")


def _places(line, store: Store, tracking_uri: str) -> None:
    try:
        store.check_writable()
        free = f", {shutil.disk_usage(store.root).free / 1e9:.0f} GB free" if store.local else ""
        line(True, "store", f"{store.uri}{free}")
    except BadInput as error:
        line(False, "store", str(error))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        count = len(MlflowClient(tracking_uri).search_experiments())
        line(True, "mlflow store", f"{tracking_uri}, {count} experiment(s)")
    except MlflowException as error:
        line(False, "mlflow store", f"{tracking_uri}: {str(error).splitlines()[0]}; "
             "start the server, or name another with --tracking-uri")


def _ray(line, address: str | None) -> None:
    if address is None:
        line(True, "ray", f"would start a local cluster with {os.cpu_count()} CPUs")
        return
    import ray

    from pipeline.execute import connect

    try:
        connect(address)
    except BadInput as error:
        line(False, "ray", str(error))
        return
    total = ray.cluster_resources()
    line(True, "ray", f"{address}: {len(ray.nodes())} machine(s), {total.get('CPU', 0):g} CPU, "
         f"{total.get('GPU', 0):g} GPU")
