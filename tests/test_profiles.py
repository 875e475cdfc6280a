"""Profiles: YAML 1.2, repeated keys, encodings and messages."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reproduction.profiles import load_profile, read_yaml

ROOT = Path(__file__).parents[1]
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))
SMOKE = ROOT / "notebooks" / "profiles" / "smoke.yaml"


@pytest.fixture
def path(tmp_path):
    """A copy of a profile that a test can damage."""
    path = tmp_path / "smoke.yaml"
    path.write_bytes(SMOKE.read_bytes())
    return path


def edit(path, key, lines, encoding="utf-8"):
    """Write other lines in the place of the one of a key; return the number of the first."""
    text = path.read_text(encoding="utf-8")
    (match,) = re.finditer(rf"^{key}:.*", text, re.MULTILINE)
    path.write_bytes(f"{text[: match.start()]}{lines}{text[match.end() :]}".encode(encoding))
    return text[: match.start()].count("\n") + 1


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.stem)
def test_committed_profiles_mean_the_same_in_both_versions_of_yaml(profile):
    assert read_yaml(profile) == yaml.safe_load(profile.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("016", 16),
        ("0o16", 14),
        ("0x1F", 31),
        ("+7", 7),
        ("-0", 0),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("0o8", "0o8"),
        ("-0o7", "-0o7"),
        ("\u0663", "\u0663"),  # a digit, but not an ASCII one
        ("1e3", 1000.0),
        ("1.", 1.0),
        ("-.5E-1", -0.05),
        ("-.inf", float("-inf")),
        *((word, word) for word in ("no", "No", "yes", "on", "OFF", "y", "n", "tRue", "nUll", "2024-01-01", "=", "<<")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, None) for word in ("~", "null", "Null", "NULL", "")),
        ("'016'", "016"),
        ("!!str 016", "016"),
        ("!!int '016'", 16),
        ("!!float .5", 0.5),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path, text, value):
    path = tmp_path / "p.yaml"
    path.write_text(f"key: {text}\nlist: [{text or '~'}]\n", encoding="utf-8")
    found = read_yaml(path)
    assert found == {"key": value, "list": [value]}
    assert type(found["key"]) is type(value)


@given(st.integers(), st.booleans(), st.integers(0, 3), st.sampled_from(["", "+"]))
@settings(max_examples=50, deadline=None)
def test_integers_are_decimal_whatever_their_zeros(tmp_path_factory, number, negative, zeros, plus):
    path = tmp_path_factory.mktemp("yaml") / "p.yaml"
    number = abs(number)
    path.write_text(f"{'-' if negative else plus}{'0' * zeros}{number}")
    assert read_yaml(path) == (-number if negative else number)


@given(st.floats(allow_nan=False))
@settings(max_examples=50, deadline=None)
def test_floats_are_read_as_python_writes_them(tmp_path_factory, number):
    path = tmp_path_factory.mktemp("yaml") / "p.yaml"
    path.write_text(repr(number).replace("inf", ".inf"))
    assert read_yaml(path) == number


def test_numbers_of_a_profile_are_decimal(path):
    edit(path, "utterances", "utterances: 016")
    edit(path, "seed", "seed: 010")
    profile = load_profile(path)
    assert (profile["utterances"], profile["seed"]) == (16, 10)
    edit(path, "utterances", "utterances: 0o16")
    assert load_profile(path)["utterances"] == 14


def test_norwegian_is_a_language(path):
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    directions = ", ".join(f"{model}: [no, en-no]" for model in profile.pop("directions"))
    path.write_text(f"{yaml.safe_dump(profile)}\ndirections: {{{directions}}}\n")
    assert all(value == ["no", "en-no"] for value in load_profile(path)["directions"].values())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("utterances", "1:30", "utterances must be of type int, not '1:30'."),
        ("utterances", "2_0", "utterances must be of type int, not '2_0'."),
        ("utterances", "1e3", "utterances must be of type int, not 1000.0."),
        ("utterances", "yes", "utterances must be of type int, not 'yes'."),
        ("utterances", "true", "utterances must be of type int, not True."),
        ("utterances", "{base: 2}", "utterances must be a number, or one for each of base, small."),
        ("utterances", "{base: 2, small: 0}", "utterances must be at least 1, not 0."),
        ("utterances", "{base: 2, small: x}", "utterances must be at least 1, not 'x'."),
        ("seed", "0\ncompared: [windows]", "compared must be of type dict, not ['windows']."),
        (
            "seed",
            "0\ncompared: {windows: 0}",
            "compared must give numbers of masks for partitions among superpixels, spread, windows other than "
            "superpixels, and not windows: 0.",
        ),
        (
            "seed",
            "0\ncompared: {superpixels: 5}",
            "compared must give numbers of masks for partitions among superpixels, spread, windows other than "
            "superpixels, and not superpixels: 5.",
        ),
        ("device", "false", "device must be of type str, not False."),
        ("device", "016", "device must be of type str, not 16."),
        ("device", "", "device must be of type str, not None."),
        ("input_p", ".nan", "input_p is a masking probability between 0 and 1, not nan."),
    ],
)
def test_a_wrong_value_is_reported_as_it_is_written(path, key, value, message):
    edit(path, key, f"{key}: {value}")
    with pytest.raises(ValueError) as caught:
        load_profile(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("key", "lines", "line", "problem"),
    [
        ("device", "device: cpu\nseed: 010", 2, "the key 'seed' is repeated"),
        ("device", "device: cpu\n'seed': 1", 2, "the key 'seed' is repeated"),
        ("directions", "directions:\n  base: [it]", 3, "the key 'base' is repeated"),
        ("device", "device: {a: 1, a: 1}", 1, "the key 'a' is repeated"),
        ("device", "? [a]\n: 1", 1, "a key must be a text or a number"),
        ("device", "device: *cpu", 1, "found undefined alias 'cpu'"),
        ("device", "device: cpu\n--- 1", 2, "but found another document"),
        ("device", "device: !!python/name:os.system", 1, "could not determine a constructor for the tag"),
        ("device", "device: !!set {cpu}", 1, "could not determine a constructor for the tag"),
        ("device", "device: !!map cpu", 1, "a mapping is needed here"),
        ("utterances", "utterances: !!int two", 1, "'two' is not of the type int"),
        ("utterances", f"utterances: {'9' * 5000}", 1, f"'{'9' * 40}' is not of the type int"),
        ("device", "device: c\x01pu", None, "unacceptable character #x0001"),
        ("device", f"device: {'[' * 1000}", None, "it is nested too deeply"),
    ],
)
def test_a_fault_of_yaml_names_the_file_and_the_line(path, key, lines, line, problem):
    first = edit(path, key, lines)
    where = str(path) if line is None else f"{path} line {first + line - 1}"
    with pytest.raises(ValueError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.startswith(f"{where} is not valid YAML ({problem}") and message.endswith("): correct it there.")
    assert "\n" not in message


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-32"])
def test_another_encoding_is_refused_with_the_name_of_the_file(path, encoding):
    line = edit(path, "seed", "seed: 0  # d\u00e9part", encoding)
    if encoding.startswith("utf"):
        line = 1
    message = rf"^{re.escape(str(path))} is not encoded in UTF-8 \(see line {line}\): save it again in UTF-8\.$"
    with pytest.raises(ValueError, match=message):
        load_profile(path)


def test_a_byte_order_mark_is_accepted(path):
    edit(path, "seed", "seed: 3  # d\u00e9part", "utf-8-sig")
    assert load_profile(path)["seed"] == 3


@pytest.mark.parametrize("content", ["", "# nothing", "- profile", "smoke", "null"])
def test_a_profile_is_a_mapping(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must be a mapping with the keys profile, data, "):
        load_profile(path)


def test_a_profile_that_cannot_be_opened(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no profile .*absent\.yaml; profiles in .*: smoke\."):
        load_profile(tmp_path / "absent.yaml")
    with pytest.raises(OSError, match=r"cannot be read \(Is a directory\): check the path and its permissions\."):
        load_profile(tmp_path)
