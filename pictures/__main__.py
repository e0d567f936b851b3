"""Draw the README's pictures from real runs: `uv run python -m pictures [name …]`."""

import argparse
import importlib
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
SUBJECTS = ("terminal", "page")  # modules here, each with a function draw(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{' or '.join(SUBJECTS)}; default: all")
    names = parser.parse_args().names or SUBJECTS
    if unknown := set(names) - set(SUBJECTS):
        parser.error(f"unknown picture: {', '.join(unknown)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"drawing the {name} …", flush=True)
        importlib.import_module(f"pictures.{name}").draw(FOLDER)


if __name__ == "__main__":
    main()
