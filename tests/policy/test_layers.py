"""Lower layers never import upper ones; methods are mathematics; `import decoct` is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "decoct"
FILES = sorted(SRC.rglob("*.py"))

LAYERS = (
    {"version"},
    {"native"},
    {"ops"},
    {"weights", "losses"},
    {"store", "arch", "stats"},
    {"model"},
    {"methods"},
    {"engine"},
    {"teachers", "samples", "blackbox"},
    {"exporters", "runtime"},
    {"training"},
    {"evaluation"},
    {"search", "report"},
    {"recipe"},
    {"api"},
    {"", "console", "hf"},  # "": the package itself, which only points at the API
    {"serving"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MATHEMATICS = {"torch", "jaxtyping", "typing_extensions", *sys.stdlib_module_names}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports when it runs: not what only a type checker sees."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            whole = node.module == "decoct"
            yield from ((node.lineno, f"decoct.{alias.name}" if whole else node.module) for alias in node.names)


def layer(module: str) -> str:
    """The layer of a dotted name inside decoct; names the package offers itself belong to the package."""
    name = module.removeprefix("decoct").removeprefix(".").split(".")[0]
    return name if name in RANK or (SRC / name).is_dir() or (SRC / f"{name}.py").exists() else ""


def own_layer(path: Path) -> str:
    first = path.relative_to(SRC).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def test_every_package_has_its_place() -> None:
    assert {own_layer(path) for path in FILES} <= RANK.keys(), "put the new package into LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_lower_never_imports_upper(path: Path) -> None:
    mine = own_layer(path)
    wrong = [
        f"{path}:{line} imports {module}"
        for line, module in imports(path)
        if module.split(".")[0] == "decoct" and layer(module) != mine and RANK[layer(module)] >= RANK[mine]
    ]
    assert not wrong


def method_files() -> list[Path]:
    folder = SRC / "methods"
    return [path for path in folder.rglob("*.py") if path.parent != folder and path.name != "__init__.py"]


BASES = {
    f"decoct.methods.{name}"
    for name in (
        "base",
        "block_learning",
        "cache_policy",
        "depth",
        "elimination",
        "experts",
        "learned_division",
        "learned_grid",
        "pruning",
        "training",
        "width",
    )
}


@pytest.mark.parametrize("path", method_files(), ids=lambda path: path.stem)
def test_methods_are_mathematics(path: Path) -> None:
    for line, module in imports(path):
        if module.split(".")[0] != "decoct":
            assert module.split(".")[0] in MATHEMATICS, f"{path}:{line} imports {module}"
        elif layer(module) == "methods":
            assert module in BASES, f"{path}:{line} imports another method: {module}"


def test_only_one_door_to_transformers_modules() -> None:
    """Configs and tokenizers may be read elsewhere; modules come from arch.hf alone, their attention from beside it."""
    doors = {
        "arch/hf.py", "arch/attention.py", "hf.py", "engine/data.py", "store/gguf_source.py", "training/loop.py",
        "training/processes.py", "exporters/in_transformers.py", "exporters/in_peft.py",
    }  # fmt: skip
    users = {
        path.relative_to(SRC).as_posix()
        for path in FILES
        for _, module in imports(path)
        if module.split(".")[0] in {"transformers", "accelerate", "peft"}
    }
    assert users <= doors


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import decoct", {"torch", "transformers", "numpy", "pydantic", "rich", "onnx", "gguf"}),
        ("import decoct.cli", {"torch", "transformers"}),
        ("import decoct.api", {"transformers", "gguf", "datasets", "compressed_tensors", "accelerate"}),
        ("import decoct.methods", {"transformers", "decoct.engine", "decoct.store"}),
    ],
)
def test_light_imports(statement: str, heavy: set[str]) -> None:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not heavy & set(done.stdout.split())


def loss_files() -> list[Path]:
    return [path for path in sorted((SRC / "losses").glob("*.py")) if path.name not in LOSS_BASES]


LOSS_BASES = {"__init__.py", "base.py", "chunks.py", "distribution.py", "states.py"}


@pytest.mark.parametrize("path", sorted((SRC / "losses").glob("*.py")), ids=lambda path: path.stem)
def test_losses_are_mathematics(path: Path) -> None:
    for line, module in imports(path):
        if module.split(".")[0] != "decoct":
            assert module.split(".")[0] in MATHEMATICS, f"{path}:{line} imports {module}"
