"""Profiles: YAML files in notebooks/profiles that define a run, with its models, directions and parameters."""

import re
from collections.abc import Hashable
from pathlib import Path

import yaml
from yaml.constructor import ConstructorError

from xattn.analysis.faithfulness import percentages
from xattn.attribution.segments import PARTITIONS
from xattn.explain import Occlusion
from xattn.models import HUB_ID

OCCLUSION = (
    *("input_masks", "encoder_masks", "input_p", "encoder_p", "seed"),
    *("precision", "estimator", "reliability", "partition"),
)

PROFILE_KEYS = {
    "profile": str,
    "data": str,
    "models": dict,
    "directions": dict,
    "split": str,
    "utterances": int,
    "input_masks": int,
    "encoder_masks": int,
    "input_p": float,
    "encoder_p": float,
    "seed": int,
    "precision": str,
    "estimator": str,
    "reliability": float,
    "partition": str,
    "deletion_step": int,
    "device": str,
}
RELEASED_KEYS = {"profile": str, "data": str, "released": str, "directions": dict}
# Optional keys with their defaults: models that are not run if their folders do not exist, the results of a longer run
# of the same models, the partitions to compare with and their numbers of masks, notebooks to run beside the usual ones,
# the conditions that 43_methods judges and their numbers of utterances, the number of these that it explains again,
# whether the paper's notebooks run, and the frames per encoder step of released maps.
PROFILE_DEFAULTS = {
    "optional": [],
    "reference": "",
    "compared": {},
    "beyond": [],
    "judged": {},
    "checked": 4,
    "paper": True,
}
RELEASED_DEFAULTS = {"subsampling": 4, "reference": ""}


class Yaml12Loader(yaml.SafeLoader):
    """Reads YAML with the scalars of YAML 1.2's core schema; a key that is repeated in a mapping is an error.

    PyYAML follows YAML 1.1, in which 016 is 14, 1:30 is 90, and no, yes, on and off are booleans.
    """

    yaml_implicit_resolvers = {}
    yaml_constructors = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "a mapping is needed here", node.start_mark)
        mapping = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "a key must be a text or a number", key_node.start_mark)
            if key in mapping:
                raise ConstructorError(None, None, f"the key {key!r} is repeated", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_core_scalar(self, node: yaml.ScalarNode) -> object:
        """The value of a scalar of one of the types in SCALARS."""
        name, text = node.tag.rpartition(":")[2], self.construct_scalar(node)
        pattern, value, _ = SCALARS[name]
        try:
            if pattern.fullmatch(text):
                return value(text)
        except ValueError:  # an integer of more digits than Python converts
            pass
        raise ConstructorError(None, None, f"{text[:40]!r} is not of the type {name}", node.start_mark)


# Pattern, constructor and first characters of each type of scalar (YAML 1.2.2, section 10.3.2).
SCALARS = {
    "null": (re.compile(r"~|null|Null|NULL|"), lambda text: None, ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true", [*"tTfF"]),
    "int": (
        re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
        lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
        [*"-+0123456789"],
    ),
    "float": (
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII
        ),
        lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower())),
        [*"-+0123456789."],
    ),
}
for name, (pattern, _, first) in SCALARS.items():
    tag = f"tag:yaml.org,2002:{name}"
    Yaml12Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern.pattern})\Z"), first)
    Yaml12Loader.add_constructor(tag, Yaml12Loader.construct_core_scalar)
for name, construct in (
    ("str", Yaml12Loader.construct_yaml_str),
    ("seq", Yaml12Loader.construct_yaml_seq),
    ("map", Yaml12Loader.construct_yaml_map),
):
    Yaml12Loader.add_constructor(f"tag:yaml.org,2002:{name}", construct)
Yaml12Loader.add_constructor(None, Yaml12Loader.construct_undefined)


def read_yaml(path: Path) -> object:
    """The content of a YAML 1.2 file in UTF-8. ValueError, OSError: one sentence that names the file."""
    try:
        return yaml.load(path.read_bytes().decode("utf-8-sig"), Yaml12Loader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not encoded in UTF-8 (see line {line}): save it again in UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        where = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where} is not valid YAML ({' '.join(problem.split())}): correct it there.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())}): correct it there.") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid YAML (it is nested too deeply): correct it there.") from None


def load_profile(path: Path) -> dict:
    """Read and check a profile. ValueError, OSError: one sentence that names the file and the key."""
    try:
        profile = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"There is no profile {path}; profiles in {path.parent}: {known}.") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from None
    if not isinstance(profile, dict):
        raise ValueError(f"{path} must be a mapping with the keys {', '.join(PROFILE_KEYS)}.")
    released = "released" in profile
    keys, defaults = (RELEASED_KEYS, RELEASED_DEFAULTS) if released else (PROFILE_KEYS, PROFILE_DEFAULTS)
    for key in [*profile, *keys]:
        if key not in keys | defaults or key not in profile:
            what = "is missing" if key in keys else "is unknown"
            raise ValueError(
                f"{path}: the key {key!r} {what}; a profile has exactly {', '.join(keys)}, and can have "
                f"{', '.join(defaults)}."
            )
    profile = defaults | profile
    for key, kind in (keys | {key: type(value) for key, value in defaults.items()}).items():
        each_model = key == "utterances" and isinstance(profile[key], dict)
        if type(profile[key]) is not kind and not each_model:
            raise ValueError(f"{path}: {key} must be of type {kind.__name__}, not {profile[key]!r}.")
    if released:
        profile["models"] = {model: f"{profile['released']}/{model}" for model in profile["directions"]}
        if profile["subsampling"] < 1:
            raise ValueError(f"{path}: subsampling must be at least 1, not {profile['subsampling']}.")
    else:
        _check_numbers(profile, path)
    if profile["profile"] != path.stem:
        raise ValueError(f"{path}: profile must be the file's own name, {path.stem!r}, not {profile['profile']!r}.")
    if not profile["models"] or set(profile["models"]) != set(profile["directions"]):
        raise ValueError(f"{path}: models and directions must name the same models, at least one.")
    optional = profile.get("optional", [])
    if not set(map(str, optional)) < set(profile["models"]):
        raise ValueError(f"{path}: optional must list some models of the profile, but not all, and not {optional!r}.")
    for model, directions in profile["directions"].items():
        if not re.fullmatch(r"[\w.-]+", str(model)):
            raise ValueError(f"{path}: the model name {model!r} must be letters, digits, dots, dashes, underscores.")
        folder = profile["models"][model]
        hub = HUB_ID.fullmatch(str(folder))
        if not isinstance(folder, str) or (hub["own"] if hub else Path(folder).name) != model:
            raise ValueError(f"{path}: models: {model} must have the name of its folder, {folder!r}.")
        valid = isinstance(directions, list) and all(re.fullmatch(r"[a-z]+(-[a-z]+)?", str(d)) for d in directions)
        if not valid or not directions or len(set(directions)) < len(directions):
            raise ValueError(
                f"{path}: directions: {model} must list directions such as en or en-it, each once, not {directions!r}."
            )
    conditions = [f"{model}/{each}" for model, own in profile["directions"].items() for each in own]
    for condition, number in profile.get("judged", {}).items():
        if condition not in conditions or type(number) is not int or number < 1:
            raise ValueError(
                f"{path}: judged must give numbers of utterances for some of {', '.join(conditions)}, and not "
                f"{condition}: {number!r}."
            )
    return profile


def _check_numbers(profile: dict, path: Path) -> None:
    given = profile["utterances"]
    if isinstance(given, dict) and set(given) != set(profile["models"]):
        raise ValueError(f"{path}: utterances must be a number, or one for each of {', '.join(profile['models'])}.")
    for number in given.values() if isinstance(given, dict) else [given]:
        if type(number) is not int or number < 1:
            raise ValueError(f"{path}: utterances must be at least 1, not {number!r}.")
    for kind, number in profile["compared"].items():
        if kind not in PARTITIONS or kind == profile["partition"] or type(number) is not int or number < 1:
            raise ValueError(
                f"{path}: compared must give numbers of masks for partitions among {', '.join(PARTITIONS)} other than "
                f"{profile['partition']}, and not {kind}: {number!r}."
            )
    if profile["checked"] < 0:
        raise ValueError(f"{path}: checked must be a number of utterances, 0 or more, and not {profile['checked']}.")
    for key in ("input_p", "encoder_p"):
        if not 0 < profile[key] < 1:
            raise ValueError(f"{path}: {key} is a masking probability between 0 and 1, not {profile[key]}.")
    try:
        percentages(profile["deletion_step"])
        Occlusion(**{key: profile[key] for key in OCCLUSION})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def without_absent(profile: dict, root: Path) -> dict:
    """The profile without its optional models whose folders do not exist; its key `not_run` lists them."""
    absent = [
        model
        for model in profile.get("optional", [])
        if not (HUB_ID.fullmatch(profile["models"][model]) or (root / profile["models"][model]).is_dir())
    ]
    kept = {
        key: {model: value for model, value in profile[key].items() if model not in absent}
        for key in ("models", "directions")
    }
    return profile | kept | {"not_run": absent}


def require_inputs(profile: dict, root: Path) -> None:
    """Raise FileNotFoundError if the corpus or a model's folder does not exist; hub models are downloaded later."""
    for model, folder in profile["models"].items():
        on_hub = "released" not in profile and HUB_ID.fullmatch(folder)
        if not (on_hub or (root / folder).is_dir()):
            raise FileNotFoundError(
                f"Profile {profile['profile']}: the folder {folder!r} of models: {model} does not exist; put it there."
            )
    if not any(p.is_file() for p in (root / profile["data"]).glob("*")):
        raise FileNotFoundError(
            f"Profile {profile['profile']}: the corpus folder {profile['data']!r} does not exist or holds no manifest."
        )
