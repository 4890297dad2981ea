"""Recipes: each shipped profile takes the rows it names, of one kind, and its file says so."""

import pytest

from energy.adapters.catalogue import load_fitted, profile_names
from energy.closed_loop import LoadShape
from energy.gpus import gpu_physics
from energy.measurements import Measurement, ServedPower, one_kind
from energy.models import model_architecture
from energy.recipes import ML_ENERGY_FILE, MOVES, RECIPES, TRIED

BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def row(**fields):
    defaults = {
        "where": "a.csv line 2",
        "gpu": "H100-SXM",
        "model": "meta-llama/Llama-3.1-70B-Instruct",
        "precision": "fp8",
        "engine": "vllm",
        "tp": 4,
        "sm_clock_mhz": None,
        "load": LoadShape(512.0, 128.0, 4),
        "ttft_s": 0.1,
        "tpot_s": 0.02,
    }
    return Measurement(**{**defaults, **fields})


def served(gpu="H100-SXM", model="meta-llama/Llama-3.1-70B-Instruct"):
    return ServedPower("b.csv line 2", gpu, model, "fp8", 4, 16.0, 0.02, 200.0, 400.0)


class TestSelection:
    recipe = BY_NAME["llama-3.1-70b-fp8-h100"]

    @pytest.mark.parametrize(
        "other",
        [
            {"gpu": "H200-SXM"},
            {"model": "meta-llama/Llama-3.1-8B-Instruct"},
            {"precision": "bf16"},
            {"engine": "sglang"},
        ],
        ids=lambda other: next(iter(other)),
    )
    def test_rows_of_another_kind_stay_out(self, other):
        request = self.recipe.request([row(), row(**other), row(tp=8)], [])
        assert [m.tp for m in request.measurements] == [4, 8]
        one_kind(request.measurements)

    def test_served_power_of_the_same_board_goes_in(self):
        request = self.recipe.request([row()], [served(), served(gpu="A100-80GB-SXM"), served(model="someone/else")])
        assert request.served_power == [served()]
        assert {(source.name, source.rows) for source in request.sources} == {
            ("ai-dynamo/aiconfigurator", 1),
            ("ml-energy/leaderboard-v2", 1),
        }

    def test_a_recipe_without_its_own_power_says_whose_it_takes(self):
        recipe = BY_NAME["llama-3.1-70b-fp8-h200"]
        request = recipe.request([row(gpu="H200-SXM")], [served(gpu="H200-SXM")])
        assert recipe.takes_power_of == "llama-3.1-70b-fp8-h100"
        assert not request.needs_power
        assert not request.served_power
        assert "same die" in request.notes["activity_power"]


class TestShipped:
    @pytest.mark.parametrize("recipe", [*RECIPES, *TRIED], ids=lambda recipe: recipe.name)
    def test_names_known_boards_and_models(self, recipe):
        gpu, model = gpu_physics(recipe.gpu), model_architecture(recipe.model)
        assert recipe.precision in gpu.flops_per_s
        assert model.weight_bytes(recipe.precision) > 0
        assert (ML_ENERGY_FILE in recipe.files) == recipe.uses_served_power

    def test_every_shipped_profile_has_a_recipe_or_is_a_move(self):
        assert set(profile_names()) == set(BY_NAME) | {move.name for move in MOVES}

    def test_what_was_tried_and_missed_is_not_shipped(self):
        assert not {recipe.name for recipe in TRIED} & set(profile_names())

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
    def test_the_file_names_its_sources_and_their_licences(self, recipe):
        profile = load_fitted(recipe.name)
        assert (profile.model, profile.gpu, profile.precision, profile.engine) == (
            recipe.model,
            recipe.gpu,
            recipe.precision,
            recipe.engine,
        )
        sources = profile.provenance.sources
        assert len(sources) == len(recipe.files)
        assert all(source.rows > 0 and source.commit and source.licence for source in sources)

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
    def test_power_is_taken_from_a_profile_fitted_before(self, recipe):
        earlier = [r.name for r in RECIPES[: RECIPES.index(recipe)]]
        assert recipe.takes_power_of in ("", *earlier)
