"""The repository under test, and its hooks as modules."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parent.parent


def load_hook(name: str) -> ModuleType:
    """Load a hook as a module, without running it."""
    spec = spec_from_file_location(name, REPOSITORY / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
