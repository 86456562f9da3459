"""The MLflow UI on loopback."""

import os
import sys

from pipeline.tracking import PAGES, sqlite_file
from stages.errors import BadInput


def serve(uri: str, port: int) -> int:
    """Replace this process by an MLflow server for the store at ``uri``; Ctrl-C ends it.

    For the address of a server, only print it.
    """
    database = sqlite_file(uri)
    if database is None:
        print(f"MLflow already serves {uri}")
        return 0
    if not database.exists():
        raise BadInput(
            f"--tracking-uri {uri}: nothing was logged there yet; `moe-reliability run` does it"
        )
    print(f"MLflow on http://127.0.0.1:{port}/#/experiments?{PAGES} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", uri, "--workers", "1"]
    os.execv(sys.executable, command)
