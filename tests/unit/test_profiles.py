"""Profiles: every shipped file is valid, every fault is one sentence that names file and field."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import RequestError
from runtime.profiles import list_profiles, load_profile, parse
from runtime.schema import Profile

CARDS = [
    "rtx4060",
    "rtx4060ti-16gb",
    "rtx4070",
    "rtx4070-ti-super",
    "rtx4080-super",
    "rtx4090",
    "rtx5090",
    "rtx3060-12gb",
    "rtx3090",
    "a6000",
    "l40s",
    "a100",
    "h100",
    "h200",
    "cpu",
    "auto",
]

GOOD: dict[str, Any] = {
    "name": "mine",
    "description": "a card",
    "device": "cuda",
    "dtype": "bf16",
    "quantization": "int8",
    "vram_gb": 24,
    "compute_capability": "8.6",
    "text_encoder": {"stay_on_gpu": True},
    "vae": {"stay_on_gpu": False, "dtype": "fp32"},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """GOOD with the field at the dotted `path` set, or removed for `...`."""
    data: dict[str, Any] = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    owner = data
    for parent in parents:
        owner = owner[parent]
    if value is ...:
        del owner[last]
    else:
        owner[last] = value
    return data


def refusal(data: object) -> str:
    with pytest.raises(RequestError) as caught:
        parse(Profile, yaml.safe_dump(data), "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml")
    assert "\n" not in message
    return message


def test_all_cards_ship_and_validate() -> None:
    assert sorted(CARDS) == list_profiles()
    for name in CARDS:
        profile = load_profile(name)
        assert profile.name == name
        assert (profile.device == "cuda") == (name not in ("cpu", "auto"))


def test_shipped_choices() -> None:
    for name in list_profiles():
        profile = load_profile(name)
        if profile.capability is None:
            continue
        assert profile.quantization == ("fp8" if profile.capability >= (8, 9) else "int8"), name
        # Text encoder (6.3 GiB), blocks (13.1) and decode (5) together: never below 25 GiB.
        assert profile.vram_gb is not None
        assert profile.text_encoder.stay_on_gpu == (profile.vram_gb >= 32), name


def test_values_arrive() -> None:
    profile = parse(Profile, yaml.safe_dump(GOOD), "mine.yaml")
    assert profile.vram_bytes == 24 * 2**30
    assert profile.capability == (8, 6)
    assert profile.text_encoder.stay_on_gpu is True
    assert profile.vae.dtype == "fp32"


def test_frozen() -> None:
    profile = load_profile("rtx4090")
    with pytest.raises(ValueError, match="frozen"):
        profile.dtype = "fp32"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("dtype", "bf61", ["dtype", "'bf61'", "bf16"]),
        ("dtype", ..., ["dtype", "missing"]),
        ("vram_gb", 0, ["vram_gb", "0", "greater than or equal to 1"]),
        ("vram_gb", 1e-200, ["vram_gb", "1e-200"]),
        ("vram_gb", -1.5, ["vram_gb", "-1.5"]),
        ("vram_gb", float("inf"), ["vram_gb", "finite"]),
        ("vram_gb", "24", ["vram_gb", "'24'", "number"]),
        ("vram_gb", True, ["vram_gb", "True"]),
        ("compute_capability", 8.6, ["compute_capability", "8.6", "quotes"]),
        ("compute_capability", "8.6.1", ["compute_capability", "8.6.1"]),
        ("vae.stay_on_gpu", "no way", ["vae.stay_on_gpu", "true or false"]),
        ("vae.dtype", ..., ["vae.dtype", "missing"]),
        ("vae", "on", ["vae", "'on'"]),
        ("text_encoder", None, ["text_encoder", "None"]),
        ("vea", {}, ["'vea'", "did you mean 'vae'"]),
        ("vae.dtpye", "bf16", ["'vae.dtpye'", "did you mean 'dtype'"]),
        ("turbo", 1, ["'turbo'", "the fields here are", "quantization"]),
        ("quantization", "fp8", ["quantization", "8.6", "int8"]),
        ("compute_capability", "7.5", ["dtype is bf16", "7.5", "fp16"]),
        ("device", "cpu", ["vram_gb", "24", "cpu"]),
        ("name", "../x", ["name", "../x"]),
    ],
)
def test_refused(path: str, value: object, told: list[str]) -> None:
    message = refusal(changed(path, value))
    for words in told:
        assert words in message


def test_bf16_decode_needs_ampere() -> None:
    data = changed("compute_capability", "7.5") | {"dtype": "fp16"}
    assert parse(Profile, yaml.safe_dump(data), "mine.yaml").dtype == "fp16"
    data["vae"] = {"stay_on_gpu": False, "dtype": "bf16"}
    assert "vae.dtype is bf16" in refusal(data)


def test_misspelt_field_is_named_before_the_missing_one() -> None:
    data = changed("dtype", ...) | {"dtpye": "bf16"}
    assert "'dtpye'" in refusal(data)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nname: b\n", "line 2: duplicate key 'name'"),
        ("vae:\n  dtype: bf16\n  dtype: fp32\n", "line 3: duplicate key 'dtype'"),
        ("- 1\n", "holds [1]; expected the fields name"),
        ("", "holds None"),
        ("a: [1\n", "correct that line"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: 2020-99-99\n", "mine.yaml"),
        ("&a [*a]", "mine.yaml"),
        ("[" * 5000, "mine.yaml"),
        ("a: \x00", "mine.yaml"),
    ],
)
def test_malformed_yaml(text: str, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(Profile, text, "mine.yaml")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
keys = st.sampled_from(["name", "vae", "dtype", "vram_gb", "stay_on_gpu", "x"]) | st.text(max_size=6)
values = st.recursive(
    scalars | st.sampled_from(["bf16", "fp8", "cuda", "8.9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | scalars, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(keys, values, max_size=6) | values)
def test_nothing_but_request_errors(data: object) -> None:
    refusal(data)  # random data is never a whole profile


@settings(max_examples=80, deadline=None)
@given(
    path=st.sampled_from([*GOOD, "vae.dtype", "vae.stay_on_gpu", "text_encoder.stay_on_gpu"]),
    value=values,
)
def test_one_random_field(path: str, value: object) -> None:
    try:
        profile = parse(Profile, yaml.safe_dump(changed(path, value)), "mine.yaml")
    except RequestError as error:
        assert str(error).startswith("mine.yaml")
        assert path.split(".")[0] in str(error)
    else:
        assert profile.vram_bytes is None or profile.vram_bytes > 0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    with pytest.raises(RequestError):
        parse(Profile, text, "mine.yaml")


def test_own_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert load_profile(path) == load_profile(str(path)) == parse(Profile, yaml.safe_dump(GOOD), "x")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(RequestError, match="name is 'mine'; expected the file's own name, 'other'"):
        load_profile(other)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.yaml: cannot be read"):
        load_profile(tmp_path / "absent.yaml")
    with pytest.raises(RequestError, match="cannot be read"):
        load_profile(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="not UTF-8"):
        load_profile(binary)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (2 << 20))
    with pytest.raises(RequestError, match="larger than"):
        load_profile(large)


@pytest.mark.parametrize("name", ["RTX 4070", "rtx-4070", "4070"])
def test_unknown_profile_names_the_near_one(name: str) -> None:
    with pytest.raises(RequestError, match=r"did you mean .*rtx4070.* `t2v profiles`"):
        load_profile(name)


def test_torch_free() -> None:
    code = "import sys, runtime.profiles, runtime.device; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
