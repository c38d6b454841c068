"""Record versions, hardware, commit and command of a run, without credentials."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lpo_fast.models import locate

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers")
SECRET = re.compile(r"token(?!iz)|secret|password|passwd|api_?key|credential", re.I)
CREDENTIALS = (re.compile(r"\b()hf_[A-Za-z0-9]{16,}"),
               re.compile(r"(\w://)[^/@\s]+(?=@)"),  # user:password@host
               re.compile(r"(-[\w.-]*(?:token|secret|password|passwd|api[_-]?key)(?:=|\s+))[^\s-]\S*", re.I))


def environment() -> dict[str, object]:
    """Return versions, hardware, commit, command and date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"command": redacted(" ".join(sys.orig_argv)),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit(),
            "python": platform.python_version(),
            **versions, "models": dict(locate.RESOLVED),
            "gpu": gpu, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def redacted(text: str) -> str:
    """Return the text with credentials replaced, since report.html and trackers show what a run records.

    Replaced are tokens (by their form), passwords in URLs, and values of options and environment variables
    whose names look secret.
    """
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    for form in CREDENTIALS:
        text = form.sub(r"\1***", text)
    return text


def commit() -> str | None:
    """Return the commit of this package's own repository, or None if it does not run from one."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"],
                              capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # git is not installed
        return None


def digest(value: object) -> str:
    """Return the SHA-256 of lists of texts and numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
