"""From a YAML file and command-line words to a checked configuration, and mistakes in plain words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from .basics import Run, Section

ConfigType = TypeVar("ConfigType", bound=Run)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what to change."""


def load_config(kind: type[ConfigType], path: str | Path, overrides: Sequence[str] = ()) -> ConfigType:
    """The configuration in a YAML file, with overrides, checked.

    Args:
      kind: the class of the configuration.
      path: the file, or the name of a shipped configuration such as ``digits_guidance``.
      overrides: command-line words, ``--key value`` or ``--key=value`` with dots for nesting; values are read as YAML.

    Raises:
      ConfigError: for a file that is missing or not YAML, and for keys or values that do not fit: all of them at once.
    """
    file = find_config(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold keys and values, but it holds a {type(tree).__name__}")
    for key, value in parse_overrides(overrides):
        _insert(tree, key, value)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # Of a choice between types every type complains, about one and the same key: the first that is not of the type.
        mistakes: dict[Any, Any] = {}
        for item in _of_one_choice(error.errors(), kind, tree):
            key = tuple(_locate(kind, item["loc"])[1])
            if key not in mistakes or mistakes[key]["type"].endswith("_type") > item["type"].endswith("_type"):
                mistakes[key] = item
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        explained = [_explain(kind, item) for item in mistakes.values()]
        lines = [f"{count} in the configuration ({file}, and the command line):", *explained]
        raise ConfigError("\n  ".join(lines)) from None


def dump_config(config: Section) -> str:
    """The configuration as YAML, defaults included; reading it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def shipped_configs() -> dict[str, Path]:
    """Configurations that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    folders = [package / "configs", package.parent / "configs"]  # installed; in a source checkout
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """The file that is meant by a path, or by the bare name of a shipped configuration."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise ConfigError(f"{path} is a folder, not a configuration")
    shipped = shipped_configs()
    # "configs/digits.yaml" means the shipped one also where there is no checkout around.
    if file.parent in (Path(), Path("configs")) and file.suffix in ("", ".yaml") and file.stem in shipped:
        return shipped[file.stem]
    nearest = difflib.get_close_matches(file.stem, shipped, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    raise ConfigError(f"there is no configuration {path}{hint} Shipped ones: {', '.join(shipped) or 'none'}")


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """``--a.b 3`` and ``--a.b=3`` as (("a", "b"), 3).

    Raises:
      ConfigError: for a word that is not an option, or an option without a value.
    """
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"expected --key value, got {word!r} (a value of several words needs quotes)")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            text = words.pop(0)
        try:
            value = yaml.load(text, Loader=_StrictLoader) if text else text  # YAML reads nothing as null
        except yaml.YAMLError:
            value = text
        yield tuple(part.replace("-", "_") for part in key.split(".")), value


def describe_keys(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, type and default, description) of every key, in order; the kinds of a choice come one after another.

    The line that begins a kind has the key ``name: kind`` and no type.
    """
    for name, field in kind.model_fields.items():
        sections = list(_sections(field.annotation))
        if len(sections) == 1 and field.default_factory is None and isinstance(field.default, Section):
            yield from describe_keys(sections[0], f"{prefix}{name}.")
            continue
        default = (
            "required" if field.is_required() else f"default {_plain(field.get_default(call_default_factory=True))}"
        )
        tagged = any(_tag(section) is not None for section in sections)
        described = "one of the kinds below" if tagged else "the keys below" if sections else _name(field.annotation)
        yield f"{prefix}{name}", f"{described}, {default}", field.description or ""
        for section in sections:
            if section is not kind:
                if _tag(section) is not None:
                    yield f"{prefix}{name}: {_tag(section)}", "", (section.__doc__ or "").strip()
                yield from describe_keys(section, f"{prefix}{name}.")


# ------------------------------------------------------------------------------------------------------------- helpers


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is a mistake, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _insert(tree: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    *parents, last = key
    for depth, part in enumerate(parents, start=1):
        child = tree.setdefault(part, {})
        if child is None:
            child = tree[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--{'.'.join(key)}: {'.'.join(key[:depth])} is {child!r}, which has no keys of its own")
        tree = child
    tree[last] = value


def _of_one_choice(items: Sequence[Any], kind: type[Section], tree: Mapping[str, Any]) -> list[Any]:
    """Without the mistakes that a choice of sections without a kind makes in those that are not meant.

    Of `data: verses | {corpus: ...} | {system: ...}` every one complains. What has keys is meant to be the section
    whose keys it resembles most, and what has none is meant to be a word.
    """
    kept = []
    for item in items:
        section, below = kind, list[type[Section]]()
        value: Any = tree
        for part in item["loc"]:
            named = [candidate for candidate in below if _tag(candidate) is None and candidate.__name__ == part]
            has_choice = len(below) > 1 and all(_tag(candidate) is None for candidate in below)
            if has_choice and isinstance(value, Mapping) != bool(named):
                break
            if named:
                keys = list(value)
                meant = max(below, key=lambda each: sum(bool(_similar(key, each)) for key in keys))
                if named[0] is not meant:
                    break
                section, below = meant, []
                continue
            section, below = (below[0], []) if len(below) == 1 else (section, below)
            if part in section.model_fields:
                below = list(_sections(section.model_fields[part].annotation))
                value = value.get(part) if isinstance(value, Mapping) else None
        else:
            kept.append(item)
    return kept or list(items)


def _similar(key: Any, section: type[Section]) -> list[str]:
    return difflib.get_close_matches(str(key), list(section.model_fields), n=1, cutoff=0.5)


def _explain(kind: type[Section], item: Mapping[str, Any]) -> str:
    """One line for one mistake: the key, the value, and what would be right."""
    section, path = _locate(kind, item["loc"])
    key = ".".join(path)
    value = _plain(item["input"])
    if item["type"] == "extra_forbidden":
        siblings = list(section.model_fields)
        prefix = ".".join(path[:-1])
        inside = f"{prefix}." if prefix else ""
        known = [name for name, *_ in describe_keys(section, inside)]
        # What the other kinds of a choice have is no key here.
        others = [name for name, *_ in describe_keys(kind)]
        choices = tuple(name.split(":")[0] + "." for name in others if ":" in name)
        known += [name for name in others if inside and not name.startswith((inside, *choices))]
        elsewhere = [name for name in known if ":" not in name and name.split(".")[-1] == path[-1]]
        near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        # A key that exists in another section, spelt right, beats one that is spelt alike in this.
        nearest = elsewhere[0] if elsewhere else ".".join([prefix, near[0]]).lstrip(".") if near else None
        hint = f"did you mean {nearest}?" if nearest else f"the keys here are {', '.join(siblings)}"
        return f"unknown key {key} = {value}: {hint}"
    if item["type"] == "missing":
        return f"{key} is missing: {section.model_fields[path[-1]].description or 'it has no default'}"
    if item["type"] == "union_tag_invalid":
        tag = item["ctx"]["tag"]
        allowed = [name.strip("' ") for name in item["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(tag), allowed, n=1)
        return f"{key}.kind = {tag}: it must be one of {', '.join(allowed)}" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    if item["type"] in ("model_type", "model_attributes_type"):
        below = list(_sections(section.model_fields[path[-1]].annotation))
        keys = ", ".join(below[0].model_fields) if len(below) == 1 else f"kind: {', '.join(map(str, map(_tag, below)))}"
        return f"{key} = {value}: it has keys of its own, {keys}"
    if item["type"] == "union_tag_not_found":
        return f"{key} needs a kind: {key}.kind = ..."
    if item["type"] == "literal_error":
        expected = item["ctx"]["expected"]
        allowed = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(item["input"]), allowed, n=1)
        field = section.model_fields.get(path[-1])
        # A key that may hold something else than these words, a pair of numbers say, is told with all its types.
        whole = _name(field.annotation) if field is not None and get_origin(field.annotation) is not Literal else ""
        meant = f"one of {whole}" if "[" in whole else expected
        return f"{key} = {value}: it must be {meant}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key} = {value}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _locate(kind: type[Section], location: Sequence[Any]) -> tuple[type[Section], list[str]]:
    """The section a mistake is in, and the key's path without the names of kinds that pydantic puts in between."""
    section: type[Section] = kind
    path: list[str] = []
    below: list[type[Section]] = []  # the sections that the last key may hold
    for part in location:
        tagged = [candidate for candidate in below if part in (_tag(candidate), candidate.__name__)]
        if tagged:
            section, below = tagged[0], []
            continue
        if below:
            section, below = below[0], []
        if isinstance(part, str) and part not in section.model_fields and _is_type_name(part):
            continue  # of a choice between plain types
        path.append(str(part))
        if part in section.model_fields:
            below = list(_sections(section.model_fields[part].annotation))
    return section, path


def _is_type_name(word: str) -> bool:
    return word in ("int", "float", "str", "bool", "none") or "[" in word or word.startswith("constrained-")


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The section classes in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) is not None:
        for argument in get_args(annotation):
            yield from _sections(argument)


def _tag(section: type[Section]) -> str | None:
    field = section.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None else None


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    arguments = [_name(argument) for argument in get_args(annotation)]
    if get_origin(annotation) in (list, tuple):
        return f"[{', '.join(arguments)}]"
    return " | ".join(arguments)


def _plain(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
