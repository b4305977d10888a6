"""Profiles of cards and manifests of models: found, read, and chosen between.

Both are plain YAML without code, checked to the last field (`runtime.schema`). A key that nobody knows, a
value of the wrong type or two values that exclude each other are told here, in one sentence that names the
file and the field, and never reach the engine.

No torch here: `--help`, `plan` and `doctor` answer at once.
"""

import difflib
import re
import shlex
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from runtime.errors import RequestError, WeightsError
from runtime.schema import ModelFiles, ModelManifest, Profile, Quantization, project_root

DIRECTORY_FAMILY = "wan2.1-t2v-14b-4step"
"""The family whose published layout a bare checkpoint directory is read by (`--model DIR`)."""

FALLBACK: tuple[Quantization, ...] = ("int8", "fp8", "bf16")
"""Which variant stands in for a missing one: 8 bit first, since it fits more cards than 16."""

DIRECTORY_MODEL = "directory"
"""The family of a model that was given as a directory of weights; it has no manifest of its own."""
DEFAULT_MODEL = "wan2.1-t2v-14b-4step"
DEFAULT_WEIGHTS = Path("/weights")
"""Where a container has its weights mounted."""

MAX_YAML_BYTES = 256 << 10
"""No profile or manifest comes near it: a larger file is the wrong file (a checkpoint, a video). PyYAML reads
some hundred kilobytes a second, so this bounds the time too."""

Checked = TypeVar("Checked", Profile, ModelManifest)


# ---------------------------------------------------------------------------------------- reading and errors


class _PlainLoader(yaml.SafeLoader):
    """YAML without what a profile does not need: aliases, and the last of two equal keys winning.

    A kilobyte of aliases that name each other stands for gigabytes of nodes; a key that is there twice is a
    mistake nobody sees.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            problem = f"*{alias.anchor} is an alias, which is not supported; write the value itself"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=alias.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"duplicate key {key.value!r}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(kind: type[Checked], text: str, where: str) -> Checked:
    """The YAML `text` as a `kind`; `where` names the file in the RequestError of anything that is wrong."""
    try:
        data = yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise RequestError(f"{where}{line}: {error.problem}; correct that line.") from error
    except Exception as error:  # on odd scalars PyYAML raises KeyError, OverflowError, AttributeError ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{where}: not readable as YAML ({reason}); correct the file.") from error
    if not isinstance(data, dict):
        raise RequestError(f"{where}: holds {_shown(data)}; expected the fields {_fields(kind)}.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RequestError(_sentence(kind, error, where)) from error


def _sentence(kind: type[BaseModel], error: ValidationError, where: str) -> str:
    """The first fault of a validation as one sentence: file, field, value, what was expected."""
    # An unknown key first: a misspelt field is missing too, and the spelling is the fault.
    first, *rest = sorted(
        error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden"
    )
    path = ".".join(str(part) for part in first["loc"])
    more = f" ({len(rest)} more after it)" if rest else ""
    message = _expectation(first["msg"])
    if first["type"] == "extra_forbidden":
        owner = _model_at(kind, first["loc"][:-1])
        key = str(first["loc"][-1])
        near = difflib.get_close_matches(key, owner.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the fields here are {_fields(owner)}."
        return f"{where}: unknown field {_shown(path)}{more}; {hint}"
    if first["type"] == "missing":
        return f"{where}: field {path!r} is missing{more}; add it."
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{where}: {path + ': ' if path else ''}{message}{more}."
    value = first["input"]
    hint = ""
    if isinstance(value, str) and "number" in message and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I):
        hint = " (YAML takes 1e-6 for text; write 1.0e-6)"
    elif isinstance(value, float) and "string" in message:
        hint = " (write it in quotes)"
    return f"{where}: {path or 'the file'} is {_shown(value)}{more}; expected {message}{hint}."


PLAIN_WORDS = {
    r"^Value error, |^Input should be |^(String|Tuple) should have ": "",
    r"^String should match ": "text of the ",
    r"^Keys should be strings": "the name of a field",
    r"a valid boolean": "true or false",
    r"a valid ": "a ",
}
"""What pydantic says, and how it reads behind "expected"."""


def _expectation(message: str) -> str:
    for pattern, plain in PLAIN_WORDS.items():
        message = re.sub(pattern, plain, message)
    return message


def _model_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that owns the fields at `path` inside `kind`."""
    for part in path:
        field = kind.model_fields.get(str(part))
        annotation = field.annotation if field else None
        inner = [
            a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        kind = inner[0] if inner else kind
    return kind


def _fields(kind: type[BaseModel]) -> str:
    return ", ".join(kind.model_fields)


def _shown(value: object) -> str:
    """A value for a message: at most 60 characters, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read(path: Path) -> str:
    """The text of a small UTF-8 file; RequestError when it is not that."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise RequestError(
                f"{path}: is larger than {MAX_YAML_BYTES} bytes; expected a YAML file of a few lines."
            )
        return content.decode("utf-8")
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be read ({error.strerror}); give a readable YAML file."
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: is not UTF-8 text; expected a YAML file.") from error


def _at_home(path: str | Path) -> Path:
    """`path` with ~ as the shell has it: unchanged where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _load(kind: type[Checked], path: Path) -> Checked:
    loaded = parse(kind, _read(path), str(path))
    if loaded.name != path.stem:
        raise RequestError(f"{path}: name is {loaded.name!r}; expected the file's own name, {path.stem!r}.")
    return loaded


# ------------------------------------------------------------------------------------------------ the shelves


def _shelf(kind: str) -> Path:
    return project_root() / "profiles" / kind


def _unknown(what: str, name: str, known: list[str], how: str) -> RequestError:
    plain = {re.sub(r"[^a-z0-9]", "", other): other for other in known}
    asked = re.sub(r"[^a-z0-9]", "", name.lower())
    near = difflib.get_close_matches(asked, plain, n=3, cutoff=0.5)
    near = near or [key for key in plain if asked and asked in key][:3]  # "wan" is short, but no mistake
    hint = f"did you mean {' or '.join(plain[key] for key in near)}? " if near else ""
    return RequestError(f"No {what} is called {_shown(name)}; {hint}{how}")


def list_profiles() -> list[str]:
    """The names of the profiles that ship with the program, sorted."""
    return sorted(path.stem for path in _shelf("gpus").glob("*.yaml"))


def list_manifests() -> list[str]:
    """The names of the model manifests that ship with the program, sorted."""
    return sorted(path.stem for path in _shelf("models").glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by name (`rtx4070`), or one's own by path (anything with a slash or ending in .yaml).

    `auto` is a profile too; `runtime.device.choose_profile` replaces it by the one that suits the card.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in name or name.endswith((".yaml", ".yml")):
        return _load(Profile, _at_home(name_or_path))
    known = list_profiles()
    if name not in known:
        raise _unknown(
            "profile", name, known, "`t2v profiles` lists them, and a path to a YAML file works too."
        )
    return _load(Profile, _shelf("gpus") / f"{name}.yaml")


def load_manifest(name: str) -> ModelManifest:
    """A shipped manifest by its exact name."""
    known = list_manifests()
    if name not in known:
        raise _unknown("model", name, known, "`t2v models` lists them.")
    manifest = _load(ModelManifest, _shelf("models") / f"{name}.yaml")
    if manifest.quantization is None:
        raise RequestError(f"profiles/models/{name}.yaml: quantization is null; expected fp8, int8 or bf16.")
    return manifest


def _family(name: str) -> dict[Quantization, ModelManifest]:
    """The variants of a family by quantization; empty when there is no such family."""
    manifests = [load_manifest(other) for other in list_manifests()]
    return {m.quantization: m for m in manifests if m.family == name and m.quantization is not None}


def _preferred(variants: dict[Quantization, ModelManifest], wanted: Quantization) -> ModelManifest | None:
    return next((variants[q] for q in (wanted, *FALLBACK) if q in variants), None)


def resolve_model(name: str, profile: Profile) -> ModelManifest:
    """The manifest called `name`, or else the variant of the family `name` that suits the profile.

    Where a name is both (`demo`), the manifest wins. Without the wanted variant: FALLBACK's order.
    """
    known = list_manifests()
    if name in known:
        return load_manifest(name)
    chosen = _preferred(_family(name), profile.quantization)
    if chosen is None:
        families = {load_manifest(other).family for other in known}
        how = "`t2v models` lists them, and a directory of weights works too."
        raise _unknown("model", name, sorted({*known, *families}), how)
    return chosen


def manifest_of(name: str | Path, profile: Profile) -> ModelManifest:
    """What `name` would be, whether or not its files are there: enough to check a request against."""
    return model_from_directory(name, profile) if _is_directory(name) else resolve_model(str(name), profile)


def _is_directory(name: str | Path) -> bool:
    return isinstance(name, Path) or "/" in name or (name not in list_manifests() and Path(name).is_dir())


def find_model(name: str | Path, profile: Profile, weights: Path | None = None) -> tuple[ModelManifest, Path]:
    """The manifest of `name` (see `resolve_model`), or of a checkpoint directory, and where its files are.

    Embedded weights lie where they ship, whatever `weights` says; all others in `weights`, or /weights. Of a
    family, a variant that lies there beats one that does not: who downloaded int8 is not told to get fp8.
    """
    if _is_directory(name):
        return model_from_directory(name, profile), _at_home(name)
    manifest = resolve_model(str(name), profile)
    embedded = manifest.embedded_directory()
    if embedded is not None:
        return manifest, embedded
    directory = DEFAULT_WEIGHTS if weights is None else _at_home(weights)
    if not directory.is_dir():
        raise WeightsError(
            f"The weights directory {directory} does not exist; expected the files of {manifest.name} there: "
            f"download them with `{pull_command(manifest, directory)}`, name their directory with --weights, "
            "or try --model demo, which needs none."
        )
    if name != manifest.name:
        there = {q: m for q, m in _family(manifest.family).items() if _present(m, directory)}
        manifest = _preferred(there, profile.quantization) or manifest
    return manifest, directory


def pull_command(manifest: ModelManifest, directory: Path) -> str:
    """What to type for the files of a published model."""
    return f"t2v weights pull --model {manifest.name} --weights {shlex.quote(str(directory))}"


def model_from_directory(directory: str | Path, profile: Profile) -> ModelManifest:
    """A manifest for weights of one's own that lie in a published layout; sizes are read from the tensors.

    Variant: the one of the profile if it is there (its subdirectory, or its single file), else one that is
    there, else the directory itself taken as a variant directory.
    """
    root = _at_home(directory)
    if not root.is_dir():
        raise RequestError(
            f"{root}: is not a directory; expected a model name (`t2v models`) or a directory of weights."
        )
    family = _family(DIRECTORY_FAMILY)
    chosen = _preferred({q: m for q, m in family.items() if _present(m, root)}, profile.quantization)
    own: dict[str, Any] = {
        "title": f"weights in {root}",
        "licence": "not stated",
        "source": None,
        "embedded": None,
    }
    own |= {
        "name": _as_name(root),
        "family": DIRECTORY_MODEL,
        "transformer": None,
        "text_encoder": None,
        "vae": None,
    }
    if chosen is not None:
        return chosen.model_copy(update=own)
    ordered = [family[q] for q in dict.fromkeys((profile.quantization, *FALLBACK)) if q in family]
    own |= {"subdirectories": (), "quantization": _hinted(root), "files": _any_variant(ordered)}
    return ordered[0].model_copy(update=own)


def _present(manifest: ModelManifest, root: Path) -> bool:
    """Whether the variant's own directory or its single transformer file lies in `root`."""
    named = (root / name for name in manifest.files.transformer if name != ".")
    return any((root / name).is_dir() for name in manifest.subdirectories) or any(
        path.is_file() for path in named
    )


def _any_variant(manifests: list[ModelManifest]) -> ModelFiles:
    """All candidates of several variants, in their order; the directory itself (".") comes last.

    The directory is a variant's own here, so what variants share may also lie in the one around it.
    """
    merged = {
        part: tuple(dict.fromkeys(name for m in manifests for name in getattr(m.files, part)))
        for part in ModelFiles.model_fields
    }
    for part in ("text_encoder", "vae"):
        merged[part] += tuple(f"../{name}" for name in merged[part])
    merged["transformer"] = (*(name for name in merged["transformer"] if name != "."), ".")
    return ModelFiles(**merged)


def _hinted(root: Path) -> Quantization | None:
    """What the names of a variant directory say about its quantization; None when they say nothing."""
    names = [root.resolve().name, *(path.name for path in root.glob("*t5*"))]
    hints = [q for q in FALLBACK if any(q in name for name in names)]
    return hints[0] if len(hints) == 1 else None


def _as_name(root: Path) -> str:
    return re.sub(r"[^a-z0-9._-]", "-", root.resolve().name.lower()).lstrip("._-")[:80] or "weights"
