"""The documentation is tested: blocks resolve, commands parse, names, paths, tests and links exist."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES
from pages import commands as shell_commands

from velatura.core import hookspecs
from velatura.core.build import open_registry, resolve_options
from velatura.core.cli import main
from velatura.core.contracts import CONTRACTS
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("examples/*/*.yaml")])
SHIPPED = ROOT / "recipes" / "tinyworld.yaml"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and number of the block, its text)."""
    found = []
    for page in PAGES:
        texts = [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]
        found += [(f"{name_of(page)}-{number}", text) for number, text in enumerate(texts, start=1)]
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Every `velatura ...` of the shell blocks."""
    found = []
    for name, text in blocks("sh"):
        if name.startswith("examples/velatura-"):  # packages that are not installed here: test_downstream.py runs them
            continue
        found += [(name, words[1:]) for words in shell_commands(text) if words[0] == "velatura"]
    return found


def merged(below: object, above: object) -> object:
    """Mappings are merged; components, lists and values are replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)) or "use" in above:
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


def is_part(small: object, large: object) -> bool:
    """Whether everything in `small` is said by `large`, too."""
    if isinstance(small, dict) and isinstance(large, dict):
        return all(key in large and is_part(value, large[key]) for key, value in small.items())
    if isinstance(small, list) and isinstance(large, list):
        return all(any(is_part(a, b) for b in large) for a in small)
    return small == large


def resolve(path: Path, overrides: list[str] | None = None) -> None:
    recipe = load_recipe(path, overrides or [])
    resolve_options(open_registry(recipe), recipe)


@pytest.mark.parametrize(("name", "text"), [pytest.param(*b, id=b[0]) for b in blocks("yaml")])
def test_every_yaml_block_resolves(name, text, tmp_path):
    for _, code in blocks("python"):
        if first := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / first[1]).write_text(code)
    for plugin in (ROOT / "examples").glob("*/*.py"):
        (tmp_path / plugin.name).write_text(plugin.read_text())
    data = yaml.safe_load(text)
    if text.startswith("# fragment"):
        data = merged(yaml.safe_load(SHIPPED.read_text()), data)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    resolve(path)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_resolves(path):
    resolve(path)


def test_the_recipe_in_the_readme_is_the_shipped_one_with_less_in_it():
    (shown,) = (yaml.safe_load(text) for name, text in blocks("yaml") if name == "README.md-1")
    assert is_part(shown, yaml.safe_load(SHIPPED.read_text()))


def test_the_mistake_in_the_tutorial_is_answered_as_one(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["check", "recipes/tinyworld.yaml", "stages.teacher_t2i.objective.use=ntf"]) == 2
    assert "Did you mean 'nft'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [pytest.param(c, id=" ".join(c)) for _, c in commands() if c[0] in ("plugins", "schema") and "warmth.py" not in c],
)  # what a tutorial does with files of its own is run by test_runnable_docs.py
def test_commands_that_only_look_run(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(words) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("text", [pytest.param(t, id=n) for n, t in blocks("python")])
def test_every_python_block_compiles(text):
    compile(text, "block", "exec")


def test_every_component_is_mentioned_by_its_exact_name():
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [i.name for i in Registry.discover().list() if i.distribution == "velatura" and f"`{i.name}`" not in text]
    assert not missing


def test_papers_say_where_every_method_comes_from_or_that_it_is_ours():
    text = (ROOT / "docs" / "papers.md").read_text()
    missing = [i.name for i in Registry.discover().list() if i.distribution == "velatura" and f"`{i.name}`" not in text]
    assert not missing


def test_every_hook_is_documented_in_a_line():
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    for kind, contract in CONTRACTS.items():
        hook = f"velatura_{kind}"
        assert hasattr(hookspecs, hook)
        (line,) = [line for line in lines if line.startswith(f"| `{hook}` ")]
        assert f"`{contract.__name__}`" in line


def test_the_reference_is_current():
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    advice = "run python docs/generate_reference.py"
    assert (ROOT / "docs" / "recipes.md").read_text() == module.page(), advice


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_internal_link_exists(page):
    for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_and_every_test_named_exists(page):
    for path, test in re.findall(r"`((?:[\w.]+/)+[\w]+\.(?:py|yaml|md))(?:::(\w+))?`", page.read_text()):
        file = ROOT / path
        assert file.exists(), path
        assert not test or f"def {test}(" in file.read_text(), f"{path}::{test}"


def test_the_examples_reward_is_the_one_in_the_readme():
    (code,) = [text for name, text in blocks("python") if name == "README.md-1"]
    title, _, body = code.partition("\n")
    assert title == "# my_reward.py"
    assert body == (ROOT / "examples" / "first_reward" / "my_reward.py").read_text()
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 15
