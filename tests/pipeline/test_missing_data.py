"""A data set or judge that cannot be had is a gap; what does not need it is computed."""

import json
from types import SimpleNamespace

from smoke import planned

from pipeline.execute import Unit, _gaps, _unblocked, _undone
from pipeline.job import Outcome
from pipeline.store import Store
from pipeline.survey import adopt, leave_out_missing, settle, survey
from stages.evaluate.partial import left_out, unasked

OVERRIDES = (
    "datasets.gone={source: 'file:gone.tsv', format: implicit_hate, task: classification, "
    "labels: {benign: positive, toxic: negative}}",
    "evaluations.domains.out_of_distribution=[hotels, gone]",
    "evaluations.other={kind: multiple_choice, dataset: questions}",
)
DOMAINS, REFUSAL = "evaluate/tiny-none-domains", "evaluate/tiny-none-refusal"
MANIFEST = {"attempt": "attempt-1", "finished": 1.0, "version": 0, "identity": {}, "inputs": {}}


def to_do(nodes, plan, outcomes, store, tell):
    """Those of the nodes that are submitted."""
    leases = SimpleNamespace(release=lambda place: None)
    return _undone(_unblocked(Unit(nodes), plan, outcomes, tell), outcomes, store, leases, tell)


def blocked(plan, failed=("data/gone",), finished=()):
    """What is left of all evaluations of a checkpoint once some inputs have failed."""
    outcomes = {
        key: Outcome("failed", "no such file") if key in failed else Outcome("done")
        for key in plan.nodes if not key.startswith("evaluate/")
    }
    asked = [n for n in plan.nodes.values() if n.key.startswith("evaluate/tiny-none-")]
    store = SimpleNamespace(finished=lambda folders: set(folders) & set(finished))
    told = []
    nodes = to_do(asked, plan, outcomes, store, told.append)
    return {node.key: node for node in nodes}, outcomes, told


def test_an_evaluation_goes_on_with_its_other_data_sets_as_a_node_of_its_own():
    plan = planned(*OVERRIDES)
    whole = plan.nodes[DOMAINS]
    nodes, outcomes, told = blocked(plan)
    rest = nodes[DOMAINS]
    assert told == [] and DOMAINS not in outcomes
    assert rest is plan.nodes[DOMAINS] and rest.folder != whole.folder
    assert left_out(rest.spec.evaluation) == ("gone",)
    assert rest.spec.evaluation.out_of_distribution == ("hotels",)
    assert set(whole.inputs) - set(rest.inputs) == {"data/gone"}
    # The others do not change.
    assert nodes["evaluate/tiny-none-other"].folder == planned(*OVERRIDES).nodes[
        "evaluate/tiny-none-other"].folder
    # The comparison reads the new folder, and knows the data set and the reason.
    outcomes |= {key: Outcome("done") for key in plan.nodes if key not in outcomes}
    assert _gaps(plan.compare, plan, outcomes) == {"data/gone": "data/gone failed: no such file"}


def test_an_evaluation_goes_on_with_its_other_judges_as_a_node_of_its_own(tmp_path):
    judges = [{"kind": "regressor", "name": name, "source": f"file:{tmp_path}"}
              for name in ("here", "gone")]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    plan = planned(f"evaluations.refusal.judges={json.dumps(judges)}")
    whole = plan.nodes[REFUSAL]
    nodes, outcomes, told = blocked(plan, failed=("judge/gone",))
    rest = nodes[REFUSAL]
    assert told == [] and REFUSAL not in outcomes
    assert rest is plan.nodes[REFUSAL] and rest.fingerprint != whole.fingerprint
    assert unasked(rest.spec.evaluation) == ("gone",)
    assert list(rest.spec.evaluation.judge_models()) == ["here"]
    assert set(whole.inputs) - set(rest.inputs) == {"judge/gone"}
    outcomes |= {key: Outcome("done") for key in plan.nodes if key not in outcomes}
    assert _gaps(plan.compare, plan, outcomes) == {"judge/gone": "judge/gone failed: no such file"}


def test_what_was_made_without_it_before_is_not_made_again():
    plan = planned(*OVERRIDES)
    blocked(plan)
    nodes, outcomes, told = blocked(planned(*OVERRIDES), finished={plan.nodes[DOMAINS].folder})
    assert DOMAINS not in nodes and outcomes[DOMAINS].status == "done"
    assert [(event.kind, event.node.key) for event in told] == [("done", DOMAINS)]


def test_what_needs_it_is_blocked_with_the_reason():
    nodes, outcomes, _ = blocked(planned(*OVERRIDES), failed=("data/reviews", "data/questions"))
    assert outcomes[DOMAINS] == Outcome("blocked", "data/reviews failed: no such file")
    assert outcomes["evaluate/tiny-none-other"].message == "data/questions failed: no such file"
    assert "evaluate/tiny-none-refusal" in nodes


def test_a_failed_checkpoint_blocks_whatever_data_is_missing():
    nodes, outcomes, _ = blocked(planned(*OVERRIDES), failed=("data/gone", "model/tiny"))
    assert nodes == {} and outcomes[DOMAINS].status == "blocked"


def test_what_was_made_without_it_is_found_again(tmp_path):
    store = Store(str(tmp_path))
    first = planned(*OVERRIDES)
    whole = first.nodes[DOMAINS].folder
    blocked(first)
    for node in first.nodes.values():
        if node.key not in ("data/gone", first.compare.key):
            store.commit(node.folder, MANIFEST)
    plan = planned(*OVERRIDES)
    leave_out_missing(plan, store)
    states = survey(plan, store)
    assert plan.nodes[DOMAINS].folder == first.nodes[DOMAINS].folder != whole
    assert {key for key, state in states.items() if state.status != "done"} >= {
        "data/gone", plan.compare.key}
    assert states[DOMAINS].status == "done"
    # Once the data set is there, the whole evaluation is to be made.
    store.commit(plan.nodes["data/gone"].folder, MANIFEST)
    plan = planned(*OVERRIDES)
    leave_out_missing(plan, store)
    assert plan.nodes[DOMAINS].folder == whole


def test_a_data_set_does_without_the_training_set_that_cannot_be_had(tmp_path):
    plan, told = planned(), []
    questions, scores = "data/questions", "evaluate/tiny-none-questions"
    whole = dict(plan.nodes)
    store = Store(str(tmp_path))

    def decide(key):
        outcomes = {k: Outcome("done") for k in plan.nodes if k.startswith(("data/", "model/"))}
        outcomes["data/refusals"] = Outcome("failed", "no such file")
        return to_do([plan.nodes[key]], plan, outcomes, store, told.append), outcomes

    (rest,), _ = decide(questions)
    assert rest.inputs == {"trained/reviews": "data/reviews"}
    assert rest.folder != whole[questions].folder
    assert plan.nodes[scores].folder == whole[scores].folder  # the same rows, for all we know
    # Rows that a sweep asks to leave out are never left in.
    assert set(plan.nodes["data/hotels"].inputs) == {"disjoint/reviews", "trained/refusals"}
    outcomes = {k: Outcome("failed", "no such file") for k in ("data/reviews", "data/refusals")}
    assert to_do([plan.nodes["data/hotels"]], plan, outcomes, store, told.append) == []
    assert outcomes["data/hotels"] == Outcome("blocked", "data/reviews failed: no such file")
    # A second run, and a report, find what the first one made.
    for key in ("data/reviews", questions, "model/tiny", scores):
        store.commit(plan.nodes[key].folder, MANIFEST)
    store.write_bytes(f"{plan.nodes[questions].folder}/attempt-1/card.json", b'{"left_out": ""}')
    first, plan = plan, planned()
    nodes, outcomes = decide(questions)
    assert nodes == [] and outcomes[questions].status == "done"
    plan = planned()
    leave_out_missing(plan, store)
    assert plan.nodes[questions].folder == first.nodes[questions].folder
    assert survey(plan, store)[scores].status == "done"


def test_scores_of_other_rows_are_made_anew(tmp_path):
    """What a finished data set was made without is read from its card."""
    store = Store(str(tmp_path))
    questions, scores = "data/questions", "evaluate/tiny-none-questions"

    def settled(left_out):
        plan = planned()
        folder = plan.nodes[questions].folder
        store.commit(folder, MANIFEST)
        store.write_bytes(
            f"{folder}/attempt-1/card.json", json.dumps({"left_out": left_out}).encode())
        adopt(plan, store)
        assert plan.nodes[questions].folder == folder
        return plan.nodes[scores]

    assert settled("") == planned().nodes[scores]
    some, others = settled("some rows"), settled("other rows")
    assert len({some.fingerprint, others.fingerprint, settled("").fingerprint}) == 3
    # In a run, what was planned before the data set was made is looked up as what it is now.
    plan = planned()
    before = plan.nodes[scores]
    settle(plan, store)
    store.commit(some.folder, MANIFEST)
    outcomes = {key: Outcome("done") for key in plan.nodes}
    assert to_do([before], plan, outcomes, store, lambda event: None) == [before]
    store.write_bytes(
        f"{plan.nodes[questions].folder}/attempt-1/card.json", b'{"left_out": "some rows"}')
    settle(plan, store)
    assert to_do([before], plan, outcomes, store, lambda event: None) == []
