"""The one exception a user of the package is meant to read."""


class ReproError(Exception):
    """Bad input, a damaged file or a missing corpus, told in one sentence: what, where, what would be right.

    The command line prints the sentence and exits with 2; a notebook shows it as the last line of its traceback.
    """


def one_of(name: str, value: object, allowed) -> None:
    """Raise `ReproError` unless `value` is one of `allowed`; the error names `name` and lists what is allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ReproError(f"unknown {name} {value!r}: choose one of {', '.join(map(str, allowed))}")
