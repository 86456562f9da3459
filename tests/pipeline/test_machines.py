"""Workers find places machine by machine and GPU by GPU, before anything waits for them."""

from types import SimpleNamespace

import pytest
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from search_sweeps import searching
from smoke import SMOKE, planned

from pipeline import train
from pipeline.execute import Unit, _ready, check_cluster
from pipeline.job import Job, Outcome
from pipeline.machines import Machine, machines, placed
from pipeline.search import run
from pipeline.search.checks import check_search
from pipeline.store import Store
from pipeline.sweep import MachineKind, Resources
from stages.errors import BadInput

FINETUNE = "finetune/tiny-sft-seed0"
WIDE = ["resources.finetune.cpus=2", "resources.finetune.expert_parallel=1"]


def of(workers=1, cpus=0.0, gpus=0.0):
    return Resources(workers=workers, cpus=cpus, gpus=gpus)


@pytest.fixture
def cluster_of(monkeypatch):
    """Makes Ray tell of machines with so many CPUs and GPUs; the command runs on the first."""

    def be(*shapes):
        nodes = [{"Alive": True, "NodeID": str(n), "Resources": {"CPU": cpus, "GPU": gpus}}
                 for n, (cpus, gpus) in enumerate(shapes)]
        nodes.append({"Alive": False, "NodeID": "gone", "Resources": {"CPU": 99.0}})
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(
            ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0"))
        monkeypatch.setattr("pipeline.execute._check_shared", lambda store: None)

    return be


@pytest.mark.parametrize(
    ("room", "loads", "expected"),
    [
        ([(3, 0), (3, 0), (1, 0)], [of(4, cpus=2)], 2),  # not 7 / 2
        ([(3, 0), (3, 0), (1, 0)], [of(99, cpus=0.1)], 70),
        ([(8, 2)], [of(3, gpus=0.6)], 2),  # not 2 / 0.6: the rest of two GPUs is not one
        ([(8, 2)], [of(9, gpus=0.25)], 8),
        ([(8, 4)], [of(3, gpus=2)], 2),
        ([(2, 4)], [of(4, cpus=1, gpus=1)], 2),  # CPUs run out first
        # Alone each fits, and their sums do: 2 × 3 + 2 of 8 GPUs.
        ([(9, 4), (9, 4)], [of(2, gpus=3)], 2),
        ([(9, 4), (9, 4)], [of(1, gpus=2)], 1),
        ([(9, 4), (9, 4)], [of(2, gpus=3), of(1, gpus=2)], 2),
        ([(9, 4), (9, 4)], [of(1, gpus=3), of(2, gpus=2)], 3),  # the large one first
        # What needs no GPU leaves the machines that have some to others.
        ([(4, 4), (4, 0)], [of(4, cpus=1), of(4, cpus=1, gpus=1)], 8),
        ([(1, 0)], [of(5)], 5),
    ],
)
def test_places_by_hand(room, loads, expected):
    assert placed([Machine(*m) for m in room], loads) == expected


def test_what_a_cluster_can_start_counts_with_what_runs(cluster_of):
    cluster_of((8.0, 0.0), (16.0, 1.0))
    startable = [MachineKind(count=3, cpus=16, gpus=1), MachineKind(count=1, cpus=96, gpus=8)]
    assert sorted(machines(startable)) == [(8, 0), (16, 1), (16, 1), (16, 1), (96, 8)]
    assert machines([]) == [(8, 0), (16, 1)]


def test_a_fine_tune_whose_workers_do_not_fit_is_refused(cluster_of, tmp_path):
    cluster_of((3.0, 0.0), (3.0, 0.0), (1.0, 0.0))
    plan = planned(*WIDE, "resources.finetune.workers=3", "recipes.sft.batch_size=6")
    with pytest.raises(BadInput) as caught:
        check_cluster(plan, {FINETUNE}, Store(str(tmp_path)))
    assert str(caught.value) == (
        "resources.finetune: the cluster's machines have room for 2 of 3 workers of 2 CPU; lower "
        "workers, cpus or gpus, or name the machines that the cluster can start under "
        "resources.machines")
    grown = planned(*WIDE, "resources.finetune.workers=3", "recipes.sft.batch_size=6",
                    "resources.machines=[{count: 1, cpus: 2}]")
    check_cluster(grown, {FINETUNE}, Store(str(tmp_path)))


def test_parts_of_gpus_that_no_gpu_can_give_are_refused(cluster_of, tmp_path):
    cluster_of((8.0, 2.0))
    plan = planned("resources.evaluate.workers=3", "resources.evaluate.gpus=0.6")
    keys = {key for key in plan.nodes if key.startswith("evaluate/")}
    with pytest.raises(BadInput, match="resources.evaluate: .* room for 2 of 3 workers of 1 CPU "
                                       "and 0.6 GPU; lower"):
        check_cluster(plan, keys, Store(str(tmp_path)))


def test_a_cluster_that_starts_its_gpus_itself_has_none_until_they_are_named(cluster_of, tmp_path):
    cluster_of((8.0, 0.0))
    fields = ["resources.finetune.gpus=1", "resources.evaluate.gpus=1"]
    plan = planned(*fields)
    with pytest.raises(BadInput, match="no machine of the cluster has, for one worker, 1 CPU and "
                                       "1 GPU; .* under resources.machines"):
        check_cluster(plan, set(plan.nodes), Store(str(tmp_path)))
    plan = planned(*fields, "resources.machines=[{count: 2, cpus: 16, gpus: 1}]")
    check_cluster(plan, set(plan.nodes), Store(str(tmp_path)))


def test_files_of_this_machine_are_read_on_it_or_refused(cluster_of, tmp_path):
    cluster_of((0.0, 0.0), (8.0, 0.0))
    plan, store = planned(), Store(str(tmp_path))
    with pytest.raises(BadInput, match="resources.data: reviews reads files of the machine that "
                                       "runs this command, which does not have 1 CPU; lower cpus"):
        check_cluster(plan, {"data/reviews"}, store)
    check_cluster(planned("resources.data.cpus=0"), {"data/reviews"}, store)
    check_cluster(plan, {"model/tiny-moe"}, store)  # on the other machine


def test_nodes_start_only_where_their_workers_find_places_beside_those_that_run():
    """Two machines of 4 GPUs: 3 + 3 leave no 2 together, though their sum is 8."""
    plan = planned("resources.finetune.gpus=3", "resources.evaluate.workers=1",
                   "resources.evaluate.gpus=2")
    tuned = Unit([plan.nodes[FINETUNE]])
    passes = Unit([plan.nodes["evaluate/tiny-none-questions"]])
    outcomes = {key: Outcome("done") for key in plan.nodes}
    room = [Machine(16, 4), Machine(16, 4)]
    assert list(_ready([passes], plan, outcomes, {"a": tuned}, room)) == []
    assert list(_ready([passes], plan, outcomes, {}, room)) == [passes]
    assert list(_ready([passes, tuned], plan, outcomes, {}, room)) == [passes]
    assert list(_ready([passes], plan, outcomes, {"a": tuned}, [*room, Machine(1, 2)])) == [passes]


def test_a_fine_tune_waits_for_places_as_long_as_there_can_be_any(
    cluster_of, tmp_path, monkeypatch
):
    """Ray gives up after some minutes; others may hold the places, or the machine may be lost."""
    plan, tried = planned(), []
    node = plan.nodes["finetune/tiny-moe-sft-seed0"]
    job = Job.of(node, plan, Store(str(tmp_path)), SMOKE.parent)

    class Group:
        """Workers that find their places at the third attempt."""

        def __init__(self, *_, **__):
            pass

        def fit(self):
            tried.append(self)
            if len(tried) < 3:
                raise ray.train.ControllerError(WorkerGroupStartupTimeoutError(2))
            self.return_value = {"failed": "it trains"}
            return self

    monkeypatch.setattr(train, "TorchTrainer", Group)
    cluster_of((1.0, 0.0), (1.0, 0.0))
    assert train.fit(job).message == "it trains" and len(tried) == 3
    tried.clear()
    cluster_of((1.0, 0.0))
    assert train.fit(job).message == (
        "the cluster's machines have room for 1 of 2 workers by now; run again when there are more")
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("shapes", "fields", "expected"),
    [
        # A fine-tune takes 2 × 1 CPU, a pass 2 × 1: four CPUs are two trials.
        ([(2, 0), (2, 0)], {}, 2),
        ([(2, 0), (2, 0), (9, 0)], {}, 4),  # of 4 trials
        # Two passes of 3 CPUs fit, two fine-tunes of 2 × 2 fit, one of each does; of three, not.
        ([(4, 0), (4, 0)], {"finetune.cpus": 2, "evaluate.cpus": 3, "evaluate.workers": 1}, 2),
        # One machine would hold two fine-tunes or two passes, but not one of each.
        ([(8, 4)], {"finetune.gpus": 1, "evaluate.workers": 1, "evaluate.gpus": 3}, 1),
    ],
)
def test_as_many_trials_at_once_as_find_places_whatever_each_does(
    cluster_of, shapes, fields, expected
):
    cluster_of(*shapes)
    sweep = searching(*(f"resources.{field}={value}" for field, value in fields.items()))
    moe, _ = run.model_searches(sweep, check_search(sweep, SMOKE), SMOKE.parent)
    assert moe.trials == 4 and run.at_once(moe) == expected
