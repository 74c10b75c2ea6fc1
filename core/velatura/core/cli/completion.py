"""`velatura completion SHELL`: a script by which a shell completes commands, options, kinds and names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from velatura.core.cli.arguments import Verbs, new_parser

SHELLS = ("bash", "zsh", "fish")

BASH = """\
# velatura: completion for bash. In ~/.bashrc: eval "$(velatura completion bash)"
{functions}
_velatura() {{
  local at="" previous="${{COMP_WORDS[COMP_CWORD-1]}}" current="${{COMP_WORDS[COMP_CWORD]}}" i
  for ((i = 1; i < COMP_CWORD; i++)); do at="$(_velatura_step "$at" "${{COMP_WORDS[i]}}")"; done
  COMPREPLY=($(compgen -W "$(_velatura_words "$at" "$previous" "$current")" -- "$current"))
}}
complete -o default -F _velatura velatura
"""

ZSH = """\
#compdef velatura
# velatura: completion for zsh. In ~/.zshrc, below compinit: eval "$(velatura completion zsh)"
{functions}
_velatura() {{
  local at="" i
  for ((i = 2; i < CURRENT; i++)); do at="$(_velatura_step "$at" "${{words[i]}}")"; done
  local -a found
  found=(${{=$(_velatura_words "$at" "${{words[CURRENT-1]}}" "${{words[CURRENT]}}")}})
  compadd -a found
  _files
}}
compdef _velatura velatura
"""

FISH = """\
# velatura: completion for fish. In ~/.config/fish/config.fish: velatura completion fish | source
function __velatura_words
    set -l tokens (commandline -opc)
    set -l current (commandline -ct)
    set -l at ""
    for token in $tokens[2..-1]
        switch "$at $token"
{steps}
        end
    end
    switch "$tokens[-1]"
{values}
    end
    switch "$at"
{words}
    end
end
complete -c velatura -a "(__velatura_words)"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What may follow one command."""

    path: str
    """Its words, like `plugins show`; empty for `velatura` itself."""
    inner: tuple[str, ...]
    """Commands below it."""
    options: tuple[str, ...]
    names: tuple[str, ...]
    """What its first argument may be, beside files."""


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = 'eval "$(velatura completion bash)"'
    summary = "print a script that completes commands, options and names in a shell"
    parser = new_parser(verbs, name, _completion, summary, f"velatura completion bash\n  {example}")
    parser.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def _completion(arguments: argparse.Namespace) -> int:
    from velatura.core.cli.program import _parser
    from velatura.core.errors import VelaturaError, suggest

    if arguments.shell not in SHELLS:
        raise VelaturaError(f"there is no completion for {arguments.shell!r}.{suggest(arguments.shell, SHELLS)}")
    print(script(arguments.shell, list(commands(_parser(), _names()))), end="")
    return 0


def _names() -> Mapping[str, Sequence[str]]:
    """Metavariable -> what may stand there: kinds, and all that is installed and ships. Imports no torch."""
    from velatura.core.contracts import CONTRACTS
    from velatura.core.registry import Registry
    from velatura.core.shipped import shipped_recipes

    infos = Registry.discover().list()
    plugins = sorted({info.plugin for info in infos})
    recipes = [path.stem for path in shipped_recipes()]
    components = sorted({info.name for info in infos})
    return {
        "--kind": list(CONTRACTS), "NAME": components, "PLUGIN": plugins, "RECIPE": recipes, "RECIPE|REWARD": recipes,
        "SHELL": SHELLS,
    }  # fmt: skip


def commands(
    parser: argparse.ArgumentParser, names: Mapping[str, Sequence[str]], path: tuple[str, ...] = ()
) -> Iterator[Command]:
    """A parser and all below it."""
    inner: dict[str, argparse.ArgumentParser] = {}
    options: list[str] = []
    possible: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            inner |= action.choices
        elif action.option_strings:
            options += [option for option in action.option_strings if option.startswith("--")]
        elif path != ("new-plugin",):
            possible += names.get(str(action.metavar), ())
    if path == ():
        yield Command(path="--kind", inner=(), options=(), names=tuple(names["--kind"]))
    yield Command(path=" ".join(path), inner=tuple(inner), options=tuple(options), names=tuple(possible))
    for name, below in inner.items():
        yield from commands(below, names, (*path, name))


def script(shell: str, found: Sequence[Command]) -> str:
    """The script of one shell."""
    (kinds,) = [command.names for command in found if command.path == "--kind"]
    tree = [command for command in found if command.path != "--kind"]
    if shell == "fish":
        return FISH.format(
            steps="\n".join(
                _fish(f"{c.path} {w}", f"set at '{f'{c.path} {w}'.strip()}'") for c in tree for w in c.inner
            ),
            values=_fish("--kind", f"printf '%s\\n' {' '.join(kinds)}; return"),
            words="\n".join(
                _fish(c.path, f"printf '%s\\n' {' '.join((*c.inner, *c.names, *c.options))}") for c in tree
            ),
        )
    return {"bash": BASH, "zsh": ZSH}[shell].format(functions=_functions(tree, kinds))


def _fish(case: str, body: str) -> str:
    return f"        case '{case}'\n            {body}"


def _functions(tree: Sequence[Command], kinds: Sequence[str]) -> str:
    """Two functions that bash and zsh both understand: the command after one more word, and what may follow one."""
    steps = "\n".join(f"    '{c.path} {w}') echo '{f'{c.path} {w}'.strip()}' ;;" for c in tree for w in c.inner)
    words = "\n".join(
        f"    '{c.path}') case \"$3\" in -*) echo '{' '.join(c.options)}' ;; "
        f"*) echo '{' '.join((*c.inner, *c.names))}' ;; esac ;;"
        for c in tree
    )
    return (
        f'_velatura_step() {{\n  case "$1 $2" in\n{steps}\n    *) echo "$1" ;;\n  esac\n}}\n'
        f"_velatura_words() {{\n  if [ \"$2\" = --kind ]; then echo '{' '.join(kinds)}'; return; fi\n"
        f'  case "$1" in\n{words}\n  esac\n}}'
    )
