"""From a Hydra configuration to checked dataclasses, with messages that say what was meant.

`to_config` is the door: past it there is no DictConfig. `compose` does the same from a list of
overrides, without launching anything.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.errors import UserError
from training.options import SCHEMAS, register
from training.schema import TrainConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONFIG_MODULE = "configs"
GROUPS = ("recipe", "model", "data", "optim", "loop", "scale", "logger", "launcher", "sweep")


def experiments(below: str = "") -> dict[str, str]:
    """Every experiment -> its one line: the first comment of its file that is not the command."""
    found = {}
    for file in sorted((CONFIGS / "experiment").rglob("*.yaml")):
        name = file.relative_to(CONFIGS / "experiment").with_suffix("").as_posix()
        comments = [line[1:].strip() for line in file.read_text().splitlines() if line[:1] == "#"]
        about = [line for line in comments if not line.startswith(("@package", "afferent "))]
        if name.startswith(below):
            found[name] = about[0] if about else ""
    return found


def experiment_list() -> str:
    """The experiments, one line each, as a person reads them."""
    known = experiments()
    width = max((len(name) for name in known), default=0)
    return "\n".join(f"  {name:<{width}}  {about}" for name, about in known.items())


def options(group: str) -> list[str]:
    """The options of a configuration group: the stems of its YAML files."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """' Did you mean a, b?' for the nearest of `known`, or ''."""
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def unknown_keys(node: Any, path: str = "") -> Iterator[tuple[str, type]]:
    """Keys no dataclass knows, as (path, owner): what `+optim.lrr=1` would silently add."""
    owner = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    if owner is None or not dataclasses.is_dataclass(owner):
        return
    known = {item.name for item in dataclasses.fields(owner)}
    for key in node:
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            yield full, owner
        elif not OmegaConf.is_missing(node, key):
            yield from unknown_keys(node._get_node(key), full)


def unknown_key_message(path: str, owner: Any) -> str:
    """Names the unknown key, the nearest known ones and all there are."""
    parent = path.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    known = [prefix + item.name for item in dataclasses.fields(owner)]
    where = f"`{parent}`" if parent else "the configuration"
    inside = [] if parent else groups_with(path)
    near = f" Did you mean {' or '.join(inside)}?" if inside else did_you_mean(path, known)
    return (
        f"There is no key `{path}`.{near} "
        f"{where} has: {', '.join(item.name for item in dataclasses.fields(owner))}"
    )


def groups_with(key: str) -> list[str]:
    """`regularizer` -> ["recipe.regularizer"]: groups of which some option has the key."""
    return [
        f"{group}.{key}"
        for group, options in SCHEMAS.items()
        if any(key in (item.name for item in dataclasses.fields(node)) for node in options.values())
    ]


def to_config(cfg: DictConfig) -> TrainConfig:
    """Check a composed configuration and turn it into dataclasses. Raises UserError."""
    for path, owner in unknown_keys(cfg):
        raise UserError(unknown_key_message(path, owner))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"No value is given for {', '.join(missing)}: set {missing[0]}=...")
    try:
        config = OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(config_message(error)) from error
    assert isinstance(config, TrainConfig)
    refuse_infinite(config)
    for group in ("recipe", "model", "data"):
        refuse_other_name(group, getattr(config, group))
    return config


def refuse_infinite(node: Any, path: str = "") -> None:
    """Raise UserError if a number somewhere below is infinite, or none."""
    if isinstance(node, float) and not math.isfinite(node):
        raise UserError(f"{path}={node} must be a finite number")
    if dataclasses.is_dataclass(node):
        for item in dataclasses.fields(node):
            below = f"{path}.{item.name}" if path else item.name
            refuse_infinite(getattr(node, item.name), below)
    elif isinstance(node, list):
        for item in node:
            refuse_infinite(item, path)


def refuse_other_name(group: str, chosen: Any) -> None:
    """Raise UserError if an option's name was set by hand: it would still be the same option."""
    of_that_name = SCHEMAS[group].get(chosen.name, type(chosen))
    if chosen.name not in options(group) or of_that_name is not type(chosen):
        raise UserError(
            f"{group}.name={chosen.name} is no name to be set: choose {group}=<one of "
            f"{', '.join(options(group))}>"
        )


def refuse_empty_groups(overrides: Sequence[str]) -> None:
    """Raise UserError for `optim=null`: every group has one of its options."""
    for word in overrides:
        group, equals, value = word.partition("=")
        if equals and group in GROUPS and value.strip() in ("", "null", "Null", "NULL", "~"):
            raise UserError(f"{word}: choose {group}=<one of {', '.join(options(group))}>")


def config_message(error: BaseException) -> str:
    """One or two sentences for an error of Hydra, OmegaConf or a range check."""
    from hydra.errors import MissingConfigException

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for item in chain:
        owner = getattr(item, "object_type", None)
        key = getattr(item, "full_key", None)
        if type(item).__name__ in ("ConfigKeyError", "ConfigAttributeError") and key:
            if dataclasses.is_dataclass(owner):
                where = [str(link).splitlines()[0] for link in chain if str(link)[:4] == "In '"]
                said = " ".join([*where[:1], unknown_key_message(key, owner)])
                hint = ". The experiment has sizes for its own recipe, model and data: keep those"
                return said + hint if said.startswith("In 'experiment_scale/") else said
            if owner is dict or owner is DictConfig:
                return f"There is no key `{key}`."
        if isinstance(item, MissingConfigException):
            return missing_option_message(item.missing_cfg_file or "")
    inner = [item for item in chain if isinstance(item, OmegaConfBaseException)]
    said = next((item for item in inner if getattr(item, "full_key", None)), error)
    lines = [line.strip() for line in str(said).splitlines()]
    key = getattr(said, "full_key", None)
    where = [str(link).splitlines()[0] for link in chain if str(link)[:4] == "In '"]
    useful = [x for x in lines if x and not x.startswith(("full_key", "object_type", "reference"))]
    return ": ".join([*where[:1], *([key] if key else []), "; ".join(useful)])


def missing_option_message(file: str) -> str:
    """An option that has no file: which group, what there is, what is near."""
    group, _, given = file.removesuffix(".yaml").partition("/")
    if group == "experiment":
        near = did_you_mean(given, list(experiments()))
        return f"There is no experiment `{given}`.{near} There are:\n{experiment_list()}"
    known = options(group)
    if not known:
        return f"There is no configuration group `{group}`.{did_you_mean(group, GROUPS)}"
    return f"There is no {group}={given}.{did_you_mean(given, known)} Use: {', '.join(known)}"


def compose(overrides: Sequence[str]) -> TrainConfig:
    """The configuration that `afferent train <overrides>` would run. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    register()
    refuse_empty_groups(overrides)
    try:
        if GlobalHydra.instance().is_initialized():
            cfg = hydra_compose("train", list(overrides))
        else:
            with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
                cfg = hydra_compose("train", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(config_message(error)) from error
    chosen = [item.split("=", 1)[1] for item in overrides if item.startswith("experiment=")]
    config = to_config(cfg)
    return dataclasses.replace(config, experiment=chosen[-1] if chosen else None)
