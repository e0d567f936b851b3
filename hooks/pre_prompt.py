"""Before the first question: is there a uv to set the project up with? Not rendered."""

import os
import re
import shutil
import subprocess
import sys

OLDEST = (0, 5, 0)  # knows dependency groups and their includes
INSTALL = "python3 -m pip install --upgrade uv"


def find_problem(uv: str | None) -> str | None:
    """Tell what keeps this uv from being used, None when nothing does."""
    if uv is None:
        return "uv is missing"
    try:
        done = subprocess.run(
            [uv, "--version"], check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"uv does not start ({uv}: {type(error).__name__})"
    version = re.match(r"uv (\d+)\.(\d+)\.(\d+)", done.stdout)
    if done.returncode or not version:
        return f"uv does not work in this folder ({uv})"
    if tuple(map(int, version.groups())) < OLDEST:
        return f"{version[0]} is too old, {'.'.join(map(str, OLDEST))} is needed"
    return None


if __name__ == "__main__":
    if problem := find_problem(os.environ.get("UV") or shutil.which("uv")):
        sys.exit(f"{problem}: type `{INSTALL}`, then the same command again")
