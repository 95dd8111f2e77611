"""`repro list · plan · run · figures · report · publish · data · doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from repro.errors import ReproError

PROFILES = ("smoke", "laptop", "paper")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status.

    0, 2 for a ReproError (one sentence), 130 for Ctrl-C, 141 where nobody reads the output any more.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except ReproError as error:
        print(f"repro: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"repro: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has seen enough; nothing more is to be written, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="repro", description="Reproduce papers on sparse recurrent networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, help: str, *, names: bool = False, profile: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=function)
        if names:
            sub.add_argument(
                "names", nargs="*", metavar="EXHIBIT", help="such as narang2017/table3, or a study; all by default"
            )
        if profile:
            sub.add_argument("--profile", default="laptop", help=f"one of {', '.join(PROFILES)}; laptop by default")
        return sub

    command("list", _list, "Studies, exhibits and how many claims each decides.")
    for name, function, help in (
        ("plan", _plan, "Trials of some exhibits, which are recorded, and the estimated time of the others."),
        ("run", _run, "Run what is missing, execute the notebooks, print the verdicts."),
    ):
        sub = command(name, function, help, names=True, profile=True)
        sub.add_argument("--jobs", type=_jobs, default=_cores(), help="processes at once (default: the number of cores)")
        sub.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="change one parameter")
        if name == "run":
            sub.add_argument("--executor", choices=("local", "dask"), default="local")
            sub.add_argument("--address", help="of the Dask scheduler, such as tcp://host:8786")
            sub.add_argument("--no-notebooks", action="store_true", help="stop after the trials and verdicts")
    command("figures", _figures, "Redraw all figures and the README's scoreboard from the committed records; trains nothing.")
    report = command("report", _report, "Write report/index.html from what has been run.", profile=True)
    report.add_argument("--output", type=Path, help="folder of the report (default: report/)")
    publish = command(
        "publish", _publish, "Copy finished records to results/published, to be committed.", names=True, profile=True
    )
    publish.add_argument("--partial", action="store_true", help="copy what there is, though trials are missing")
    data = command("data", _data, "Fetch corpora, checked against their checksums.")
    data.add_argument("corpora", nargs="*", help="such as an4; all by default")
    data.add_argument("--from", dest="mirror", type=Path, help="a local folder that holds them, instead of the network")
    command("doctor", _doctor, "Versions, threads, caches, GPU, corpora; what is missing and the line that mends it.")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(options, store=None) -> list:
    """The exhibits of the command line, each at its profile. A change must be a parameter of at least one of them."""
    from repro.results import ExhibitRun
    from repro.results import store as default_store
    from repro.studies import select

    chosen = select(getattr(options, "names", []))
    changes = {name: _value(text) for name, text in getattr(options, "p", [])}
    known = sorted({name for _, exhibit in chosen for name in exhibit.parameters})
    for name in changes:
        if name not in known:
            raise ReproError(f"unknown parameter {name!r}: these exhibits take {', '.join(known)}")
    return [
        ExhibitRun(
            study,
            exhibit,
            study.profile(options.profile, **{name: value for name, value in changes.items() if name in exhibit.parameters}),
            store or default_store(),
        )
        for study, exhibit in chosen
    ]


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: it must be at least 1")
    return int(text)


def _list(options) -> None:
    from repro.studies import STUDIES

    for study in STUDIES.values():
        claims = study.claims()
        print(f"{study.name}: {study.title} ({study.citation}), {len(claims)} claims")
        for exhibit in study.exhibits.values():
            count = sum(claim.exhibit == exhibit.name for claim in claims)
            print(f"  {study.name}/{exhibit.name:<10} {count:3} claims  {exhibit.title}")


def _plan(options) -> None:
    from repro.engine import duration, plan

    runs = _open(options)
    trials = [trial for run in runs for trial in run.trials]
    whole = plan(trials, runs[0].store)
    for row in whole.rows:
        estimate = "" if row.state == "hit" else f"about {duration(row.seconds)}"
        print(f"{row.state:<9} {row.key[:12]}  {row.trial.label():<46} {estimate}")
    hits = len(whole.rows) - len(whole.missing)
    print(
        f"{len(whole.rows)} trials: {hits} recorded, {len(whole.missing)} to run, "
        f"about {duration(whole.seconds(options.jobs))} with {options.jobs} jobs"
    )


def _run(options) -> None:
    from repro.engine import dask_executor, run_trials
    from repro.report.notebooks import execute_all

    if options.executor == "dask" and not options.address:
        raise ReproError("--executor dask needs --address, such as tcp://127.0.0.1:8786")
    runs = _open(options)
    trials = [trial for run in runs for trial in run.trials]
    with dask_executor(options.address) if options.executor == "dask" else nullcontext() as executor:
        run_trials(trials, runs[0].store, jobs=options.jobs, executor=executor, progress=sys.stderr)
    if not options.no_notebooks:
        tasks = []
        for run in runs:
            run.folder().mkdir(parents=True, exist_ok=True)
            given = {name: _value(text) for name, text in options.p if name in run.exhibit.parameters}
            tasks.append((_notebook(run), run.folder() / f"{run.exhibit.name}.ipynb", {"profile": options.profile} | given))
        execute_all(tasks, jobs=options.jobs, progress=lambda line: print(line, file=sys.stderr))
    for run in runs:
        for verdict in run.verdicts(run.recorded()):
            print(f"{run.name:<22} {verdict.claim.id:<4} {verdict.verdict:<18} {verdict.claim.text}")


def _notebook(run) -> Path:
    from repro.files import repository_root

    return repository_root() / "notebooks" / run.study.name / f"{run.exhibit.name}.ipynb"


def _figures(options) -> None:
    from repro.files import repository_root, write_atomically
    from repro.report.site import replace_between_markers, scoreboard_markdown
    from repro.report.verdicts import prefer
    from repro.results import store
    from repro.studies import STUDIES

    ledgers = {}
    for profile in ("laptop", "paper"):
        options.profile = profile
        for run in _open(options, store("published")):
            results = run.recorded()
            ledgers.setdefault(profile, {}).update({v.claim.id: v for v in run.verdicts(results)})
            if run.trials and not results.used():
                continue
            run.save_tables(results)
            for path in run.save_figure(results):
                print(path)
    best = {name: prefer(ledgers["paper"][name], verdict) for name, verdict in ledgers["laptop"].items()}
    ordered = [best[claim.id] for study in STUDIES.values() for claim in study.claims()]
    readme = repository_root() / "README.md"
    board = scoreboard_markdown(ordered, {study.name: study.title for study in STUDIES.values()})
    write_atomically(readme, replace_between_markers(readme.read_text(), "scoreboard", board))


def _report(options) -> None:
    import pandas as pd

    from repro.engine.provenance import code_state, cpu_model, versions
    from repro.files import repository_root
    from repro.report.site import ExhibitPage, build_site
    from repro.results import provenance
    from repro.studies import STUDIES

    ledger, pages, records = [], [], []
    by_exhibit = {}
    for run in _open(options):
        results = run.recorded()
        by_exhibit[run.study.name, run.exhibit.name] = {v.claim.id: v for v in run.verdicts(results)}
        notebook = run.folder() / f"{run.exhibit.name}.ipynb"
        figures = [path for suffix in (".png", ".svg") if (path := run.folder() / f"{run.exhibit.name}{suffix}").exists()]
        tables = sorted(run.folder().glob(f"{run.exhibit.name}.csv")) + sorted(run.folder().glob(f"{run.exhibit.name}-*.csv"))
        if notebook.exists():
            pages.append(
                ExhibitPage(
                    study=run.study.name,
                    name=run.exhibit.name,
                    title=run.exhibit.title,
                    caption=f"{run.exhibit.caption} {_measured_on(run)}".strip(),
                    notebook=notebook,
                    figures=tuple(figures),
                    csv=tuple(tables),
                )
            )
        records.append(provenance(results).assign(exhibit=run.name))
    if not pages:
        raise ReproError(
            f"nothing has been run in the {options.profile} profile: `make reproduce PROFILE={options.profile}` first"
        )
    for study in STUDIES.values():
        ledger += [by_exhibit[study.name, claim.exhibit][claim.id] for claim in study.claims()]
    everything = pd.concat(records, ignore_index=True)
    everything = everything.drop_duplicates("key") if "key" in everything else everything
    facts = {"profile": options.profile, "machine": cpu_model(), **code_state(), **versions()}
    study = next(iter(STUDIES.values()))
    index = build_site(
        options.output or repository_root() / "report",
        ledger,
        pages,
        titles={study.name: study.title for study in STUDIES.values()},
        provenance=facts,
        records=everything,
        profile=options.profile,
        source=study.corpus_note(study.profile(options.profile)),
    )
    print(index)


def _measured_on(run) -> str:
    """The words that name the corpus, where an exhibit's trials have one."""
    note = run.study.measured_on(run.exhibit.name, run.profile)
    return f"{note[0].upper()}{note[1:]}." if any(hasattr(trial, "corpus") for trial in run.trials) else ""


def _publish(options) -> None:
    from repro.engine import plan
    from repro.files import repository_root

    runs = _open(options)
    whole = plan([trial for run in runs for trial in run.trials], runs[0].store)
    if whole.missing and not options.partial:
        raise ReproError(f"{len(whole.missing)} trials have no record yet: run them first, or publish with --partial")
    written = runs[0].store.export(
        [row.key for row in whole.rows if row.state == "hit"], repository_root() / "results" / "published"
    )
    print(f"{len(written)} records copied to results/published")


def _data(options) -> None:
    from repro.datasets.registry import fetch, read_registry

    for corpus in options.corpora or read_registry():
        print(fetch(corpus, mirror=options.mirror))


def _doctor(options) -> None:
    import repro.engine.provenance as here
    from repro.datasets.registry import read_registry, status
    from repro.files import repository_root
    from repro.results import results_folder

    print(f"machine   {here.cpu_model()}, {here.available_cores()} cores")
    print("versions  " + ", ".join(f"{name} {version}" for name, version in here.versions().items()))
    print("code      " + ", ".join(f"{name} {value}" for name, value in here.code_state().items()))
    import torch

    print(f"threads   torch {torch.get_num_threads()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    print(f"GPU       {here.gpu_name() or 'none; nothing here needs one'}")
    print(f"results   {results_folder()}")
    print(f"checkout  {repository_root()}")
    print("corpus    made: always there, synthesised on first use")
    for corpus in read_registry():
        found = status(corpus)
        print(f"corpus    {corpus}: {found.state}, {found.detail}")


if __name__ == "__main__":
    sys.exit(main())
