"""A LightX2V configuration (JSON) in this program's own words: read, translated key by key, or refused.

    translation = translate(read(Path("wan_t2v_distill_fp8_4step_cfg.json")), sampling)
    translation.options     {"height": 480, "width": 832, "frames": 81, "sampler": "euler", ...}
    translation.profile     {"text_encoder.stay_on_gpu": False}: what it changes in the card's profile

A configuration stands for LightX2V's picture, so beside its keys two settings come with it: the `euler` rule,
which is what LightX2V's scheduler computes today, and noise drawn on the GPU, as LightX2V draws it.

No torch here: `t2v explain` answers at once.
"""

import difflib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from runtime.errors import RequestError
from runtime.lightx2v.keys import KEYS
from runtime.lightx2v.rules import Context, Outcome, Status
from runtime.profiles import DIRECTORY_FAMILY, load_profile, resolve_model
from runtime.schema import Profile, Sampling

MAX_BYTES = 1 << 20
MAX_KEYS = 300
MAX_DEPTH = 16
"""LightX2V's configurations have some twenty keys and two levels: what is far larger is another file."""

SHOWN = 60  # characters of a value in a message
UNKNOWN_SHOWN = 5  # keys

IMPLIED = (
    (
        "(its scheduler)",
        "sampler",
        "euler",
        "what LightX2V computes today; lcm is the model card's",
    ),
    ("(its noise)", "noise_device", "cuda", "LightX2V draws on the GPU; on a CPU it is drawn there"),
)


@dataclass(frozen=True)
class Entry:
    """One key and what becomes of it; the columns of `t2v explain`."""

    key: str
    value: Any
    outcome: Outcome
    implied: bool = False  # by the file as a whole: the value of no key

    @property
    def status(self) -> Status:
        return self.outcome.status

    def sentence(self, name: str | None = None) -> str:
        """`KEY is VALUE: why`, with another name for the key where the user knows it by one."""
        return f"{shown_key(name or self.key)} is {shown(self.value)}: {self.outcome.why}"


@dataclass(frozen=True)
class Translation:
    """All entries, and what they come to: options of `t2v generate`, and fields of the profile (dotted)."""

    entries: tuple[Entry, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)

    def faults(self, accept_nonstandard: bool = False) -> list[Entry]:
        """The entries that keep it from running; `accept_nonstandard` lets pass what can be tried."""
        bad: tuple[Status, ...] = ("refused",)
        if not accept_nonstandard:
            bad += ("unknown", "nonstandard")
        return [entry for status in bad for entry in self.entries if entry.status == status]

    def refuse(self, where: str, accept_nonstandard: bool = False) -> None:
        """RequestError for the first fault, if there is one; `where` names the file."""
        faults = self.faults(accept_nonstandard)
        if not faults:
            return
        first, *rest = faults
        more = f" ({len(rest)} more after it)" if rest else ""
        if first.status == "unknown":
            keys = [f"{shown_key(entry.key)} ({entry.outcome.why})" for entry in faults[:UNKNOWN_SHOWN]]
            more = f" and {len(faults) - UNKNOWN_SHOWN} more" if len(faults) > UNKNOWN_SHOWN else ""
            raise RequestError(
                f"{where}: unknown: {', '.join(keys)}{more}; correct them, or add --accept-nonstandard to "
                "run without them."
            )
        how = "remove the key, or correct it"
        if first.status == "nonstandard":
            how = "correct it, or add --accept-nonstandard to try"
        raise RequestError(f"{where}: {first.sentence()}{more}; {how}.")

    def wishes(self) -> list[Entry]:
        """What was asked for and has no effect here, worth a warning."""
        return [entry for entry in self.entries if entry.outcome.wish]

    def command(self) -> str:
        """The command line that does the same, as a shell takes it; the profile's fields have no option."""
        words = ["t2v"]
        for name, value in self.options.items():
            # With an equals sign, so that a value that begins with a hyphen is a value.
            text = str(value)
            option = f"--{name.replace('_', '-')}"
            words += [f"{option}={text}"] if text.startswith("-") else [option, text]
        if any(entry.status == "nonstandard" for entry in self.entries):
            words.append("--accept-nonstandard")
        return " ".join(shlex.quote(word) for word in words)


# --------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. RequestError for anything else, with the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{path}: cannot be read ({reason}); give a JSON file of LightX2V's.") from error
    if len(content) > MAX_BYTES:
        raise RequestError(f"{path}: is larger than {MAX_BYTES} bytes; expected a JSON file of a few lines.")
    try:
        return parse(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: is not UTF-8 text; expected a JSON file.") from error


def parse(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` names it in the RequestError of anything that is wrong."""
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        reason = f"{error.msg[:1].lower()}{error.msg[1:]}"
        raise RequestError(f"{where}: {place}: {reason}; correct it (JSON has no comments).") from error
    except (ValueError, RecursionError) as error:  # duplicate keys, NaN, a number of 5000 digits, [[[[...
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise RequestError(f"{where}: {reason}; correct the file.") from error
    if not isinstance(data, dict):
        raise RequestError(f"{where}: holds {shown(data)}; expected an object of LightX2V's keys.")
    if len(data) > MAX_KEYS:
        raise RequestError(f"{where}: has {len(data)} keys; expected a few dozen of LightX2V's.")
    _check_depth(data, where)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json lets the last of two equal keys win, which is a mistake that nobody sees.
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown_key(key)} stands there twice")
        found[key] = value
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:SHOWN]} is too large")
    return number


def _check_depth(data: object, where: str) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        children = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        if not children:
            return
        level = children
    raise RequestError(f"{where}: nested more than {MAX_DEPTH} deep; expected an object of LightX2V's keys.")


# ----------------------------------------------------------------------------------------------- translating


def default_sampling() -> Sampling:
    """The sampling of the 4-step model, whose configurations these are."""
    return resolve_model(DIRECTORY_FAMILY, load_profile("auto")).sampling


def translate(config: Mapping[str, Any], sampling: Sampling) -> Translation:
    """What becomes of each key of `config` for a model that is sampled so. Never raises."""
    sound = {
        name: value
        for name, value in config.items()
        if name in KEYS and value is not None and KEYS[name].wanted.fits(value)
    }
    context = Context(sound, sampling)
    entries: list[Entry] = []
    options: dict[str, Any] = {}
    profile: dict[str, Any] = {}
    for name, value in config.items():
        outcome = _outcome(name, value, context)
        contradicted = [
            f"{_flag(what)} {shown(known[what])}"
            for new, known in ((outcome.options, options), (outcome.profile, profile))
            for what in new
            if what in known and known[what] != new[what]
        ]
        if contradicted:
            outcome = Outcome("refused", "", f"another key says {', '.join(contradicted)}: leave one out")
        options |= outcome.options
        profile |= outcome.profile
        entries.append(Entry(name, value, outcome))
    if sampling.distilled:
        for name, what, value, why in IMPLIED:
            options[what] = value
            entries.append(Entry(name, None, Outcome("used", _flag(what), why, {what: value}), implied=True))
    return Translation(tuple(entries), options, profile)


def _outcome(name: str, value: Any, context: Context) -> Outcome:
    key = KEYS.get(name)
    if key is None:
        near = difflib.get_close_matches(name, KEYS, n=2, cutoff=0.7) if len(name) <= 80 else []
        hint = f"did you mean {' or '.join(near)}?" if near else "nothing is known to be called so"
        return Outcome("unknown", "", hint)
    if value is None:
        return Outcome("moot", "", "null: not set")
    if not key.wanted.fits(value):
        return Outcome("refused", "", f"expected {key.wanted.words}")
    return key.rule(value, context)


def _flag(name: str) -> str:
    return name if "." in name else f"--{name.replace('_', '-')}"


# ----------------------------------------------------------------------------------------------- the profile


def changed_profile(profile: Profile, changes: Mapping[str, Any]) -> Profile:
    """A copy of `profile` with the fields in `changes` (dotted) set so; RequestError if they clash."""
    data = profile.model_dump()
    for name, value in changes.items():
        owner, _, leaf = name.rpartition(".")
        (data[owner] if owner else data)[leaf] = value
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        asked = ", ".join(f"{name}: {shown(value)}" for name, value in changes.items())
        raise RequestError(f"The profile {profile.name} cannot have {asked}: {reason}.") from error


# ---------------------------------------------------------------------------------------------------- showing


def shown(value: object) -> str:
    """A value as JSON has it, on one line, printable on every terminal, at most SHOWN characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except ValueError:  # a list that contains itself, from Python
        text = repr(value)
    return _printable(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


def shown_key(key: str) -> str:
    """A key for a message: as it is if it reads like a name, else quoted and cut."""
    plain = len(key) <= SHOWN and key.isprintable() and key and " " not in key
    return key if plain else shown(key)


def _printable(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )
