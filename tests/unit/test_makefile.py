"""What README, docs and `make help` promise exists: targets, verbs, options, settings, services, links."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from entrypoint.cli import DEFAULT_VERB, ENVIRONMENT, cli

ROOT = Path(__file__).resolve().parents[2]
FRONT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in FRONT), *sorted((ROOT / "docs").glob("*.md"))]
ENDS = ("|", "||", "&&", ";", ">", "&")  # of a command, in a shell's line
# Options that pages name alone and that are another program's, and whose.
FOREIGN = {"--gpus": "docker", "--require-hashes": "pip", "--env": "sky"}


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> Iterator[str]:
    """The pieces of a page that are code: fenced and indented blocks, one line at a time, and `spans`.

    A line that ends in a backslash comes joined to the next one.
    """
    fenced: list[str] = []

    def keep(match: re.Match[str]) -> str:
        fenced.append(match[2])
        return "\n"

    rest = re.sub(r"^( *)```[^\n]*\n(.*?)^ *```$", keep, text, flags=re.M | re.S)
    blocks = [*fenced, *re.findall(r"(?:^(?: {4}|\t).*\n?)+", rest, flags=re.M)]
    for block in blocks:
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    prose = re.sub(r"(?:^(?: {4}|\t).*\n?)+", "\n", rest, flags=re.M)
    yield from (span.replace("\\|", "|").replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose))


def words(line: str) -> list[str]:
    """The words of a shell line without its comment; none for what a shell could not read."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def commands(text: str, program: str) -> Iterator[list[str]]:
    """What follows `program` on every code line, up to the end of that command."""
    for line in code(text):
        found = words(line)
        for place, word in enumerate(found):
            if word == program or word.endswith(f"/{program}"):
                after = found[place + 1 :]
                end = next((n for n, one in enumerate(after) if one in ENDS), len(after))
                yield after[:end]


def targets() -> dict[str, str]:
    """Each target of the Makefile that a person may call, with its line of help."""
    text = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^([a-z0-9][a-z0-9-]*):(?!=)(.*)$", text, flags=re.M))


def options_of(command: click.Command) -> set[str]:
    params = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    return {name for one in params for name in (*one.opts, *one.secondary_opts)} | {"--help", "-h"}


def every_command(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        yield command
        if isinstance(command, click.Group):
            yield from every_command(command)


def resolve(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `t2v ARGUMENTS` runs, and what it is given; AssertionError for an unknown verb."""
    if not arguments or arguments[0].startswith("-"):
        own = bool(arguments) and arguments[0] in options_of(cli)
        return (cli if own else cli.commands[DEFAULT_VERB]), arguments
    command: click.Command = cli
    rest = list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        verb = rest.pop(0).rstrip(",.;:")
        known = ", ".join(command.commands)
        assert verb in command.commands, f"t2v {' '.join(arguments)}: {verb!r} is none of {known}"
        command = command.commands[verb]
    return command, rest


def options_in(module: Path) -> set[str]:
    """What a module of ours that parses its own command line accepts."""
    text = module.read_text() if module.exists() else ""
    return set(re.findall(r"add_argument\(\s*[\"'](--[a-z-]+)[\"']", text)) | {"--help"}


def is_a_command_line(arguments: list[str]) -> bool:
    """Not `t2v` in a sentence, nor a pattern such as `t2v <verb>` or `t2v ...`."""
    return bool(arguments) and re.fullmatch(r"-{1,2}[a-z].*|[a-z][a-z-]*", arguments[0]) is not None


# --- make -------------------------------------------------------------------------------------------------


def test_make_alone_explains_every_target() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    explained = dict(re.findall(r"^  make (\S+) +(\S.*)$", shown, flags=re.M))
    assert set(explained) == set(targets())
    assert all(len(line) > 10 for line in explained.values())


def test_every_target_is_phony() -> None:
    phony = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(targets()) == set(" ".join(phony).split())


@pytest.mark.parametrize("target", sorted(targets()))
def test_make_can_read_a_target_and_what_it_needs(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_targets_that_a_page_names_exist(page: Path) -> None:
    for line in code(page.read_text()):
        found = words(line)
        if found[:1] == ["make"]:
            named = {word for word in found[1:] if re.fullmatch(r"[a-z0-9-]+", word)}
            assert named <= set(targets()), f"{page_name(page)}: {line}"


# --- t2v --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_verbs_and_options_that_a_page_shows_exist(page: Path) -> None:
    for arguments in commands(page.read_text(), "t2v"):
        if not is_a_command_line(arguments):
            continue
        command, rest = resolve(arguments)
        shown = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert shown <= options_of(command), f"{page_name(page)}: t2v {' '.join(arguments)}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_that_stand_alone_exist(page: Path) -> None:
    ours = options_of(cli).union(*map(options_of, every_command(cli)))
    ours |= set().union(*map(options_in, [*ROOT.glob("demo/*.py"), *ROOT.glob("tests/*/*.py")]))
    for line in code(page.read_text()):
        if line.startswith("--"):
            shown = set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", line))
            assert shown <= ours | set(FOREIGN), f"{page_name(page)}: `{line}`"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_modules_that_a_page_runs_exist(page: Path) -> None:
    for program in ("python", "python3"):
        for arguments in commands(page.read_text(), program):
            name = arguments[arguments.index("-m") + 1] if "-m" in arguments else ""
            if name.split(".")[0] not in ("demo", "tests", "entrypoint"):
                continue  # pytest, pip: others' modules
            path = ROOT.joinpath(*name.split("."))
            module = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert module.is_file(), f"{page_name(page)}: python -m {name}"
            shown = {word.split("=")[0] for word in arguments if word.startswith("--")}
            assert shown <= options_in(module), f"{page_name(page)}: python {' '.join(arguments)}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    known = {one.name.upper() for command in every_command(cli) for one in command.params if one.name}
    named = set(re.findall(rf"\b{ENVIRONMENT}_([A-Z][A-Z0-9_]*[A-Z0-9])\b", page.read_text()))
    assert named - {"OPTION"} <= known, page_name(page)


def test_what_is_not_there_is_noticed() -> None:
    with pytest.raises(AssertionError, match="'sing' is none of"):
        resolve(["weights", "sing"])
    line = list(commands("Run `sudo .venv/bin/t2v --sed 7 | cat` now.", "t2v"))
    assert line == [["--sed", "7"]] and "--sed" not in options_of(resolve(line[0])[0])
    text = "    t2v decode \\\n        a.safetensors   # twice\n\n```sh\nt2v models\n```\n| `t2v a\\|b` |\n"
    assert list(commands(text, "t2v")) == [["models"], ["decode", "a.safetensors"], ["a|b"]]


# --- compose ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_services_that_a_page_runs_exist(page: Path) -> None:
    for arguments in commands(page.read_text(), "docker"):
        if arguments[:2] == ["compose", "run"]:
            service = next(word for word in arguments[2:] if not word.startswith("-"))
            assert service in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"], page_name(page)


# --- links ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the forges make them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page_name(page)}: {target}"
        assert goal.is_relative_to(ROOT), f"{page_name(page)}: {target} leaves the repository"
        if anchor:
            assert anchor in anchors(goal), f"{page_name(page)}: {target}"
