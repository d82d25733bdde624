"""Packages that not everybody needs, and how to install them. Nothing is imported here."""

from __future__ import annotations

from importlib.util import find_spec

from npgpt.config.fields import RequestError

# Packages, and the extras of setup.py that bring them.
EXTRAS = {"starlette": "serve", "uvicorn": "serve", "prometheus_client": "serve"}
EXTRAS |= {"matplotlib": "plot", "tensorboardX": "tensorboard"}
SERVE = ("starlette", "uvicorn", "prometheus_client")


def check_installed(*packages: str) -> None:
    """Raise RequestError, saying how to install them, if packages are missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS[name] for name in missing}))
        raise RequestError(
            f"this needs {', '.join(missing)}; install with: pip install 'npgpt[{extras}]' "
            f"(in a checkout: .venv/bin/python -m pip install -e '.[{extras}]')"
        )
