"""The breeder: seeds first, then random metrics, then children of a population's members."""

from toy_records import record_of

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion
from prunevolve.search.breeding.variation import Breeder
from prunevolve.search.population import State

SEARCH = Search(seed=5, population=4, initial_depth=(1, 3), brood=1)
TEXTS = ("mul(W, sqrt(X))", "mul(G, W)", "add(G, W)", "W")
MEMBERS = tuple(record_of(index, text, 2.0 + index) for index, text in enumerate(TEXTS))
STATE = State(committed=4, population=MEMBERS)


def bred(group="row", seeds=(), state=STATE, **changes):
    seed_criteria = tuple(Criterion.parse(text, group) for text in seeds)
    breeder = Breeder(SEARCH.model_copy(update=changes), group, seed_criteria)
    return [breeder.brood(index, state)[0] for index in range(60)]


def test_breed_gives_the_seeds_first_in_the_canonical_form_of_their_group():
    for group, expected in (("row", ["W", "W", "W"]), ("model", ["mms(W)", "W", "W"])):
        candidates = bred(group, ("mms(W)", "mul(W, W)", "W"))
        assert [candidate.criterion.text for candidate in candidates[:3]] == expected


def test_breed_gives_random_metrics_until_the_population_was_bred_once_then_children():
    candidates = bred()
    assert [candidate.parents for candidate in candidates[:4]] == [()] * 4
    children = [candidate for candidate in candidates[4:] if candidate.parents]
    assert len(children) > 20
    for child in children:
        one, other = child.parents
        assert one != other
        assert child.criterion.text not in (TEXTS[one], TEXTS[other])


def test_breed_replaces_a_child_that_equals_a_parent_by_a_random_metric():
    candidates = bred(crossover=0.0, mutation=0.0)
    assert {candidate.parents for candidate in candidates} == {()}
    assert len({candidate.criterion for candidate in candidates}) > 30


def test_breed_depends_on_seed_index_attempt_and_state_alone():
    breeder = Breeder(SEARCH.model_copy(update={"brood": 20}), "row")
    assert bred() == bred()
    assert bred(seed=6)[4:] != bred()[4:]
    attempts = {child.criterion for child in breeder.brood(8, STATE)}
    assert len(attempts) > 10


def test_breed_gives_all_candidates_the_group_and_no_units_where_scores_must_compare():
    for group in ("row", "model"):
        assert {candidate.criterion.group for candidate in bred(group)} == {group}
    assert all(candidate.criterion.metric.is_comparable for candidate in bred("model")[:4])
    free = bred("model", units="off")
    assert not all(candidate.criterion.metric.is_comparable for candidate in free)
