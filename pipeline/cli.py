"""The command line, ``moe-reliability`` or ``python -m pipeline``.

Exit codes: 0 all well; 1 a stage failed (what finished stays, run again to go on); 2 the input is
wrong and nothing was done; 130 interrupted. Ray, torch and MLflow are imported only by the verbs
that need them.
"""

import argparse
import os
import sys
from pathlib import Path

from stages.errors import BadInput, StageFailed

SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.verb(options)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished work is kept, run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); that is no failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-reliability",
        description="How reliable Mixture-of-Experts language models are next to dense ones.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--store", default="store", metavar="PLACE",
                        help="artifact store: a folder, s3:// or gs:// (default: ./store)")
    places.add_argument("--tracking-uri", metavar="URI",
                        help="MLflow store or server (default: SQLite in the artifact store)")
    overrides = argparse.ArgumentParser(add_help=False)
    overrides.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                           help="override a field of the sweep, for example seeds=[0,1,2]")
    sweep = argparse.ArgumentParser(add_help=False, parents=[places, overrides])
    sweep.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep file")
    cluster = argparse.ArgumentParser(add_help=False)
    cluster.add_argument("--address", metavar="RAY",
                         help="Ray cluster to use, or `auto` (default: start a local one; "
                              "inside a Ray job, the job's own)")

    def add(name: str, verb, parents: list, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, parents=parents, help=text, description=text)
        made.set_defaults(verb=verb)
        return made

    planned = add("plan", _plan, [sweep], "print the stage graph; run nothing")
    planned.add_argument("--all", action="store_true", help="print every node of a large plan")
    add("run", _run, [sweep, cluster], "run what is missing, then show the comparison")
    search = add("search", _search, [sweep, cluster],
                 "search recipes as the sweep's `search` section says, then compare the winners")
    search.add_argument("--plan", action="store_true",
                        help="print what is searched and how far it is; run nothing")
    evaluate = add("evaluate", _evaluate, [places, overrides, cluster],
                   "evaluate one model, without training or comparison")
    evaluate.add_argument("model", metavar="MODEL",
                          help="a Hugging Face folder, a hub id, or pack:NAME")
    evaluate.add_argument("--evaluations", required=True, metavar="A,B",
                          help="names of evaluations of the sweep, or `all`: those that the model "
                               "can do")
    evaluate.add_argument("--sweep", type=Path, default=SWEEPS / "quickstart.yaml",
                          help="where the evaluations and data sets are defined")
    report = add("report", _report, [sweep],
                 "rebuild tables, figures and HTML from stored scores")
    report.add_argument("--examples", type=Path, metavar="FILE",
                        help="also write every score of every example to one Parquet file")
    ui = add("ui", _ui, [places], "open the MLflow UI on loopback")
    ui.add_argument("--port", type=int, default=5000)
    add("status", _status, [sweep], "progress of a running or finished sweep")
    show = add("show", _show, [sweep], "the examples behind a number")
    show.add_argument("--evaluation", required=True, metavar="NAME")
    show.add_argument("--where", default="", metavar="A,B",
                      help="moe_wrong, moe_right, dense_wrong, dense_right, subset=NAME")
    show.add_argument("--recipe", help="recipe (default: the last one; `none` is untuned)")
    show.add_argument("--pair", type=int, default=0, help="number of the pair in the sweep")
    show.add_argument("--limit", type=int, default=10, help="most examples shown")
    gc = add("gc", _gc, [places], "list (with --yes: delete) folders that no given sweep needs")
    gc.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP")
    gc.add_argument("--yes", action="store_true", help="delete them")
    data = add("data", _data, [overrides],
               "list the data sets there are, or fetch what a sweep needs")
    data.add_argument("action", choices=("list", "fetch"))
    data.add_argument("sweep", type=Path, nargs="?", metavar="SWEEP",
                      help="a sweep file (list: without one, every data set that can be named)")
    export = add("export", _export, [places, overrides],
                 "write a checkpoint of the store as a folder that lm_eval and vLLM load")
    export.add_argument("checkpoint", type=Path, metavar="SWEEP|CHECKPOINT",
                        help="a sweep file, or a checkpoint of the store "
                             "(finetune/NAME@FINGERPRINT)")
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    export.add_argument("--model", metavar="NAME", help="which model of the sweep")
    export.add_argument("--recipe", metavar="NAME",
                        help="recipe (default: the last one; `none` is untuned)")
    export.add_argument("--seed", type=int, help="seed (default: the first)")
    add("models", _models, [], "architectures and what each supports")
    add("doctor", _doctor, [places, cluster], "versions, devices, stores, and what is missing")
    return parser


def _read(options: argparse.Namespace):
    """Sweep, plan and store of a command, checked; refuses what cannot work."""
    from pipeline.checks import check, check_plan
    from pipeline.gpu_memory import check_memory
    from pipeline.plan import build
    from pipeline.survey import adopt
    from pipeline.sweep_file import load

    sweep = load(options.sweep, options.set)
    plan = build(sweep, check(sweep, options.sweep))
    check_plan(plan, options.sweep)
    store = _store(options)
    adopt(plan, store)
    check_memory(plan, store, options.sweep.resolve().parent, options.sweep)
    return sweep, plan, store


def _store(options: argparse.Namespace):
    from pipeline.store import Store

    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in options.store and (
        not Path(options.store).is_absolute()
    ):
        raise BadInput(f"--store {options.store}: a job's working directory is temporary; name a "
                       "bucket (s3://, gs://) or an absolute folder that all machines mount")
    return Store(options.store)


def _tracking_uri(options: argparse.Namespace, store) -> str:
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    relative = uri is not None and uri.startswith("sqlite:///") and uri[10:11] != "/"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and (
        relative or uri is None and not store.local
    ):
        raise BadInput(f"--tracking-uri {uri or '(default)'}: a job's working directory is "
                       "temporary; name an MLflow server or an absolute sqlite:////FILE")
    if uri is None:
        return f"sqlite:///{store.root}/mlflow.db" if store.local else "sqlite:///mlflow.db"
    return uri


def _plan(options: argparse.Namespace) -> int:
    from pipeline.display import plan_lines
    from pipeline.survey import survey

    _, plan, store = _read(options)
    folder = options.sweep.resolve().parent
    print("\n".join(plan_lines(plan, survey(plan, store), store, folder, options.all)))
    return 0


def _run(options: argparse.Namespace) -> int:
    from pipeline.display import finish_lines
    from pipeline.record import record

    _, plan, store = _read(options)
    uri = _tracking_uri(options, store)
    outcomes = _execute(plan, store, options)
    print("\n".join(finish_lines(plan, outcomes, store)))
    print("\n".join(record(plan, store, uri)))
    return _code(outcomes)


def _search(options: argparse.Namespace) -> int:
    from pipeline.display import finish_lines
    from pipeline.gpu_memory import check_memory
    from pipeline.record import record
    from pipeline.search import run
    from pipeline.search.checks import check_search
    from pipeline.sweep_file import load

    sweep = load(options.sweep, options.set)
    contents = check_search(sweep, options.sweep)
    store = _store(options)
    uri = _tracking_uri(options, store)
    searches = run.model_searches(sweep, contents, options.sweep.resolve().parent)
    for each in searches:
        check_memory(each.plan, store, options.sweep.resolve().parent, options.sweep)
    print("\n".join(run.search_lines(sweep, searches, store)))
    if options.plan:
        return 0
    store.check_writable()
    failures = _run_searches(sweep, searches, contents, store, options)
    for line in run.best_lines(sweep, searches, store):
        print(line)
    trials = run.report(sweep, searches, store, uri)
    if failures:
        print(f"trials  {trials}")
        raise StageFailed("; ".join(failures))
    plan = run.final_plan(sweep, searches, contents, store)
    outcomes = _execute(plan, store, options)
    print("\n".join(finish_lines(plan, outcomes, store)))
    print(f"trials  {trials}")
    print("\n".join(record(plan, store, uri)))
    return _code(outcomes)


def _run_searches(sweep, searches: list, contents: dict, store, options) -> list[str]:
    """Run the searches that have no result and say which found none; starts no Ray for nothing."""
    from pipeline.display import Watcher
    from pipeline.search import run

    waiting = run.unfinished(searches, store)
    if not waiting:
        return []
    from pipeline.execute import check_cluster, connect, execute

    folder, failures = options.sweep.resolve().parent, []
    connect(options.address)
    for each in waiting:
        check_cluster(each.plan, set(each.plan.nodes), store)
    shared, todo = run.prepare(waiting, store)
    if todo:
        with Watcher(shared, todo, store) as watcher:
            outcomes = execute(shared, todo, store, folder, watcher.tell)
        if _code(outcomes):
            raise StageFailed("data or models of the search could not be prepared, see above")
    for each in waiting:
        try:
            run.run_search(each, sweep, contents, store, folder, lambda t: print(t, flush=True))
        except StageFailed as error:
            failures.append(str(error))
    return failures


def _evaluate(options: argparse.Namespace) -> int:
    from pipeline.checks import check
    from pipeline.display import score_lines
    from pipeline.plan import build_evaluations
    from pipeline.single import single_model

    single = single_model(options)
    plan = build_evaluations(single.sweep, check(single.sweep, options.sweep))
    store = _store(options)
    for line in single.lines():
        print(line, flush=True)
    outcomes = _execute(plan, store, options)
    print("\n".join([*score_lines(plan, outcomes, store), *single.lines()]))
    return _code(outcomes)


def _execute(plan, store, options: argparse.Namespace) -> dict:
    """Run what is missing of a plan; starts no Ray when nothing is."""
    from pipeline.display import Watcher
    from pipeline.survey import survey

    store.check_writable()
    todo = {key for key, state in survey(plan, store).items() if state.status != "done"}
    if not todo:
        print(f"{plan.sweep.name}: {len(plan.nodes)} nodes, all done · store {store.uri}")
        return {}
    from pipeline.execute import check_cluster, connect, execute

    folder, here = options.sweep.resolve().parent, Path.cwd()
    with Watcher(plan, todo, store) as watcher:
        connect(options.address)
        check_cluster(plan, todo, store)
        outcomes = execute(plan, todo, store, folder, watcher.tell)
    # Two Ray nodes on one machine share the folder of a job's working directory, and the second
    # one to unpack it replaces the folder that we are in.
    os.chdir(here)
    return outcomes


def _code(outcomes: dict) -> int:
    whole = all(outcome.status == "done" and not outcome.lacks for outcome in outcomes.values())
    return 0 if whole else 1


def _report(options: argparse.Namespace) -> int:
    from pipeline.display import finish_lines
    from pipeline.job import Job, run_stage
    from pipeline.survey import leave_out_missing, survey

    _, plan, store = _read(options)
    lacks = leave_out_missing(plan, store)
    states, node = survey(plan, store), plan.compare
    gaps = lacks | {role: f"{key} has not been run" for role, key in node.inputs.items()
                    if states[key].status != "done"}
    if len(gaps) == len(node.inputs):
        raise StageFailed(f"{store.uri} holds no result of this sweep; "
                          f"run `moe-reliability run {options.sweep}` first")
    job = Job.of(node, plan, store, options.sweep.resolve().parent, gaps)
    outcome = run_stage(job)
    print("\n".join(finish_lines(plan, {node.key: outcome}, store)))
    if options.examples is not None:
        from stages.compare.examples import write_examples

        inputs = {role: store.fetch(folder) for role, folder in job.inputs.items()
                  if role.startswith("scores/")}
        print(f"{write_examples(node.spec, inputs, options.examples):,} scores of examples in "
              f"{options.examples}")
    return 0 if outcome.status == "done" else 1


def _ui(options: argparse.Namespace) -> int:
    from pipeline.ui import serve

    return serve(_tracking_uri(options, _store(options)), options.port)


def _status(options: argparse.Namespace) -> int:
    from pipeline.display import status_lines
    from pipeline.survey import survey

    _, plan, store = _read(options)
    print("\n".join(status_lines(plan, survey(plan, store), store)))
    return 0


def _show(options: argparse.Namespace) -> int:
    from pipeline.show import examples
    from pipeline.survey import leave_out_missing

    sweep, plan, store = _read(options)
    leave_out_missing(plan, store)
    print("\n".join(examples(sweep, plan, store, options)))
    return 0


def _gc(options: argparse.Namespace) -> int:
    from pipeline.gc import collect, needed_by

    store = _store(options)
    print("\n".join(collect(needed_by(options.sweeps, store), store, options.yes)))
    return 0


def _data(options: argparse.Namespace) -> int:
    from pipeline.data import catalogue_lines, fetch_lines, sweep_lines
    from pipeline.sweep_file import load

    if options.sweep is None:
        if options.action == "fetch":
            raise BadInput("data fetch: no sweep; name the sweep file whose data is to be brought")
        print("\n".join(catalogue_lines()))
        return 0
    sweep, folder = load(options.sweep, options.set), options.sweep.resolve().parent
    if options.action == "list":
        print("\n".join(sweep_lines(sweep, folder)))
        return 0
    missing = 0
    for here, line in fetch_lines(sweep, folder):
        missing += not here
        print(line, flush=True)
    if missing:
        print(f"{missing} of {len(sweep.datasets)} data sets are missing; a run shows what needs "
              "them as gaps")
    return 1 if missing else 0


def _export(options: argparse.Namespace) -> int:
    from pipeline.checks import check
    from pipeline.export import export, node_of_store, node_of_sweep
    from pipeline.plan import build
    from pipeline.sweep_file import load

    store = _store(options)
    if options.checkpoint.suffix in (".yaml", ".yml"):
        sweep = load(options.checkpoint, options.set)
        plan = build(sweep, check(sweep, options.checkpoint))
        folder = node_of_sweep(sweep, plan, store, options)
    else:
        folder = node_of_store(store, options)
    print("\n".join(export(store, folder, options.to)))
    return 0


def _models(options: argparse.Namespace) -> int:
    from pipeline.models import model_lines

    print("\n".join(model_lines()))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from pipeline.doctor import examine

    lines, healthy = examine(_store(options), _tracking_uri(options, _store(options)),
                             options.address)
    print("\n".join(lines))
    return 0 if healthy else 1
