"""What ran where: versions, hardware, commit, command, without credentials."""

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
CREDENTIALS = (re.compile(r"\b()hf_[A-Za-z0-9]{16,}"), re.compile(r"(\w://)[^/@\s]+(?=@)"),  # user:password@host
               re.compile(r"(-[\w.-]*(?:token|secret|password|passwd|api[_-]?key)(?:=|\s+))[^\s-]\S*", re.I))


def environment() -> dict[str, object]:
    """Versions, hardware, commit, command and date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"command": redacted(" ".join(sys.orig_argv)),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit(), "python": platform.python_version(),
            **versions, "models": dict(locate.RESOLVED),
            "gpu": gpu, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def redacted(text: str) -> str:
    """Without credentials: tokens by their form, passwords in URLs, values of secret-looking options and variables.

    What a run records is shown around: report.html, trackers.
    """
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    for form in CREDENTIALS:
        text = form.sub(r"\1***", text)
    return text


def commit() -> str | None:
    """The commit of this package's own repository, if it runs from one."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True,
                              text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None


def digest(value: object) -> str:
    """SHA-256 of lists of texts and numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
