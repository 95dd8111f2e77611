"""The studies, by name. A new one is a module with a `STUDY` and a line here."""

from repro.errors import ReproError, one_of
from repro.studies.base import Exhibit, Results, Study
from repro.studies.narang2017 import STUDY as NARANG2017
from repro.studies.wang2017 import STUDY as WANG2017
from repro.studies.zhu2017 import STUDY as ZHU2017

STUDIES: dict[str, Study] = {study.name: study for study in (NARANG2017, ZHU2017, WANG2017)}


def find(name: str) -> tuple[Study, Exhibit]:
    """The study and exhibit of a name such as "narang2017/table3". Raises ReproError listing what there is."""
    study, slash, exhibit = name.partition("/")
    one_of("study", study, STUDIES)
    if not slash:
        raise ReproError(f"{name!r} names a study: an exhibit is {study}/ and one of {', '.join(STUDIES[study].exhibits)}")
    return STUDIES[study], STUDIES[study].exhibit(exhibit)


def select(names: list[str]) -> list[tuple[Study, Exhibit]]:
    """The exhibits of some names, each a study or one exhibit; all of them for no name."""
    chosen = []
    for name in names or list(STUDIES):
        if name in STUDIES:
            chosen += [(STUDIES[name], exhibit) for exhibit in STUDIES[name].exhibits.values()]
        else:
            chosen.append(find(name))
    return list({(study.name, exhibit.name): (study, exhibit) for study, exhibit in chosen}.values())


__all__ = ["STUDIES", "Exhibit", "Results", "Study", "find", "select"]
