"""What a command was given: the words of its line and a TOML file, both checked against the declared types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from cyclopts import App, Token
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.exceptions import UnknownOptionError

from flashsae.architecture import Architecture, architecture_named
from flashsae.cli.options import declared_by
from flashsae.cli.several import WEIGHTED, architectures_in, read_sweep, values_of
from flashsae.errors import ConfigError
from flashsae.settings.elsewhere import near_setting, our_name
from flashsae.settings.kinds import check, expand, parse, unwrap
from flashsae.settings.reading import TABLES
from flashsae.settings.toml import read_toml
from flashsae.settings.training import DEFAULT_ARCH, architectures_with

_ALONE = {
    "resume": ({"plan", "extend"}, "a run is resumed with the settings that it has"),
    "verify": (set[str](), "it writes nothing"),
    "describe": ({"json"}, "it writes nothing"),
    "merge": ({"out"}, "it runs no model"),
}
"""Settings that stand alone: what may stand beside each, and why nothing else may."""
_EVERYWHERE = {"--help", "-h", "--version"}


class Given:
    """Looks at what a command was given before anything is made of it, and adds what stands in a file.

    Called by cyclopts, as one of `App.config`. A word of the command line goes before the file.

    Args:
        words: of the command line.
        file: TOML with settings by their names; None where there is none.
    Raises:
        ConfigError: a value is not what its setting declares, the file has what the command does not, or other
            settings stand beside `resume`.
        UnknownOptionError: the command has no such option; named before a setting is missed that was misspelt.
    """

    def __init__(self, words: Sequence[str], file: Path | None) -> None:
        self._words = words
        self._file = file
        self.names: frozenset[str] = frozenset()
        """Of the settings that were given, once they are checked."""

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Check the arguments of a command, and fill in those of the file."""
        _refuse_unknown(self._words, arguments)
        leaves = {each.field_info.name: each for each in arguments if each.parse and not each.children}
        command = app.default_command
        if command is None:
            return
        declared = declared_by(command)
        given = [name for name, argument in leaves.items() if argument.tokens]
        for name in given:
            _check_words(name, leaves[name], declared[name])
        sweep = [token.value for token in leaves["sweep"].tokens] if "sweep" in leaves else []
        if sweep and self._file is not None:
            raise ConfigError(
                "sweep: expected no --config beside it, since its file holds all settings. Leave one out."
            )
        if self._file is not None:
            given += self._add(self._file, read_file(self._file), " ".join(commands), leaves, declared)
        for file in sweep:
            given += self._add(Path(file), read_sweep(file).base, " ".join(commands), leaves, declared)
        self.names = frozenset(given)
        for name, (may, why) in _ALONE.items():
            beside = [each for each in given if each != name and each not in may]
            if name in given and beside:
                raise ConfigError(f"{name}: expected no other setting beside it, got {beside[0]}; {why}.")

    def _add(
        self, file: Path, held: Mapping[str, Any], command: str, leaves: dict[str, Argument], declared: dict[str, Any]
    ) -> list[str]:
        """Give the arguments that the command line leaves open what the file has for them; return all of its names."""
        given: list[str] = []
        arch = next(iter(values_of(self._words, "arch")), str(held.get("arch") or DEFAULT_ARCH))
        for key, value in held.items():
            name = key.replace("-", "_")
            if name not in leaves:
                hint = near_setting(name, leaves) or f" flashsae {command} --help names all that there are."
                hint = (command == "train" and _of_another(our_name(name), arch)) or hint
                raise ConfigError(f"{file}: there is no setting {key!r} of flashsae {command}.{hint}")
            if name in given:
                raise ConfigError(f"{file}: {name} stands there twice.")
            given.append(name)
            try:
                meant = check(name, value, declared[name])
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
            if not leaves[name].tokens:
                for each in meant if isinstance(meant, tuple) else (meant,):
                    word = str(each).lower() if isinstance(each, bool) else str(each)
                    leaves[name].append(Token(keyword=key, value=word, source=str(file)))
        return given


def read_file(file: Path) -> dict[str, Any]:
    """Return the settings in a file that somebody names.

    Raises:
        ConfigError: it cannot be read, or has sections.
    """
    try:
        settings = read_toml(file)
    except ConfigError as error:
        raise ConfigError(f"config: cannot read {file}: {error}.") from error
    if isinstance(settings.get("sae"), list):
        raise ConfigError(
            f"config: expected the settings of one SAE in {file}, got tables [[sae]]. Give it with --sweep."
        )
    sections = [name for name, value in settings.items() if isinstance(value, dict) and name not in TABLES]
    if sections:
        raise ConfigError(
            f"config: cannot read {file}: expected settings without sections, got the section [{sections[0]}]. Write "
            'each setting on a line of its own: arch = "topk", then k = 32.'
        )
    return settings


def architectures_asked(words: Sequence[str]) -> list[Architecture]:
    """Return the architectures that a command line asks for, perhaps in its file, or the default: most often one.

    Raises:
        ConfigError: there is none of this name, or the file cannot be read.
    """
    file, sweep = _asked(words, "config"), _asked(words, "sweep")
    names = values_of(words, "arch")
    if not names and sweep:
        names = architectures_in(read_sweep(sweep))
    if not names and file:
        names = [str(read_file(expand(file, "config")).get("arch") or DEFAULT_ARCH)]
    return [architecture_named(name) for name in dict.fromkeys(names or [DEFAULT_ARCH])]


def unknown_option(error: UnknownOptionError, words: Sequence[str]) -> str:
    """Return a sentence on an option that there is not, with who has it where it is of another architecture."""
    option = (error.token.keyword or error.token.value).partition("=")[0]
    name = option.lstrip("-").replace("-", "_")
    known = {each.lstrip("-").replace("-", "_") for argument in error.argument_collection for each in argument.names}
    ours = our_name(name, known)
    if ours != name and ours in known:
        return f"Unknown option: {option}. Did you mean --{ours.replace('_', '-')}?"
    whose = _of_another(ours, architectures_asked(words)[0].name) if "train" in words else ""
    return f"Unknown option: {option}.{whose}" if whose else " ".join(str(error).split())


def _of_another(setting: str, arch: str) -> str:
    """Return a sentence on a setting that another architecture has, not this one, or ""."""
    others = architectures_with(setting)
    return f" {arch} has no setting {setting}; --arch {others[0]} has." if others else ""


def _asked(words: Sequence[str], name: str) -> str | None:
    """Return the last value of an option in the words of a command line, or None."""
    found = None
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--":
            break
        option, _, value = word.partition("=")
        if option == f"--{name}":
            found = value if "=" in word else following
    return found


def joined(words: Sequence[str], name: str) -> list[str]:
    """Return the words of a command line with all values of an option that may be repeated in one, between commas."""
    found, rest = list[str](), list[str]()
    remaining = iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        if word == "--":
            rest.append(word)
            break
        if option != f"--{name}":
            rest.append(word)
            continue
        given = value if equals else next(remaining, None)
        if given is None:
            return list(words)  # of which it is told that a value is missing
        found.append(given)
    options = [f"--{name}={', '.join(found)}"] if found else []
    place = rest.index("--") if "--" in rest else len(rest)
    return [*rest[:place], *options, *rest[place:], *remaining]


def with_mixtures(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with texts that follow each other, all with weights, in one: A@0.7 B@0.3."""
    found: list[str] = []
    for word in words:
        if "--" not in found and found and all(map(WEIGHTED.search, (found[-1], word))):
            found[-1] += f", {word}"
        else:
            found.append(word)
    return found


def one_by_one(words: Sequence[str], command: Callable[..., Any]) -> list[str]:
    """Return the words of a command line with lists of numbers as options that are repeated.

    `--betas 0.9 0.999` and `--betas 0.9,0.999` are `--betas 0.9 --betas 0.999`, which is what cyclopts takes beside
    arguments without a name.

    Args:
        words: of the command line.
        command: whose settings tell which options are lists of numbers.
    """
    lists = {f"--{name.replace('_', '-')}" for name, kind in declared_by(command).items() if _is_of_numbers(kind)}
    spread: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*spread, word, *rest]
        option, equals, value = word.partition("=")
        given = _numbers(value) if option in lists else []
        while option in lists and not equals and rest and _numbers(rest[0]):
            given += _numbers(rest.pop(0))
        spread += [part for number in given for part in (option, number)] or [word]
    return spread


def _is_of_numbers(annotation: Any) -> bool:
    kind = unwrap(annotation)[0]
    return get_origin(kind) is tuple and unwrap(get_args(kind)[0])[0] in (int, float)


def _numbers(word: str) -> list[str]:
    """Return the numbers of a word, between commas; none if it is something else."""
    parts = [part.strip() for part in word.strip("[]() ").split(",") if part.strip()]
    return parts if all(isinstance(parse(part, float), int | float) for part in parts) else []


def _refuse_unknown(words: Iterable[str], arguments: ArgumentCollection) -> None:
    for word in words:
        if word == "--":
            return
        option = word.partition("=")[0]
        if re.match("--|-[A-Za-z]", option) and option not in _EVERYWHERE:
            try:
                arguments.match(option)
            except ValueError:
                token = Token(keyword=option, source="cli")
                raise UnknownOptionError(token=token, argument_collection=arguments) from None


def _check_words(name: str, argument: Argument, annotation: Any) -> None:
    """Check the words of a setting and write each as what it means, ~ and 1e6 for an int put out in full."""
    kind = unwrap(annotation)[0]
    element = get_args(kind)[0] if get_origin(kind) is tuple else annotation
    if unwrap(element)[0] is bool:
        return  # a flag; its words are those of cyclopts
    checked = []
    for token in argument.tokens:
        meant = parse(token.value, element)
        if isinstance(meant, str) and unwrap(element)[0] in (int, float):
            checked.append(token)  # no number at all, which cyclopts tells
        else:
            checked.append(token.evolve(value=str(check(name, meant, element))))
    argument.tokens[:] = checked
