"""Programs whose closing report is their own: test runners, and what builds, lints and installs."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TEST_RUNNERS = frozenset(
    """
    pytest py.test tox nox nose nose2 nosetests unittest trial stestr doctest jest vitest mocha ava karma cypress
    playwright jasmine tap ctest phpunit pest rspec minitest cucumber behave robot prove gotestsum bats busted ginkgo
    mvn mvnw gradle gradlew sbt
    """.split()  # noqa: SIM905 - so many words are read as words
)
_BUILDERS = frozenset(
    """
    make gmake cmake ninja meson cargo rustc gcc g++ clang clang++ javac ant go tsc dotnet swift bazel npm pnpm yarn bun
    pip pip3 uv poetry pdm conda mamba composer bundle gem build mypy pyright ruff black isort flake8 pylint eslint
    prettier biome
    """.split()  # noqa: SIM905
)
# These run what their arguments name.
_TASK_RUNNERS = _BUILDERS | frozenset(
    """
    just task rake rails mix deno dart flutter stack cabal zig lein php hatch invoke xcodebuild coverage manage.py buck
    buck2 node
    """.split()  # noqa: SIM905
)
_INTERPRETERS = frozenset(("python", "python3", "bash", "sh", "zsh", "node", "ruby", "perl", "php", "deno", "bun"))
_TEST_WORDS = frozenset(
    ("test", "tests", "check", "checks", "spec", "specs", "runtests", "unittest", "unittests", "nextest", "verify")
)
_BUILD_WORDS = frozenset(("build", "lint", "compile", "install"))
_PART = re.compile(r"[^\W_]+")


def runs_tests(words: Sequence[str]) -> bool:
    """Whether a command (its program and arguments) runs tests."""
    return _is_one(words, _TEST_RUNNERS, _TEST_WORDS)


def reports(words: Sequence[str]) -> bool:
    """Whether a command tests, builds, lints or installs."""
    return runs_tests(words) or _is_one(words, _BUILDERS, _BUILD_WORDS)


def _is_one(words: Sequence[str], programs: frozenset[str], names: frozenset[str]) -> bool:
    if not words:
        return False
    name, *rest = words
    if name in programs:
        return True
    if name in _INTERPRETERS and "-m" in rest[:-1]:
        name = rest[rest.index("-m") + 1]
        return name in programs or _is_named(name, names)
    plain = [word for word in rest if not word.startswith("-")]
    if name in _INTERPRETERS:  # a script, and its task: `python manage.py test`
        if "-c" in rest or "-e" in rest:
            return False
        name, plain = (plain[0], plain[1:]) if plain else ("", [])
        name = name.rpartition("/")[2]
    if _is_named(name, names):
        return True
    return name in _TASK_RUNNERS and any(word in programs or _is_named(word, names) for word in plain[:2])


def _is_named(word: str, names: frozenset[str]) -> bool:
    """Whether a word is named so: `test`, `run_tests.sh`, `test:unit`."""
    return not names.isdisjoint(_PART.findall(word[:200].rpartition("/")[2].lower()))
