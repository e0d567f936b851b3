"""Before the first question: is there a uv that can set the project up? Plain Python, not rendered."""

import os
import re
import shutil
import subprocess
import sys

OLDEST = (0, 5, 0)  # knows dependency groups and their includes
INSTALL = "python3 -m pip install --upgrade uv"


def problem(uv: str | None) -> str | None:
    """Tell what keeps this uv from being used, None when nothing does."""
    if uv is None:
        return f"uv is missing. Get it with: {INSTALL}"
    try:
        done = subprocess.run([uv, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"uv does not start ({type(error).__name__}: {uv}). Get it anew with: {INSTALL}"
    version = re.match(r"uv (\d+)\.(\d+)\.(\d+)", done.stdout)
    if done.returncode or not version:
        return f"uv does not work here ({uv}). Get it with: {INSTALL}"
    if tuple(map(int, version.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"{version[0]} is too old, {oldest} is needed. Get a newer one with: {INSTALL}"
    return None


if __name__ == "__main__":
    if trouble := problem(os.environ.get("UV") or shutil.which("uv")):
        sys.exit(f"\n{trouble}\nThen type the same command again; nothing was created.")
