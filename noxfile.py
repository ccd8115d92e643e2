"""The tests with the oldest and the newest releases of our libraries: `nox`, or `nox -s lowest -- tests/kernels`.

Each session makes an environment of its own. It takes torch from the package index, on Linux the CUDA build.
"""

import nox

nox.options.default_venv_backend = "uv|virtualenv"


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The releases in constraints/lowest.txt: what pyproject.toml admits at least."""
    _test(session, "constraints/lowest.txt")


@nox.session(python="3.13")
def latest(session: nox.Session) -> None:
    """The releases in constraints/latest.txt."""
    _test(session, "constraints/latest.txt")


def _test(session: nox.Session, constraints: str) -> None:
    session.install("-c", constraints, "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)
